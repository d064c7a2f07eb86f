"""ASGI middleware of vLLM's HTTP server: our headers, ``/hexgen/stats`` and our metrics.

* ``x-hexgen-*`` headers of a generation request become ``hexgen_*`` keys of the body's
  ``vllm_xargs``, which vLLM carries to the scheduler. A header wins over the key of that name.
  What cannot be read is the client's error: 400 with an OpenAI error object naming the field.
* ``GET /hexgen/stats`` is the scheduler's telemetry as JSON; with several data-parallel ranks,
  ``{"ranks": [...]}`` has that of each. With vLLM's ``--api-key`` it needs such a key.
* ``GET /metrics`` gets the same telemetry as ``hexgen_vllm_*`` metrics after vLLM's own.

Everything else, and every response to a generation request, passes through untouched.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.engine import request_body
from hexgen_vllm.engine.exposition import exposition
from hexgen_vllm.engine.stats_api import StatsReader, StatsUnavailable
from hexgen_vllm.errors import BadRequest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATION: Final = frozenset(
    (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
    )
)
STATS_PATH: Final = "/hexgen/stats"
METRICS_PATH: Final = "/metrics"
MAX_BODY_BYTES: Final = 64 * 2**20
"""Longest body that is looked into. vLLM itself sets no limit, so a longer one without our
headers passes unread; with them it is refused."""

_PREFIX: Final = wire.HEADER_PREFIX.encode()
_NEGOTIATION: Final = (b"accept", b"accept-encoding")


class HexgenMiddleware:
    """See the module; vLLM makes one for each HTTP server (``--middleware``)."""

    def __init__(self, app: App, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        """Wrap ``app``; bodies of more than ``max_body_bytes`` are not looked into."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._stats = StatsReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection as the ASGI specification says."""
        handle = self._handler(scope) if scope["type"] == "http" else self._app
        await handle(scope, receive, send)

    def _handler(self, scope: Scope) -> App:
        route = (scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        if route == ("GET", STATS_PATH):
            return self._send_stats
        if route == ("GET", METRICS_PATH):
            return self._send_metrics
        return self._generate if route[0] == "POST" and route[1] in GENERATION else self._app

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            said = wire.from_headers(_our_headers(scope))
            pieces, more = await _read_body(receive, self._max_body_bytes)
            if not more:
                body = request_body.with_fields(b"".join(pieces), said)
                scope, pieces = _with_length(scope, len(body)), [body]
            elif said != wire.CallMeta():
                raise _too_large(self._max_body_bytes)
        except BadRequest as error:
            await _send_json(send, error.status, openai_error(error))
        except ConnectionAbortedError:
            pass
        else:
            await self._app(scope, _replay(pieces, more, receive), send)

    async def _send_stats(self, scope: Scope, _: Receive, send: Send) -> None:
        if not _may_see(scope):
            refusal = BadRequest("A valid API key is needed.", status=401, code="invalid_api_key")
            await _send_json(send, 401, openai_error(refusal))
            return
        try:
            snapshots = await self._stats.read(_engine_client(scope))
            one = len(snapshots) == 1
            await _send_json(send, 200, snapshots[0] if one else {"ranks": snapshots})
        except StatsUnavailable as error:
            refusal = BadRequest(str(error), status=error.status, code="stats_unavailable")
            await _send_json(send, error.status, openai_error(refusal))

    async def _send_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            snapshots = await self._stats.read(_engine_client(scope))
        except StatsUnavailable:
            extra = b""  # vLLM's own metrics must not suffer
        else:
            extra = exposition(*snapshots).encode()
        # Without these headers the answer is plain text that can be appended to.
        headers = [(name, value) for name, value in scope["headers"] if name not in _NEGOTIATION]
        await self._app({**scope, "headers": headers}, receive, _appending(send, extra))


def _our_headers(scope: Scope) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name.startswith(_PREFIX)
    }


def _may_see(scope: Scope) -> bool:
    """Return whether a request shows one of vLLM's own ``--api-key`` keys, if there are any.

    vLLM guards only its own paths, and looks after this middleware.
    """
    given = getattr(getattr(scope["app"].state, "args", None), "api_key", None)
    keys = [key for key in (given or [os.environ.get("VLLM_API_KEY")]) if key]
    if not keys:
        return True
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
    # Digests of one length, and every key: the time must not tell which one came close.
    found = hashlib.sha256(shown.strip()).digest()
    known = [hmac.compare_digest(found, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == b"bearer" and any(known)


def _engine_client(scope: Scope) -> Any:
    return getattr(scope["app"].state, "engine_client", None)


async def _read_body(receive: Receive, limit: int) -> tuple[list[bytes], bool]:
    """Return the body's pieces, and whether there is more because it is longer than ``limit``.

    Raises:
        ConnectionAbortedError: the client left.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        more = message.get("more_body", False)
    return pieces, more


def _replay(pieces: list[bytes], more: bool, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``pieces`` first and then what is still to come."""
    waiting = list(reversed(pieces))

    async def replay() -> Message:
        if not waiting:
            return await receive()
        body = waiting.pop()
        return {"type": "http.request", "body": body, "more_body": bool(waiting) or more}

    return replay


def _with_length(scope: Scope, length: int) -> Scope:
    written = str(length).encode()
    headers = [(n, written if n == b"content-length" else v) for n, v in scope["headers"]]
    return {**scope, "headers": headers}


def _too_large(limit: int) -> BadRequest:
    return BadRequest(
        f"The body must have at most {limit} bytes for {wire.HEADER_PREFIX}* headers to be read.",
        status=413,
        code="body_too_large",
    )


def _appending(send: Send, extra: bytes) -> Send:
    """Return a ``send`` that adds ``extra`` to the end of a 200 response."""
    ok = False

    async def appending(message: Message) -> None:
        nonlocal ok
        if message["type"] == "http.response.start":
            ok = message["status"] == 200
            if ok:
                headers = [(n, v) for n, v in message["headers"] if n.lower() != b"content-length"]
                message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and ok and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + extra}
        await send(message)

    return appending


def openai_error(error: BadRequest) -> dict[str, Any]:
    """Return the OpenAI error object that says what ``error`` says."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    inner = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": inner}


async def _send_json(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content, allow_nan=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
