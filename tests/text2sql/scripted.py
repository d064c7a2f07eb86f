"""An OpenAI server whose answers depend on the stage that a call says it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Body = dict[str, Any]
Says = str | Callable[[Body], str]


class Scripted:
    """A server; ``answers`` holds for each stage what it says, or the function that decides.

    Attributes:
        calls: stage, headers and body of every call, in order of arrival.
        finished: ids of workflows whose end was announced.
        broken: stages whose calls fail with a 400.
        slack_ms: how workflows stand, as told with every answer.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Says] = {}
        self.calls: list[tuple[str, dict[str, str], Body]] = []
        self.finished: list[str] = []
        self.broken: set[str] = set()
        self.slack_ms: str | None = None
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/finish_session", self._finish)
        self._server = TestServer(app)

    async def __aenter__(self) -> Scripted:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        """Base URL for a client."""
        return str(self._server.make_url("/v1"))

    def stages(self) -> list[str]:
        """Return the stages of the calls."""
        return [stage for stage, _, _ in self.calls]

    def prompts(self, stage: str) -> list[str]:
        """Return what the calls of a stage asked."""
        return [body["messages"][1]["content"] for name, _, body in self.calls if name == stage]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def _finish(self, request: web.Request) -> web.Response:
        self.finished.append(request.query["session_id"])
        return web.json_response({})

    async def _answer(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        headers = {name.lower(): value for name, value in request.headers.items()}
        stage = headers["x-hexgen-stage"]
        self.calls.append((stage, headers, body))
        if stage in self.broken:
            return web.json_response({"error": {"message": "as asked"}}, status=400)
        says = self.answers.get(stage, "")
        text = says if isinstance(says, str) else says(body)
        choice = {"index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": text}}  # fmt: skip
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m",
             "choices": [choice], "usage": usage},
            headers={} if self.slack_ms is None else {"x-hexgen-slack-ms": self.slack_ms},
        )  # fmt: skip


def fenced(sql: str) -> str:
    """Return ``sql`` as models write it."""
    return f"The plan is simple.\n```sql\n{sql};\n```"
