"""A server that answers like OpenAI's and remembers what it was sent."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from .recorder import ANSWERS, CHUNK, Recorder


@pytest.fixture
async def server() -> AsyncIterator[Recorder]:
    recorder = Recorder()

    async def answer(request: web.Request) -> web.Response:
        ours = {
            name.lower().removeprefix("x-hexgen-"): value
            for name, value in request.headers.items()
            if name.lower().startswith("x-hexgen-")
        }
        recorder.calls.append((request.path, ours))
        if recorder.failing:
            recorder.failing -= 1
            return web.json_response({}, status=503, headers={"retry-after-ms": "1"})
        told = {} if recorder.slack_ms is None else {"x-hexgen-slack-ms": recorder.slack_ms}
        if (await request.json()).get("stream"):
            return web.Response(body=CHUNK, content_type="text/event-stream", headers=told)
        return web.json_response(ANSWERS[request.path], headers=told)

    async def finish(request: web.Request) -> web.Response:
        recorder.finished.append(request.query["session_id"])
        recorder.tenants.append(request.headers.get("x-hexgen-tenant"))
        return web.json_response({}, status=recorder.finish_status)

    app = web.Application()
    app.router.add_post("/finish_session", finish)
    app.router.add_post("/{path:.*}", answer)
    async with TestServer(app) as running:
        recorder.url = str(running.make_url("/v1"))
        yield recorder
