"""Headers between client, router and engine.

| kind of engine | is told |
|---|---|
| ours | every ``x-hexgen-*`` field that is known, deadline and tail as remaining milliseconds |
| ours | ``X-Vllm-Priority``: the client's priority, whatever words it came in |
| stock, priority scheduling | ``X-Vllm-Priority``: due time, so that it serves earliest due first |
| stock, FCFS | nothing |
| another project's gateway, where that is said | time left to the first token, in its words |

vLLM's Rust server hands no headers of ours on: there the fields go into the body
(:func:`body_for`), where the request is one of those that carry any. Its priorities have 32 bits.

All are told the session and the request id. A client's own ``X-Vllm-Priority`` reaches engines of
which it is not known that they schedule by priority.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from yarl import URL

from hexgen_vllm import wire
from hexgen_vllm.router.calls.intake import (
    PRIORITY_HEADER,
    SESSION_HEADER,
    Accepted,
)
from hexgen_vllm.router.http.messages import REQUEST_ID_HEADER, SERVER, Pairs
from hexgen_vllm.types import Call, EngineKind, Placement

ENGINE_HEADER: Final = "x-hexgen-engine"
# A step of client priority outranks every difference in due time: 1e12 ms are 31 years.
PRIORITY_STEP: Final = 10**12
_MOST_STEPS: Final = 10**6
_INT64: Final = 2**63 - 1
_INT32: Final = 2**31 - 1
_NARROW_STEP: Final = 10**8
_NARROW_STEPS: Final = 20
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
# These may say where the engine is.
_TELLING: Final = ("alt-svc", "content-location", "link", "location", "refresh", "via")
# Which pages may read an answer is for the router to say.
_CORS: Final = tuple(f"access-control-{n}" for n in ("allow-origin", "allow-credentials",
                                                     "expose-headers"))  # fmt: skip
_NOT_IN_HEAD: Final = frozenset(
    name.encode()
    for name in (*_HOP_BY_HOP, *_TELLING, *_CORS, "content-length", "server", REQUEST_ID_HEADER)
)
_CONNECTION: Final = "connection"
_PASSES: Final[dict[bytes, str]] = {}
_MOST_NAMES: Final = 512
_FRAMING: Final = frozenset((b"connection", b"content-length", b"transfer-encoding"))
# The body goes on in the clear, and all of it is here.
_NOT_ON: Final = frozenset((b"content-encoding", b"expect", b"upgrade"))
_PLAIN_CONNECTION: Final = (b"", b"keep-alive", b"close")
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_WORKFLOW_ID: Final = wire.header_name("workflow_id")
_WORKFLOW_TYPE: Final = wire.header_name("workflow_type")
_DEADLINE: Final = wire.header_name("workflow_deadline_ms")
_STAGE: Final = wire.header_name("stage")
_STAGES_LEFT: Final = wire.header_name("stages_left")
_EXPECTED: Final = wire.header_name("expected_output_tokens")
_FINAL: Final = wire.header_name("workflow_final")
_TENANT: Final = wire.header_name("tenant")
_TAIL: Final = wire.header_name("tail_ms")
_BACKGROUND: Final = wire.header_name("background")
_CLASS: Final = wire.header_name("service_class")
_RESUME: Final = wire.header_name("resume_ms")
_KEEP: Final = wire.header_name("keep_ms")


def call_head(  # noqa: PLR0913 - what a head is made of
    accepted: Accepted,
    placement: Placement,
    kind: EngineKind,
    *,
    url: URL,
    now: float,
    epoch: float,
    request_id: str,
    extra: Mapping[str, str] = _NOTHING,
    method: str = "POST",
    length: int | None = None,
    bare: bool = False,
    words: str | None = None,
) -> bytes:
    """Return request line and headers of a call for its engine.

    Args:
        accepted: the call and the client's headers.
        placement: what was decided.
        kind: what the engine understands.
        url: of the engine.
        now: time of sending.
        epoch: time that stock priorities count from.
        request_id: sent as ``x-request-id``.
        extra: headers that replace the client's, by lower-case name.
        method: of the request.
        length: bytes of the body if it is not the client's.
        bare: the engine's server hands on no headers of ours, and priorities of 32 bits only.
        words: in whose words an engine that is not ours is told when the call is due.
    """
    said = dict(extra)
    if accepted.said:
        said.update(accepted.said)
    said[REQUEST_ID_HEADER] = request_id
    if words is not None and kind is not EngineKind.HEXGEN:
        said.update(_translated(words, accepted.call, placement, now))
    if kind is EngineKind.PRIORITY:
        key = placement.priority_key
        due_s = placement.due_s - epoch if key is None else key
        number = narrow_priority if bare else stock_priority
        said[PRIORITY_HEADER] = str(number(due_s, accepted.call.priority))
    elif kind is EngineKind.HEXGEN and accepted.call.priority:
        said[PRIORITY_HEADER] = str(-accepted.call.priority)  # vLLM's: lower is sooner
    if bare and PRIORITY_HEADER in said:
        said[PRIORITY_HEADER] = _within_32_bits(said[PRIORITY_HEADER])
    kept, names = _kept_lines(accepted.pairs, said)
    if accepted.session_id is not None and SESSION_HEADER not in names:
        said.setdefault(SESSION_HEADER, accepted.session_id)
    lines = [f"{name}: {value}\r\n" for name, value in said.items()]
    if kind is EngineKind.HEXGEN and not bare:
        lines += _workflow_lines(accepted, placement, now)
    lines.append("accept-encoding: identity\r\n")
    size = len(accepted.body) if length is None else length
    lines.append(f"content-length: {size}\r\n\r\n")
    first = f"{method} {url.raw_path_qs} HTTP/1.1\r\nhost: {url.host_port_subcomponent}\r\n"
    kept.insert(0, first.encode("utf-8", "surrogateescape"))
    kept.append("".join(lines).encode("utf-8", "surrogateescape"))
    return b"".join(kept)


def first_token_ms(placement: Placement, now: float) -> float:
    """Return the milliseconds until the first token must come if the workflow is to be on time.

    When the call is due minus what its other tokens take; ``inf`` without deadline, negative when
    that has passed.
    """
    return (placement.due_s - placement.decode_s - now) * 1000.0


def _translated(words: str, call: Call, placement: Placement, now: float) -> dict[str, str]:
    """Return the headers by which another project's gateway learns how urgent a call is."""
    left_ms = first_token_ms(placement, now)
    said: dict[str, str] = {}
    if words == "llm-d" and left_ms < math.inf:
        said["x-llm-d-slo-ttft-ms"] = f"{max(left_ms, 1.0):.0f}"
    if words == "dynamo":
        # It refuses what has expired, and a late answer is better than none.
        if 1.0 <= left_ms < math.inf:
            said["x-dynamo-slo-ttft-ms"] = f"{left_ms:.0f}"
        if call.priority:
            said["x-dynamo-request-priority"] = str(call.priority)
    return said


