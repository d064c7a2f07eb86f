"""``/v1/files`` and ``/v1/batches`` of one engine: ``--hexgen-batch-dir DIR``.

Requests of a batch go into vLLM's own application, through our middleware, as calls of class
``batch``: no socket, the same answers. Of several API servers of one engine one sends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

from hexgen_vllm import wire
from hexgen_vllm.batches.api import BATCHES, FILES, ApiReply, Asked, BatchApi, BatchClient
from hexgen_vllm.batches.lines import BatchRequest
from hexgen_vllm.batches.runner import LineAnswer, Runner
from hexgen_vllm.batches.store import BatchJob, Disk, StoreLimits
from hexgen_vllm.errors import BadRequest, ConfigError

_LOG = logging.getLogger(__name__)
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[Any, _Receive, _Send], Awaitable[None]]
OWNER: Final = BatchClient("default", "default")
SERVED: Final = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/score",
        "/rerank",
        "/pooling",
        "/classify",
        "/inference/v1/generate",
    )
)
"""Paths that take batches."""

_PIECE_BYTES: Final = 2**18
_MOST_UNKNOWN: Final = 230
_FREE_SHARE: Final = 10  # one in so many places of the engine's batch stays free for other calls
_DEATH_S: Final = 60.0  # after an engine has died its server ends; until then nothing is an answer


def is_ours(path: str) -> bool:
    """Whether a path is about files or batches."""
    return any(path == own or path.startswith(f"{own}/") for own in (FILES, BATCHES))


def folder(state: Any) -> str | None:
    """Return where an engine keeps batches, from the state of vLLM's application."""
    given = getattr(getattr(state, "args", None), "additional_config", None)
    ours = given.get("hexgen") if isinstance(given, Mapping) else None
    found = ours.get("batch_dir") if isinstance(ours, Mapping) else None
    return found if isinstance(found, str) and found else None


class EngineBatches:
    """Files and batches of one engine.

    Args:
        app: answers requests, as ASGI says.
        server: vLLM's application.
        where: folder of the store.
        keys: one of which the application wants to see.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, app: _App, server: Any, where: str, keys: tuple[str, ...]) -> None:
        self._app, self._server, self._keys = app, server, keys
        self._disk = Disk(StoreLimits(Path(where)))
        self._runner = Runner(self._disk, self, SERVED.__contains__, dies_with=True)
        self._api = BatchApi(self._disk, SERVED.__contains__, self._runner.wake)
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send."""
        self._running = asyncio.create_task(self._runner.run())

    async def close(self) -> None:
        """Send no more, and close the store."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))
        await asyncio.to_thread(self._disk.close)

    # HTTP

    async def answer(self, scope: Any, receive: _Receive, send: _Send) -> None:
        """Answer a request about files or batches.

        Raises:
            BadRequest: it is wrong, or what it is about is not there.
        """
        names: dict[str, str] = {}
        for name, value in scope["headers"]:
            names.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        pieces = _pieces(receive)
        reply = await self._api.answer(Asked(scope["method"], path, query, names, OWNER, pieces))
        if reply.path is None:
            body = json.dumps(reply.content).encode()
            await send(_start(200, "application/json", len(body)))
            await send({"type": "http.response.body", "body": body})
        else:
            await self._send_file(reply, reply.path, send)

    async def _send_file(self, reply: ApiReply, path: Path, send: _Send) -> None:
        try:
            file: Any = await self._disk.with_file(path.open, "rb")
        except FileNotFoundError:
            raise BadRequest("The content of this file is gone.", status=404) from None
        try:
            await send(_start(200, "application/octet-stream", reply.size))
            while data := await self._disk.with_file(file.read, _PIECE_BYTES):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._disk.with_file(file.close)

    # For the runner

    async def send(self, batch: BatchJob, request: BatchRequest, request_id: str) -> LineAnswer:
        """Return the engine's answer to a request of a batch.

        Raises:
            OSError: it broke off.
        """
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(request.body)).encode()),
            (wire.header_name("service_class").encode(), wire.BATCH.encode()),
        ]
        if self._keys:
            headers.append((b"authorization", b"Bearer " + self._keys[0].encode("latin-1")))
        call = _Call(request, headers, self._server)
        try:
            await self._app(call.scope, call.receive, call.send)
        except Exception as error:
            if not self._dead():
                raise ConnectionResetError(str(error)) from error
        if self._dead() and call.status >= 500:
            # What was in flight says nothing of itself: whoever starts next sends it again.
            await asyncio.sleep(_DEATH_S)
        return call.answer(request_id)

    def _dead(self) -> bool:
        client = getattr(self._server.state, "engine_client", None)
        return bool(getattr(client, "errored", False))

    def has_room(self, in_flight: int) -> bool:
        """Return that there is: what waits in the engine lets everybody else go first."""
        return not self._dead()

    def most(self) -> int:
        """Return how many calls may be in flight at most."""
        config = getattr(getattr(self._server.state, "engine_client", None), "vllm_config", None)
        slots = getattr(getattr(config, "scheduler_config", None), "max_num_seqs", None)
        ranks = getattr(getattr(config, "parallel_config", None), "data_parallel_size", 1)
        if not isinstance(slots, int) or not isinstance(ranks, int):
            return _MOST_UNKNOWN
        return (slots - slots // _FREE_SHARE) * max(ranks, 1)


class _Call:
    """One request of a batch, as an application sees it."""

    def __init__(
        self, request: BatchRequest, headers: list[tuple[bytes, bytes]], server: Any
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": request.url,
            "raw_path": request.url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
            "app": server,
        }
        self.status = 500
        self._body: bytes | None = request.body
        self._said: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []

    async def receive(self) -> _Message:
        """Give the body once; nobody leaves after that."""
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: _Message) -> None:
        """Take in a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            self._said = {name.lower(): value for name, value in message.get("headers", ())}
        elif message["type"] == "http.response.body":
            self._pieces.append(message.get("body", b""))

    def answer(self, request_id: str) -> LineAnswer:
        """Return the answer."""
        return LineAnswer.of(self.status, self._said, b"".join(self._pieces), request_id)


async def _pieces(receive: _Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError
        more = message.get("more_body", False)
        if body := message.get("body", b""):
            yield body


def _start(status: int, kind: str, length: int) -> _Message:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(length).encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def opened(app: _App, server: Any, where: str, keys: tuple[str, ...]) -> EngineBatches | None:
    """Return the batches of a server, running, ``None`` where they cannot be had."""
    try:
        found = EngineBatches(app, server, where, keys)
    except ConfigError as error:
        _LOG.error("batches are off: %s", error)
        return None
    found.start()
    return found
