"""ASGI middleware of vLLM's HTTP server: our headers, ``/hexgen/stats`` and our metrics.

* ``x-hexgen-*`` headers of a generation request become ``hexgen_*`` keys of the body's
  ``vllm_xargs``, which vLLM carries to the scheduler. A header wins over the key of that name.
  What cannot be read is the client's error: 400 with an OpenAI error object naming the field.
* ``GET /hexgen/stats`` is the scheduler's telemetry as JSON; with several data-parallel ranks,
  ``{"ranks": [...]}`` has that of each. With vLLM's ``--api-key`` it needs such a key.
* ``GET /metrics`` gets the same telemetry as ``hexgen_vllm_*`` metrics after vLLM's own.
* ``/v1/files`` and ``/v1/batches`` are OpenAI's, with ``--hexgen-batch-dir``: see
  :mod:`hexgen_vllm.engine.server.batches`.
* What the router asks on its own account, several times a second, is left out of the access log
  unless the answer is an error. Other clients' requests of the same paths are logged.

Everything else, and every response to a generation request, passes through untouched.
Bodies: prompts are long and bodies are mostly prompt, so that a body is parsed only when it brings
``vllm_xargs`` of its own. Otherwise the member is spliced in before the closing brace: this
neither mends a malformed body nor breaks a well-formed one.

``service_tier`` ``flex`` or ``batch`` says that nobody waits for the answer; the second is not in
vLLM's list and goes on as the first.

vllm-router passes ``vllm_xargs.agentic_context`` on as a nested object, which vLLM refuses; it is
read and taken out, so that our scheduler works behind that router.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.engine.server import batches
from hexgen_vllm.engine.server.stats_api import StatsReader, StatsUnavailable
from hexgen_vllm.errors import BadRequest, error_object
from hexgen_vllm.keys import shows

PREFIX: Final = "hexgen_vllm_"
_HOST_KV_BY_REASON: Final = {
    "dropped_tokens": ("host_kv_dropped_tokens_total", "Saved tokens never loaded, by reason."),
    "refused_tokens": ("host_kv_refused_tokens_total", "Tokens not saved, by reason."),
}
METRICS_PATH: Final = "/metrics"
MAX_BODY_BYTES: Final = 64 * 2**20
"""Longest body that is looked into. vLLM itself sets no limit, so a longer one without our
headers passes unread; with them it is refused."""
_FIRST_ERROR: Final = 400
_PREFIX: Final = wire.HEADER_PREFIX.encode()
_NEGOTIATION: Final = (b"accept", b"accept-encoding")
# Snapshot field -> metric name, kind, help.
_SINGLE: Final = {
    "running": ("running", "gauge", "Calls in the batch."),
    "waiting": ("waiting", "gauge", "Calls queued in the engine."),
    "kv_usage": ("kv_usage_ratio", "gauge", "Share of KV blocks in use, 0 to 1."),
    "kv_tokens": ("kv_tokens", "gauge", "Tokens that the KV cache holds."),
    "max_num_seqs": ("max_num_seqs", "gauge", "Calls that the batch can hold."),
    "prefill_share": ("prefill_time_ratio", "gauge", "Share of recent busy time on prefill."),
    "fit_error": ("step_cost_error_ratio", "gauge", "Median relative error of the step-cost fit."),
    "steps": ("steps_total", "counter", "Steps that computed something."),
    "recomputed_tokens": (
        "recomputed_tokens_total",
        "counter",
        "Tokens computed again after a preemption.",
    ),
    "let_go_blocks": (
        "let_go_blocks_total",
        "counter",
        "KV blocks of workflows that were over, to be evicted before all others.",
    ),
    "batch_tokens_given_up": (
        "batch_tokens_given_up_total",
        "counter",
        "Tokens that calls without deadline did not write because others could not bear it.",
    ),
    "length_error": (
        "length_error_ratio",
        "gauge",
        "Mean relative error of the output lengths expected lately.",
    ),
    "bad_metadata": ("bad_metadata_total", "counter", "Metadata values that could not be read."),
}
# The same for the fields of the snapshot's ``host_kv``.
_HOST_KV: Final = {
    "capacity_bytes": ("host_kv_capacity_bytes", "gauge", "Host memory for preempted calls' KV."),
    "used_bytes": ("host_kv_used_bytes", "gauge", "Host memory that holds preempted calls' KV."),
    "copies": ("host_kv_copies", "gauge", "Preempted calls whose KV is in host memory."),
    "saved_tokens": ("host_kv_saved_tokens_total", "counter", "Tokens whose KV was saved."),
    "saved_bytes": ("host_kv_saved_bytes_total", "counter", "Bytes of KV that were saved."),
    "restored_tokens": ("host_kv_restored_tokens_total", "counter", "Tokens whose KV was loaded."),
    "restored_bytes": ("host_kv_restored_bytes_total", "counter", "Bytes of KV that were loaded."),
    "cached_tokens": (
        "host_kv_cached_tokens_total",
        "counter",
        "Saved tokens that the prefix cache still held when they were wanted.",
    ),
    "save_bytes_per_s": ("host_kv_save_bytes_per_second", "gauge", "Bandwidth of saves."),
    "restore_bytes_per_s": ("host_kv_restore_bytes_per_second", "gauge", "Bandwidth of loads."),
}


def _escaped(value: object) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _labelled(labels: Mapping[str, object]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


class _Page:
    """Metrics in order, each with the samples of all ranks together."""

    def __init__(self) -> None:
        self.labels: Mapping[str, object] = {}  # that every sample gets
        self._families: dict[str, list[str]] = {}

    def metric(
        self, name: str, kind: str, text: str, samples: Mapping[tuple[str, str] | None, Any]
    ) -> None:
        """Add samples, keyed by their own label; ``None`` values are left out."""
        known = {label: value for label, value in samples.items() if value is not None}
        if not known:
            return
        head = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
        lines = self._families.setdefault(name, head)
        for label, value in known.items():
            own = {label[0]: label[1]} if label is not None else {}
            lines.append(f"{PREFIX}{name}{_labelled({**self.labels, **own})} {value}")

    def text(self) -> str:
        """Return the page."""
        return "\n".join(line for lines in self._families.values() for line in lines) + "\n"


def exposition(*snapshots: Mapping[str, Any]) -> str:
    """Return the metrics of an engine; what it does not know is left out.

    Args:
        snapshots: as :func:`hexgen_vllm.engine.telemetry.snapshot` returns them, one for each
            data-parallel rank. With several, samples say whose they are as vLLM's own do, by
            ``engine``.
    """
    page = _Page()
    for rank, snapshot in enumerate(snapshots):
        if len(snapshots) > 1:
            page.labels = {"engine": snapshot.get("engine", rank)}
        _add(page, snapshot)
    return page.text()


def _add(page: _Page, snapshot: Mapping[str, Any]) -> None:
    page.metric("info", "gauge", "Always 1; the order in force.", {("order", snapshot["order"]): 1})
    for field, (name, kind, text) in _SINGLE.items():
        page.metric(name, kind, text, {None: snapshot.get(field)})
    page.metric(
        "preemptions_total",
        "counter",
        "Preemptions by cause.",
        {("cause", cause): n for cause, n in snapshot["preemptions"].items()},
    )
    page.metric(
        "step_cost",
        "gauge",
        "Coefficients of the fitted step cost, in seconds.",
        {("coefficient", name): v for name, v in (snapshot["cost"] or {}).items()},
    )
    bounds = [*map(str, snapshot["slack_bounds_s"]), "+Inf"]
    page.metric(
        "slack_calls",
        "gauge",
        "Running and waiting calls whose slack is at most le seconds.",
        {("le", b): n for b, n in zip(bounds, accumulate(snapshot["slack_counts"]), strict=True)},
    )
    if snapshot.get("host_kv"):
        _add_host_kv(page, snapshot["host_kv"])


def _add_host_kv(page: _Page, host_kv: Mapping[str, Any]) -> None:
    for field, (name, kind, text) in _HOST_KV.items():
        page.metric(name, kind, text, {None: host_kv.get(field)})
    for field, (name, text) in _HOST_KV_BY_REASON.items():
        by_reason = host_kv.get(field, {}).items()
        page.metric(name, "counter", text, {("reason", reason): n for reason, n in by_reason})


AsgiScope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]
GENERATION: Final = frozenset(
    (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
    )
)


_ACCESS_LOG: Final = logging.getLogger("uvicorn.access")
_polled: Final[ContextVar[bool]] = ContextVar("hexgen_polled", default=False)


class _Polls(logging.Filter):
    """Keeps answered polls of the router out of the access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written; uvicorn's last argument is the status."""
        status = record.args[-1] if isinstance(record.args, tuple) and record.args else None
        return not (_polled.get() and isinstance(status, int) and status < _FIRST_ERROR)