def _kept_lines(pairs: Pairs, said: Mapping[str, str]) -> tuple[list[bytes], set[str]]:
    """Return the header lines that pass through, and their lower-case names."""
    lines, names = [], set()
    for name, value in pairs:
        key = _PASSES.get(name)
        if key is None:
            key = _passes(name)
        if key == _CONNECTION and value.lower() not in _PLAIN_CONNECTION:
            others = [p for p in pairs if p[0].lower() != b"connection"]
            return _kept_lines(others, {**said, **_named(pairs)})
        if key and key != _CONNECTION and key not in said:
            names.add(key)
            lines.append(b"%b: %b\r\n" % (name, value))
    return lines, names


def _passes(name: bytes) -> str:
    """Return a header's lower-case name, empty if it never goes on; common ones are remembered."""
    key = name.decode("latin-1").lower()
    if key != _CONNECTION and (key in _NOT_TO_ENGINE or key.startswith(wire.HEADER_PREFIX)):
        key = ""
    if len(_PASSES) < _MOST_NAMES:
        _PASSES[name] = key
    return key


def _named(pairs: Pairs) -> dict[str, str]:
    """Return the names in all ``Connection`` headers."""
    values = b",".join(value for name, value in pairs if name.lower() == b"connection")
    return dict.fromkeys((one.strip().lower() for one in values.decode("latin-1").split(",")), "")


def stock_priority(due_in_s: float, priority: int) -> int:
    """Return vLLM's priority number, 64 bits wide: lower is sooner.

    Args:
        due_in_s: due time since the router's epoch; ``inf`` comes last.
        priority: the client's, higher is sooner; it outranks due time. Beyond ``+-10**6`` there is
            no room for due times: such priorities are told apart among themselves only.
    """
    if abs(priority) > _MOST_STEPS:
        beyond = _MOST_STEPS * PRIORITY_STEP + PRIORITY_STEP // 2 + abs(priority) - _MOST_STEPS
        number = min(beyond, _INT64)
        return number if priority < 0 else -number
    half = PRIORITY_STEP // 2 - 1
    due_ms = half if math.isinf(due_in_s) else int(max(-half, min(half, due_in_s * 1000.0)))
    return due_ms - priority * PRIORITY_STEP


def narrow_priority(due_in_s: float, priority: int) -> int:
    """Return the priority number where 32 bits must do; as :func:`stock_priority` but coarser.

    Due times are told apart to 0.1 s and up to 57 days from the router's epoch, and priorities
    from -20 to 20.
    """
    half = _NARROW_STEP // 2 - 1
    due = half if math.isinf(due_in_s) else int(max(-half, min(half, due_in_s * 10.0)))
    return due - max(-_NARROW_STEPS, min(_NARROW_STEPS, priority)) * _NARROW_STEP


def _within_32_bits(number: str) -> str:
    """Return a priority as a server takes it that ignores those which are too large for it."""
    try:
        return str(max(-_INT32, min(_INT32, int(number))))
    except ValueError:
        return number  # it is the client's own, and no number


