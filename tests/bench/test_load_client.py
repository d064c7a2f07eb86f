"""One endpoint: what is sent, what is read from good and bad answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from hexgen_vllm.bench.load_client import LoadClient, Model, find_model
from hexgen_vllm.bench.text import PromptSource
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.workload import CallSpec, Layer
from hexgen_vllm.testing.fake_server import FakeServer, Fault
from hexgen_vllm.wire import CallMeta

CALL = CallSpec("revise", 60, 12, (Layer("template:revise", 40),))
META = CallMeta(workflow_id="w", workflow_deadline_ms=1500.0, stage="revise")


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout) as opened:
        yield opened


def endpoint(session: aiohttp.ClientSession, url: str, **changes: Any) -> LoadClient:
    return LoadClient(session, url, "tiny", PromptSource(), SystemClock(), **changes)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_an_answer_has_the_forced_length(
    server: FakeServer, session: aiohttp.ClientSession, stream: bool, chat: bool
) -> None:
    sender = endpoint(session, server.url, stream=stream, chat=chat)
    answer = await sender.send("w", 0, CALL, META)
    assert answer.error is None
    assert answer.output_tokens == 12
    assert (answer.ttft_s is not None) == stream
    if answer.ttft_s is not None:
        assert 0 < answer.ttft_s <= answer.latency_s


async def test_the_request_forces_length_and_carries_the_workflow(
    server: FakeServer, session: aiohttp.ClientSession
) -> None:
    await endpoint(session, server.url).send("w", 3, CALL, META)
    (request,) = server.received
    body = json.loads(request.body)
    assert len(body.pop("prompt")) == 60
    assert body == {
        "model": "tiny",
        "max_tokens": 12,
        "min_tokens": 12,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    ours = {k: v for k, v in request.headers.items() if k.lower().startswith("x-hexgen-")}
    assert ours == {
        "x-hexgen-workflow-id": "w",
        "x-hexgen-workflow-deadline-ms": "1500.000",
        "x-hexgen-stage": "revise",
    }


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("status", status=503), "HTTP 503: as asked"),
        (Fault("status", status=500, body=b"<html>\nno\n</html>"), "HTTP 500: <html> no </html>"),
        (Fault("status", status=502, body=b""), "HTTP 502: no message"),
        (Fault("reset"), "Server"),
        (Fault("reset", after=3), "Client"),
        (Fault("cut", after=3), "the stream ended early"),
        (Fault("garbage"), "ClientResponseError"),
    ],
)
async def test_failures_are_told_apart(
    server: FakeServer, session: aiohttp.ClientSession, fault: Fault, error: str
) -> None:
    server.faults.append(fault)
    answer = await endpoint(session, server.url).send("w", 0, CALL, META)
    assert answer.error is not None
    assert answer.error.startswith(error)
    assert "\n" not in answer.error


async def test_a_server_that_hangs_times_out(server: FakeServer) -> None:
    server.faults.append(Fault("hang", after=2))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as session:
        answer = await endpoint(session, server.url).send("w", 0, CALL, META)
    assert answer.error == "timed out"
    assert answer.ttft_s is not None


async def test_an_endpoint_that_is_gone_is_an_error_of_the_call(
    session: aiohttp.ClientSession,
) -> None:
    answer = await endpoint(session, "http://127.0.0.1:1").send("w", 0, CALL, META)
    assert answer.error is not None
    assert "Connect" in answer.error


def events(*payloads: object) -> bytes:
    lines = [p if isinstance(p, str) else json.dumps(p) for p in payloads]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


CHUNK = {"choices": [{"index": 0, "text": "x"}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens}}


@pytest.mark.parametrize(
    ("stream", "tokens", "error"),
    [
        (events(CHUNK, usage(12), "[DONE]"), 12, None),
        (b": ping\n\nevent: x\n" + events(CHUNK, usage(12), "[DONE]"), 12, None),
        (events(CHUNK, "[DONE]"), 0, None),
        (events(CHUNK, usage(11), "[DONE]"), 11, "11 output tokens instead of 12"),
        (events(CHUNK, {"error": {"message": "engine died"}}, "[DONE]"), 0, "engine died"),
        (events(CHUNK, {"error": "plain"}), 0, "plain"),
        (events("{broken"), 0, "JSONDecodeError"),
        (events("7"), 0, "ValueError: the answer is not a JSON object"),
        (b"", 0, "the stream ended early"),
    ],
)
async def test_streams_are_read_to_their_end(
    session: aiohttp.ClientSession, stream: bytes, tokens: int, error: str | None
) -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(
            body=stream, content_type="text/event-stream", headers={"x-hexgen-engine": "fast"}
        )

    app = web.Application()
    app.router.add_post("/v1/completions", respond)
    async with TestServer(app) as running:
        url = str(running.make_url("")).rstrip("/")
        answer = await endpoint(session, url).send("w", 0, CALL, META)
    assert (answer.output_tokens, answer.engine) == (tokens, "fast")
    assert answer.error is None if error is None else str(answer.error).startswith(error)
    assert (answer.ttft_s is not None) == (b'"text"' in stream)


async def test_the_model_is_found(server: FakeServer, session: aiohttp.ClientSession) -> None:
    assert await find_model(session, server.url, None) == Model("tiny", 32768)
    assert await find_model(session, server.url, "tiny") == Model("tiny", 32768)
    with pytest.raises(ConfigError, match="does not serve big; it serves tiny"):
        await find_model(session, server.url, "big")


async def test_endpoints_that_cannot_be_used_are_named(session: aiohttp.ClientSession) -> None:
    with pytest.raises(
        ConfigError, match=r"http://127\.0\.0\.1:1 cannot be used: Connection refused\.$"
    ):
        await find_model(session, "http://127.0.0.1:1", None)

    async def odd(_: web.Request) -> web.Response:
        return web.json_response({"models": []})

    app = web.Application()
    app.router.add_get("/v1/models", odd)
    async with TestServer(app) as running:
        url = str(running.make_url("")).rstrip("/")
        with pytest.raises(ConfigError, match="did not answer with a list of models"):
            await find_model(session, url, None)
        with pytest.raises(ConfigError, match="404"):
            await find_model(session, f"{url}/deeper", None)


async def test_an_agentic_context_tells_the_workflow_in_the_body(
    server: FakeServer, session: aiohttp.ClientSession
) -> None:
    await endpoint(session, server.url, agentic_context=True).send("w", 0, CALL, META)
    (request,) = server.received
    assert json.loads(request.body)["vllm_xargs"]["agentic_context"] == {
        "program_id": "w",
        "task_id": "w",
        "agent_role": "revise",
        "deadline_seconds": 1.5,
    }