class HexgenMiddleware:
    """See the module; vLLM makes one for each HTTP server (``--middleware``)."""

    def __init__(self, app: App, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        """Wrap ``app``; bodies of more than ``max_body_bytes`` are not looked into."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._stats = StatsReader()
        self._batches: batches.EngineBatches | None = None
        if not any(isinstance(one, _Polls) for one in _ACCESS_LOG.filters):
            _ACCESS_LOG.addFilter(_Polls())

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Handle one connection as the ASGI specification says."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _polled.set(_is_poll(scope))  # uvicorn writes the line in this same context
        await self._handler(scope)(scope, receive, send)

    async def _live(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Run batches for as long as the server lives."""
        server = scope.get("app")
        where = batches.folder(getattr(server, "state", None))
        if where is not None:
            self._batches = batches.opened(self, server, where, tuple(_keys(server)))
        try:
            await self._app(scope, receive, send)
        finally:
            if self._batches is not None:
                await self._batches.close()

    async def _send_batches(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if not _may_see(scope):
            await _send_error(send, _no_key())
        elif self._batches is not None:
            try:
                await self._batches.answer(scope, receive, send)
            except BadRequest as error:
                await _send_error(send, error)
            except ConnectionAbortedError:
                pass

    def _handler(self, scope: AsgiScope) -> App:
        route = (scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        if route == ("GET", wire.STATS_PATH):
            return self._send_stats
        if route == ("GET", METRICS_PATH):
            return self._send_metrics
        if self._batches is not None and batches.is_ours(route[1]):
            return self._send_batches
        return self._generate if route[0] == "POST" and route[1] in GENERATION else self._app

    async def _generate(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            said = wire.from_headers(_our_headers(scope))
            pieces, more = await _read_body(receive, self._max_body_bytes)
            if not more:
                body = wire.with_fields(b"".join(pieces), said)
                scope, pieces = _with_length(scope, len(body)), [body]
            elif said != wire.CallMeta():
                raise _too_large(self._max_body_bytes)
        except BadRequest as error:
            await _send_error(send, error)
        except ConnectionAbortedError:
            pass
        else:
            await self._app(scope, _replay(pieces, more, receive), send)

    async def _send_stats(self, scope: AsgiScope, _: Receive, send: Send) -> None:
        if not _may_see(scope):
            await _send_error(send, _no_key())
            return
        try:
            snapshots = await self._stats.read(_engine_client(scope))
            one = len(snapshots) == 1
            await _send_json(send, 200, snapshots[0] if one else {"ranks": snapshots})
        except StatsUnavailable as error:
            refusal = BadRequest(str(error), status=error.status, code="stats_unavailable")
            await _send_error(send, refusal)

    async def _send_metrics(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            snapshots = await self._stats.read(_engine_client(scope))
        except StatsUnavailable:
            extra = b""  # vLLM's own metrics must not suffer
        else:
            extra = exposition(*snapshots).encode()
        # Without these headers the answer is plain text that can be appended to.
        headers = [(name, value) for name, value in scope["headers"] if name not in _NEGOTIATION]
        await self._app({**scope, "headers": headers}, receive, _appending(send, extra))


def _is_poll(scope: AsgiScope) -> bool:
    return scope["method"] == "GET" and (b"user-agent", wire.POLLER.encode()) in scope["headers"]


def _our_headers(scope: AsgiScope) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name.startswith(_PREFIX)
    }


def _may_see(scope: AsgiScope) -> bool:
    """Return whether a request shows one of vLLM's own ``--api-key`` keys, if there are any.

    vLLM guards only its own paths, and looks after this middleware.
    """
    keys = _keys(scope["app"])
    if not keys:
        return True
    headers: dict[bytes, bytes] = dict(scope["headers"])
    return shows(headers.get(b"authorization", b""), keys)


def _keys(server: Any) -> list[str]:
    given = getattr(getattr(server.state, "args", None), "api_key", None)
    return [key for key in (given or [os.environ.get("VLLM_API_KEY")]) if key]


def _no_key() -> BadRequest:
    return BadRequest("A valid API key is needed.", status=401, code="invalid_api_key")


def _engine_client(scope: AsgiScope) -> Any:
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


def _with_length(scope: AsgiScope, length: int) -> AsgiScope:
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


async def _send_error(send: Send, error: BadRequest) -> None:
    content = error_object(str(error), error.status, param=error.param, code=error.code)
    await _send_json(send, error.status, content)


async def _send_json(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content, allow_nan=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
