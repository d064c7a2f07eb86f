"""Several models behind one router: two real engines, one of them with a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import ANSWER_S, Server, Spawned, free_port, small_engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
RANK = 8


def adapter(folder: Path, model: str) -> str:
    """Write a LoRA adapter of the tiny model's first query projection."""
    folder.mkdir()
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 64 * RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": model,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    width = json.loads((Path(model) / "config.json").read_text())["hidden_size"]
    at = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{at}A.weight": torch.randn(RANK, width, generator=generator),
        f"{at}B.weight": torch.randn(width, RANK, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def engines(forks: ForkServer, tiny_model: str, tmp_path: Path) -> Iterator[list[Server]]:
    """Yield an engine with two names of a model, and one with a model and an adapter of it."""
    sql = adapter(tmp_path / "sql", tiny_model)
    ways = (["small", "alias"], ["large", "--enable-lora", f"--lora-modules=sql={sql}"])
    found = []
    for words in ways:
        port = free_port()
        argv = [tiny_model, *small_engine(port)[1:], "--served-model-name", *words]
        log = tmp_path / f"engine-{words[0]}"
        found.append(Server(forks.start("hexgen_vllm.serve", argv, log, ENV), port))
    yield [server.wait_healthy() for server in found]
    for server in found:
        server.program.stop()


@pytest.fixture
def router(engines: list[Server], tmp_path: Path) -> Iterator[Server]:
    """Yield a router before them."""
    port = free_port()
    words = ["--health-check-interval-secs=0.5", "--policy=slack"]
    urls = [f"{name}={one.url}" for name, one in zip("ab", engines, strict=True)]
    argv = [f"--port={port}", *words, "--worker-urls", *urls]
    server = Server(Spawned("hexgen_vllm.router", argv, tmp_path / "router"), port)
    wait_until(lambda: server.is_healthy() and len(names(server)) == 4, server.program)
    yield server
    assert server.program.stop() == 0


def names(router: Server) -> dict[str, str | None]:
    """Return the models that the router lists, and what each is an adapter of."""
    answer = router.get("/v1/models")
    return {card["id"]: card["parent"] for card in answer.json["data"]}


def ask(router: Server, model: str) -> tuple[str, str]:
    """Return which engine answered, and what."""
    body = {"model": model, "prompt": "SELECT", "max_tokens": 12, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    call = Request(f"{router.url}/v1/completions", data, {"content-type": "application/json"})
    with urlopen(call, timeout=ANSWER_S) as answer:
        text = json.loads(answer.read())["choices"][0]["text"]
        return str(answer.headers["x-hexgen-engine"]), str(text)


def test_each_model_is_served_where_it_is(engines: list[Server], router: Server) -> None:
    assert names(router) == {"small": None, "alias": None, "large": None, "sql": "large"}
    found = {model: ask(router, model) for model in ("small", "alias", "large", "sql")}
    assert [engine for engine, _ in found.values()] == ["a", "a", "b", "b"]
    assert found["small"][1] == found["alias"][1] == found["large"][1] != found["sql"][1]
    unknown = router.post("/v1/completions", {"model": "other", "prompt": "x"})
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    assert unknown.json["error"]["type"] == "invalid_request_error"
    change_adapters(engines[1], router)


def change_adapters(engine: Server, router: Server) -> None:
    """Load an adapter and unload it again while the engine runs."""
    path = engine.get("/v1/models").json["data"][-1]["root"]
    loaded = {"lora_name": "later", "lora_path": path}
    assert engine.post("/v1/load_lora_adapter", loaded).status == 200
    wait_until(lambda: "later" in names(router), router.program)
    assert ask(router, "later") == ask(router, "sql")
    assert engine.post("/v1/unload_lora_adapter", {"lora_name": "later"}).status == 200
    wait_until(lambda: "later" not in names(router), router.program)
    assert router.post("/v1/completions", {"model": "later", "prompt": "x"}).status == 404
