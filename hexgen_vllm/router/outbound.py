"""Headers between client, router and engine.

| kind of engine | is told |
|---|---|
| ours | every ``x-hexgen-*`` field that is known, deadline and tail as remaining milliseconds |
| stock, priority scheduling | ``X-Vllm-Priority``: due time, so that it serves earliest due first |
| stock, FCFS | nothing |

All are told the session and the request id. A client's own ``X-Vllm-Priority`` reaches engines of
which it is not known that they schedule by priority.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from multidict import CIMultiDict
from yarl import URL

from hexgen_vllm import wire
from hexgen_vllm.router.http_request import Pairs
from hexgen_vllm.router.intake import Accepted
from hexgen_vllm.types import EngineKind, Placement

ENGINE_HEADER: Final = "x-hexgen-engine"
REQUEST_ID_HEADER: Final = "x-request-id"
SERVER: Final = "hexgen-vllm"
SESSION_HEADER: Final = "X-Session-ID"
PRIORITY_HEADER: Final = "X-Vllm-Priority"
# A step of client priority outranks every difference in due time: 1e12 ms are 31 years.
PRIORITY_STEP: Final = 10**12

LEAST_DEADLINE_S: Final = 0.001

_HOP_BY_HOP: Final = (
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
# The body arrives decoded and events must be readable; lengths are written anew.
_NOT_TO_ENGINE: Final = frozenset(
    (
        *_HOP_BY_HOP,
        "accept-encoding",
        "content-encoding",
        "content-length",
        "expect",
        "host",
    )
)
_NOT_TO_CLIENT: Final = frozenset(
    (*_HOP_BY_HOP, "content-length", "date", "server", REQUEST_ID_HEADER)
)


_NOT_IN_HEAD: Final = frozenset(
    name.encode() for name in (*_HOP_BY_HOP, "content-length", "server", REQUEST_ID_HEADER)
)


def _kept(headers: Mapping[str, str], dropped: frozenset[str]) -> CIMultiDict[str]:
    named = headers.get("connection", "")
    if "," in named or named.lower() not in ("", "keep-alive", "close"):
        dropped = dropped | {name.strip().lower() for name in named.split(",")}
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in dropped)


def plain_to_engine(
    headers: Mapping[str, str], request_id: str, engine_api_key: str | None
) -> CIMultiDict[str]:
    """Return the headers for a request that no policy sees."""
    out = _kept(headers, _NOT_TO_ENGINE)
    for name in [name for name in out if name.lower().startswith(wire.HEADER_PREFIX)]:
        del out[name]
    out[REQUEST_ID_HEADER] = request_id
    out["Accept-Encoding"] = "identity"
    if engine_api_key is not None:
        out["Authorization"] = f"Bearer {engine_api_key}"
    return out


def to_engine(
    accepted: Accepted,
    placement: Placement,
    kind: EngineKind,
    *,
    now: float,
    epoch: float,
    request_id: str,
    engine_api_key: str | None = None,
) -> CIMultiDict[str]:
    """Return the headers of a call for its engine.

    Args:
        accepted: the call and the client's headers.
        placement: what was decided.
        kind: what the engine understands.
        now: time of sending.
        epoch: time that stock priorities count from.
        request_id: sent as ``x-request-id``.
        engine_api_key: replaces the client's key.
    """
    out = plain_to_engine(accepted.headers, request_id, engine_api_key)
    if accepted.session_id is not None and SESSION_HEADER not in out:
        out[SESSION_HEADER] = accepted.session_id
    if kind is EngineKind.HEXGEN:
        out.update(wire.to_headers(_meta(accepted, placement, now)))
    elif kind is EngineKind.PRIORITY:
        out[PRIORITY_HEADER] = str(stock_priority(placement.due_s - epoch, accepted.priority))
    return out


def stock_priority(due_in_s: float, priority: int) -> int:
    """Return vLLM's priority number: lower is sooner.

    Args:
        due_in_s: due time since the router's epoch; ``inf`` comes last.
        priority: the client's, higher is sooner; it outranks due time.
    """
    half = PRIORITY_STEP // 2 - 1
    due_ms = half if math.isinf(due_in_s) else int(max(-half, min(half, due_in_s * 1000.0)))
    return due_ms - priority * PRIORITY_STEP


def _meta(accepted: Accepted, placement: Placement, now: float) -> wire.CallMeta:
    call = accepted.call
    known = placement.deadline_s < math.inf
    # The wire has no negative deadline. What is overdue goes into the tail: deadline minus tail,
    # which engines order by, stays what it is.
    overdue_s = max(now + LEAST_DEADLINE_S - placement.deadline_s, 0.0)
    return wire.CallMeta(
        workflow_id=accepted.session_id,
        workflow_type=call.workflow_type,
        workflow_deadline_ms=_ms(placement.deadline_s + overdue_s - now) if known else None,
        stage=call.stage,
        stages_left=call.stages_left,
        expected_output_tokens=placement.expected_output_tokens or None,
        workflow_final=call.final or None,
        tenant=call.tenant,
        tail_ms=_ms(placement.tail_s + overdue_s),
        background=placement.background or None,
    )


def _ms(seconds: float) -> float:
    return min(seconds * 1000.0, wire.MAX_TIME_MS)


def to_client(headers: Mapping[str, str], engine: str, request_id: str) -> CIMultiDict[str]:
    """Return the headers of an engine's answer for the client."""
    out = _kept(headers, _NOT_TO_CLIENT)
    out["Server"] = SERVER
    out[ENGINE_HEADER] = engine
    out[REQUEST_ID_HEADER] = request_id
    return out


def request_head(url: URL, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a POST request with a body of ``length`` bytes."""
    host = url.raw_host or ""
    where = f"[{host}]" if ":" in host else host
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return (
        f"POST {url.raw_path_qs} HTTP/1.1\r\nHost: {where}:{url.port}\r\n{lines}"
        f"Content-Length: {length}\r\n\r\n"
    ).encode("utf-8", "surrogateescape")


def answer_head(pairs: Pairs, engine: str, request_id: str) -> list[bytes]:
    """Return the header lines of an engine's answer for the client, without a length."""
    dropped = _NOT_IN_HEAD
    lines = []
    for name, value in pairs:
        key = name.lower()
        if key == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            dropped = dropped | {one.strip().lower() for one in value.split(b",")}
        if key not in dropped:
            lines.append(b"%b: %b\r\n" % (name, value))
    said = f"Server: {SERVER}\r\n{ENGINE_HEADER}: {engine}\r\n{REQUEST_ID_HEADER}: {request_id}\r\n"
    lines.append(said.encode())
    return lines
