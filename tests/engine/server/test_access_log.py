"""The access log of a real uvicorn: without the router's polls, with everything else."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import aiohttp
import pytest
import uvicorn

from hexgen_vllm.engine.server.middleware import AsgiScope, HexgenMiddleware, Receive, Send
from hexgen_vllm.router.engines.probe import Probe, Unreachable
from hexgen_vllm.router.http.client import Pool
from hexgen_vllm.router.options import RouterOptions, Worker

MODELS = b'{"object": "list", "data": [{"id": "m"}]}'


async def application(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """Answer everything; ``/failing`` with 500, and after a task of its own as frameworks do."""
    if scope["type"] != "http":
        return
    await asyncio.create_task(asyncio.sleep(0))
    status = 500 if scope["path"] == "/failing" else 200
    headers = [(b"content-length", str(len(MODELS)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": MODELS})


class Written(logging.Handler):
    """Keeps method and path of each line of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.lines.append(" ".join(map(str, record.args[1:3])))


async def test_polls_of_the_router_are_not_logged() -> None:
    ours = HexgenMiddleware(application)

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        state = SimpleNamespace(engine_client=None, args=None)  # as Starlette has it
        await ours({**scope, "app": SimpleNamespace(state=state)}, receive, send)

    config = uvicorn.Config(app, port=0, lifespan="off")  # its logging set-up leaves the filter
    written = Written()
    logging.getLogger("uvicorn.access").addHandler(written)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        pool = Pool(5.0)
        async with aiohttp.ClientSession(skip_auto_headers=("User-Agent",)) as session:
            worker = Worker("a", f"http://127.0.0.1:{port}")
            probe = Probe(pool, RouterOptions())
            await probe.healthy(worker)
            await probe.models(worker)
            failing = Probe(pool, RouterOptions(health_check_endpoint="/failing"))
            with pytest.raises(Unreachable):
                await failing.healthy(worker)
            for path in ("/health", "/metrics", "/v1/models"):  # somebody else
                async with session.get(worker.url + path) as answer:
                    await answer.read()
            async with session.post(worker.url + "/v1/other", data=b"{}") as answer:
                await answer.read()
    finally:
        pool.close()
        server.should_exit = True
        await serving
        logging.getLogger("uvicorn.access").removeHandler(written)
    assert written.lines == [
        "GET /failing", "GET /health", "GET /metrics", "GET /v1/models", "POST /v1/other",
    ]  # fmt: skip


def test_the_filter_is_there_once() -> None:
    access = logging.getLogger("uvicorn.access")
    HexgenMiddleware(application)
    before = len(access.filters)
    HexgenMiddleware(application)
    assert len(access.filters) == before
