"""An ASGI server and an application without sockets, for the middleware's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hexgen_vllm.engine.server.middleware import (
    App,
    AsgiScope,
    Message,
    Receive,
    Send,
)


@dataclass
class Response:
    """What was sent: the start message's parts, and each body message."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Application:
    """Stands for vLLM: notes what it gets and answers with ``pieces``."""

    pieces: Sequence[bytes] = (b"answer",)
    status: int = 200
    scope: AsgiScope | None = None
    body: bytes = b""
    after: Message | None = None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        self.scope, more = scope, scope["type"] == "http"
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        self.after = await receive()
        length = str(sum(map(len, self.pieces))).encode()
        headers = [(b"Content-Length", length), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for left, piece in zip(range(len(self.pieces) - 1, -1, -1), self.pieces, strict=True):
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})

    @property
    def headers(self) -> dict[str, str]:
        assert self.scope is not None
        return {name.decode(): value.decode() for name, value in self.scope["headers"]}


async def request(
    app: App,
    method: str,
    path: str,
    *pieces: bytes,
    headers: Mapping[str, str] | None = None,
    engine_client: object = None,
    root_path: str = "",
    api_key: list[str] | None = None,
) -> Response:
    """Send one request to ``app`` and return its answer; a client without a piece has left."""
    given = {"content-length": str(sum(map(len, pieces))), **(headers or {})}
    args = SimpleNamespace(api_key=api_key)
    state = SimpleNamespace(engine_client=engine_client, args=args)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
        "app": SimpleNamespace(state=state),
    }
    coming = [
        {"type": "http.request", "body": piece, "more_body": n + 1 < len(pieces)}
        for n, piece in enumerate(pieces)
    ]
    response = Response()

    async def receive() -> Message:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {n.decode().lower(): v.decode() for n, v in message["headers"]}
        else:
            response.pieces.append(message["body"])

    await app(scope, receive, send)
    return response