def body_for(body: bytes, accepted: Accepted, placement: Placement, now: float) -> bytes:
    """Return the body of a call for an engine of ours whose server hands on no headers.

    Args:
        body: without what headers would say.
        accepted: the call.
        placement: what was decided.
        now: time of sending.

    Raises:
        BadRequest: the client's own fields in the body are wrong.
    """
    lines = "".join(_workflow_lines(accepted, placement, now)).splitlines()
    said = dict(line.split(": ", 1) for line in lines)
    return wire.with_fields(body, wire.from_headers(said))


def _workflow_lines(accepted: Accepted, placement: Placement, now: float) -> list[str]:
    """Return the header lines that only our own engines get; what is not known is left out."""
    call, deadline_s = accepted.call, placement.ordered_by_s
    # The wire has no negative deadline. What is overdue goes into the tail: deadline minus tail,
    # which engines order by, stays what it is.
    overdue_s = max(now + LEAST_DEADLINE_S - deadline_s, 0.0)
    lines = [
        f"{_WORKFLOW_TYPE}: {_type_name(call)}\r\n{_STAGE}: {call.stage}\r\n",
        f"{_TENANT}: {call.tenant}\r\n{_TAIL}: {_ms(placement.tail_s + overdue_s)}\r\n",
    ]
    if accepted.session_id is not None:
        lines.append(f"{_WORKFLOW_ID}: {accepted.session_id}\r\n")
    if accepted.service_class is not None:
        lines.append(f"{_CLASS}: {accepted.service_class}\r\n")
    if deadline_s < math.inf and accepted.service_class != wire.BATCH:
        lines.append(f"{_DEADLINE}: {_ms(deadline_s + overdue_s - now)}\r\n")
    if call.stages_left is not None:
        lines.append(f"{_STAGES_LEFT}: {call.stages_left}\r\n")
    if placement.expected_output_tokens:
        lines.append(f"{_EXPECTED}: {placement.expected_output_tokens}\r\n")
    if call.resume_s is not None:
        lines.append(f"{_RESUME}: {_ms(call.resume_s)}\r\n")
    if accepted.keep_s is not None:
        lines.append(f"{_KEEP}: {_ms(accepted.keep_s)}\r\n")
    if accepted.last:
        lines.append(f"{_FINAL}: 1\r\n")
    if placement.background:
        lines.append(f"{_BACKGROUND}: 1\r\n")
    return lines


def _type_name(call: Call) -> str:
    """Return what an engine learns a call as: of a tenant's own, where types belong to tenants."""
    if not call.taught_by:
        return call.workflow_type
    name = f"{call.workflow_type}:{call.taught_by}"
    if wire.NAME.fullmatch(name) is not None:
        return name
    return f"type-{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def _ms(seconds: float) -> str:
    # As f"{ms:.3f}", which compiled code makes of two formats, one within the other.
    return min(seconds * 1000.0, wire.MAX_TIME_MS).__format__(".3f")


def answer_head(pairs: Pairs, engine: str, request_id: str) -> list[bytes]:
    """Return the header lines of an engine's answer for the client, without a length."""
    lines, plain = [], True
    for name, value in pairs:
        key = name.lower()
        if key not in _NOT_IN_HEAD:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif key == b"connection":
            plain = plain and value.lower() in _PLAIN_CONNECTION
    if not plain:
        named = {name.encode("latin-1") for name in _named(pairs)}
        lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
    said = f"Server: {SERVER}\r\n{ENGINE_HEADER}: {engine}\r\n{REQUEST_ID_HEADER}: {request_id}\r\n"
    lines.append(said.encode())
    return lines


def slack_line(
    accepted: Accepted | None, placement: Placement | None, now: float, *, ends_now: bool
) -> bytes:
    """Return the header line that tells a client how its workflow stands, empty if nobody knows.

    Slack is deadline minus what is predicted to follow, minus the end of this call.

    Args:
        accepted: the call, ``None`` if it is none.
        placement: of the call, ``None`` if it never was placed.
        now: time of the answer.
        ends_now: the answer is whole; otherwise the call ends when it is predicted to.
    """
    if accepted is None or placement is None or accepted.service_class == wire.BATCH:
        return b""
    if placement.deadline_s == math.inf:
        return b""
    end_s = now
    if not ends_now and placement.finish_s is not None:
        end_s = max(now, placement.finish_s)
    slack_ms = (placement.deadline_s - placement.tail_s - end_s) * 1000.0
    slack_ms = max(-wire.MAX_TIME_MS, min(wire.MAX_TIME_MS, slack_ms))
    return f"{wire.SLACK_HEADER}: {slack_ms.__format__('.0f')}\r\n".encode()


def passed_on_head(method: str, target: str, pairs: Pairs, length: int) -> bytes:
    """Return the head of a request that another process of the router is to answer."""
    lines = [f"{method} {target} HTTP/1.1\r\n".encode("utf-8", "surrogateescape")]
    lines += passed_back_lines([p for p in pairs if p[0].lower() not in _NOT_ON])
    lines.append(b"content-length: %d\r\n\r\n" % length)
    return b"".join(lines)


def passed_back_lines(pairs: Pairs) -> list[bytes]:
    """Return the header lines of another process's answer, as they are but for the framing."""
    return [b"%b: %b\r\n" % pair for pair in pairs if pair[0].lower() not in _FRAMING]
