"""Retries of an SDK say what is left of the deadline then, and not what the first try said.

An SDK makes the headers of a call once, and its retries repeat them. So its HTTP client gets a
hook that looks at each request when it is sent: a header tells it whose deadline the request has,
and does not leave the process.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.client.scope import Scope

MARK: Final = "hexgen-deadline-of"
_DEADLINE: Final = wire.header_name("workflow_deadline_ms")
_OPEN: Final[dict[str, Scope]] = {}


def follow(client: object, scope: Scope) -> str | None:
    """Let the HTTP client of an SDK's client refresh deadlines of ``scope``.

    Returns:
        The value of :data:`MARK` for its calls, to be given to :func:`forget`; ``None`` if
        ``client`` is built otherwise, so that its retries will repeat the deadline.
    """
    http: Any = getattr(client, "_client", None)
    hooks = getattr(http, "event_hooks", None)
    if not isinstance(hooks, dict):
        return None
    hook = _refresh_async if hasattr(http, "aclose") else _refresh
    if hook not in hooks.get("request", ()):
        http.event_hooks = {**hooks, "request": [*hooks.get("request", ()), hook]}
    mark = uuid.uuid4().hex
    _OPEN[mark] = scope
    return mark


def forget(mark: str | None) -> None:
    """Refresh the deadline of a scope no more."""
    if mark is not None:
        _OPEN.pop(mark, None)


def _refresh(request: Any) -> None:
    mark = request.headers.pop(MARK, None)
    left_ms = _OPEN[mark].remaining_ms() if mark in _OPEN else None
    if left_ms is not None and _DEADLINE in request.headers:
        request.headers.update(wire.to_headers(wire.CallMeta(workflow_deadline_ms=left_ms)))


async def _refresh_async(request: Any) -> None:
    _refresh(request)
