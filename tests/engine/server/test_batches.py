"""Files and batches of one engine: a FastAPI application in vLLM's place, behind a real uvicorn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openai import AsyncOpenAI

from hexgen_vllm.batches.store import StoreLimits, check_folder
from hexgen_vllm.engine.server.middleware import HexgenMiddleware
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports

CHAT = "/v1/chat/completions"


@dataclass
class Engine:
    """Stands for vLLM: what it got, and what it answers."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    deadly: str = ""
    client: Any = None

    async def chat(self, request: Request) -> JSONResponse:
        self.keys.append(request.headers.get("authorization"))
        body = json.loads(await request.body())
        self.bodies.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.05)
            if self.deadly and self.deadly in json.dumps(body):
                self.client.errored = True
            if self.client.errored:
                return JSONResponse({"error": {"message": "EngineDeadError"}}, 500)
            return JSONResponse({"model": "m", "echo": body["messages"]})
        finally:
            self.at_once -= 1


@asynccontextmanager
async def engine(folder: Path | None, *, key: str | None = None, slots: int = 20,
                 deadly: str = "") -> AsyncIterator[Engine]:  # fmt: skip
    (port,) = free_ports("127.0.0.1", 1)
    one = Engine(f"http://127.0.0.1:{port}", deadly=deadly)
    parts = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=slots),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    one.client = SimpleNamespace(errored=False, vllm_config=parts)
    app = FastAPI()
    hexgen = {} if folder is None else {"batch_dir": str(folder)}
    keys = None if key is None else [key]
    app.state.args = SimpleNamespace(additional_config={"hexgen": hexgen}, api_key=keys)
    app.state.engine_client = one.client
    app.add_api_route(CHAT, one.chat, methods=["POST"])
    app.add_middleware(HexgenMiddleware)  # type: ignore[arg-type]
    config = uvicorn.Config(app, port=port, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield one
    finally:
        server.should_exit = True
        await task


def sdk(one: Engine, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{one.url}/v1", api_key=key, max_retries=0)


def lines(*names: str) -> bytes:
    return b"".join(
        json.dumps({
            "custom_id": name, "method": "POST", "url": CHAT,
            "body": {"messages": [{"role": "user", "content": name}]},
        }).encode() + b"\n"
        for name in names
    )  # fmt: skip


async def begun(client: AsyncOpenAI, content: bytes) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )


async def ended(client: AsyncOpenAI, batch: Any) -> Any:
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(0.01)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def answers(client: AsyncOpenAI, file_id: str) -> dict[str, Any]:
    found = (await client.files.content(file_id)).content.splitlines()
    return {(one := json.loads(line))["custom_id"]: one for line in found}


async def test_an_engine_answers_files_as_calls_of_class_batch(tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(60)]
    async with engine(tmp_path, key="k") as one, sdk(one, "k") as client:
        batch = await ended(client, await begun(client, lines(*names)))
        assert batch.request_counts.model_dump() == {"total": 60, "completed": 60, "failed": 0}
        assert 8 < one.most_at_once <= 18, "two of twenty places stay free"
        found = await answers(client, batch.output_file_id)
        assert list(found) == names
        for name in names:
            assert found[name]["response"]["body"]["echo"][0]["content"] == name
        assert {body["vllm_xargs"]["hexgen_class"] for body in one.bodies} == {"batch"}
        assert set(one.keys) == {"Bearer k"}
        with pytest.raises(openai.AuthenticationError):
            await sdk(one, "other").batches.list()


async def test_what_a_dying_engine_says_is_no_answer(tmp_path: Path) -> None:
    """Its requests are there for the next one, and so are those that it had not begun."""
    async with engine(tmp_path, deadly="r3") as one, sdk(one) as client:
        batch = await begun(client, lines(*(f"r{i}" for i in range(30))))
        while not one.client.errored:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
    async with engine(tmp_path) as one, sdk(one) as client:
        batch = await ended(client, batch)
        assert batch.request_counts.model_dump() == {"total": 30, "completed": 30, "failed": 0}
        found = await answers(client, batch.output_file_id)
        assert list(found) == [f"r{i}" for i in range(30)]
        assert {one["response"]["status_code"] for one in found.values()} == {200}


async def test_batches_are_off_without_a_folder(tmp_path: Path) -> None:
    async with engine(None) as one, sdk(one) as client:
        with pytest.raises(openai.NotFoundError):
            await client.batches.list()


async def test_bad_requests_get_an_error_object(tmp_path: Path) -> None:
    async with engine(tmp_path) as one, sdk(one) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.create(file=("a", b"a"), purpose="nonsense")  # type: ignore[arg-type]
        assert caught.value.param == "purpose"
        with pytest.raises(openai.NotFoundError):
            await client.files.content("file-nope")
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(
                input_file_id="x", endpoint="/v1/load_lora_adapter",  # type: ignore[arg-type]
                completion_window="24h",
            )  # fmt: skip


def test_a_folder_that_cannot_be_used_is_said_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="batch_dir"):
        check_folder(tmp_path / "file")
    check_folder(tmp_path / "new" / "one")
    assert StoreLimits(tmp_path).max_requests == 50_000
