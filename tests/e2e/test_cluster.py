"""Two real engines and the router from one cluster file, as users start them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.fakes import is_alive
from tests.e2e.programs import Server, Spawned, small_engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def cluster_file(tmp_path: Path, model: str) -> Path:
    words = [word for word in small_engine(0) if not word.startswith(("--host", "--port"))]
    cluster: dict[str, Any] = {
        "defaults": {
            "model": model,
            "args": words,
            "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": 0},
        },
        "engines": [
            {"name": "ours", "hexgen": {"order": "edf"}},
            {"name": "stock", "scheduler": "priority"},
        ],
        "router": {"policy": "round_robin"},
        "log_dir": str(tmp_path / "logs"),
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def url_after(word: str, text: str) -> str:
    """Return the URL that follows ``word``."""
    found = re.search(rf"{word} (http://[0-9.:]+)", text)
    assert found, text
    return found[1]


def test_a_cluster_file_brings_up_engines_and_router_and_takes_them_down(
    tiny_model: str, tmp_path: Path
) -> None:
    program = Spawned(
        "hexgen_vllm.serve",
        ["--cluster", str(cluster_file(tmp_path, tiny_model))],
        tmp_path / "log",
    )
    try:
        wait_until(lambda: "ready: " in program.text(), program)
        text = program.text()
        router = Server(program, url_after("router", text))
        ours = Server(program, url_after("ours", text))
        stock = Server(program, url_after("stock", text))
        assert ours.get("/hexgen/stats").json["order"] == "edf"
        assert stock.get("/hexgen/stats").status == 404
        body = {"model": "tiny", "prompt": "SELECT", "max_tokens": 2}
        answers = [router.post("/v1/completions", body) for _ in range(4)]
        assert [answer.status for answer in answers] == [200] * 4
        steps = ours.get("/hexgen/stats").json["steps"]
        assert steps > 0
        assert "vllm:generation_tokens_total" in stock.get("/metrics").text
        pids = [int(pid) for pid in re.findall(r"pid=(\d+)", "\n".join(logs(tmp_path)))]
    finally:
        code = program.stop()
    assert code == 0
    assert pids
    assert not any(map(is_alive, pids))


def logs(tmp_path: Path) -> list[str]:
    return [path.read_text(errors="replace") for path in (tmp_path / "logs").iterdir()]
