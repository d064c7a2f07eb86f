"""What the project's fields are called on the wire, and how they are read and written.

One table, two spellings: header ``x-hexgen-workflow-deadline-ms`` and flat ``vllm_xargs`` key
``hexgen_workflow_deadline_ms``. Deadlines cross processes as remaining milliseconds: only the
receiver's clock decides what they mean. Clients get strict reading (a bad value is their error);
an engine reads leniently, because a request that reached it must be served.

vLLM carries ``vllm_xargs`` to the scheduler, but no headers: whoever stands before its server, our
middleware or, where it takes none, our router, moves them into the body (:func:`with_fields`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from hexgen_vllm.errors import BadRequest

HEADER_PREFIX: Final = "x-hexgen-"
SLACK_HEADER: Final = "x-hexgen-slack-ms"
"""On an answer: milliseconds that its workflow has to spare, negative when it will be late."""
POLLER: Final = "hexgen-vllm-router"
"""``User-Agent`` of what the router asks engines on its own account: health, telemetry, models."""
XARGS_PREFIX: Final = "hexgen_"
MAX_ID_CHARS: Final = 128
MAX_TIME_MS: Final = 1e12
BATCH: Final = "batch"
INTERACTIVE: Final = "interactive"
CLASSES: Final = (BATCH, INTERACTIVE)
MEMBER: Final = "vllm_xargs"
AGENTIC: Final = "agentic_context"
TIER: Final = "service_tier"
_BATCH_TIERS: Final = ("flex", "batch")
_BLANKS: Final = b" \t\r\n"
STATS_PATH: Final = "/hexgen/stats"
_STATS_PORTS: Final = 10000

ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,63}")
_SEEN_NAMES: Final[set[str]] = set()  # the same few types, stages and tenants come again and again
_MOST_SEEN: Final = 512


@dataclass(init=False, slots=True, unsafe_hash=True)
class CallMeta:
    """What a request says about its workflow; ``None`` means not said.

    Attributes:
        workflow_id: up to 128 printable ASCII characters.
        workflow_type: name, up to 64 characters of ``[A-Za-z0-9_.:/-]``.
        workflow_deadline_ms: milliseconds left for the whole workflow, > 0.
        stage: name, as ``workflow_type``.
        stages_left: stages after this one, >= 0.
        expected_output_tokens: > 0.
        workflow_final: nothing follows this call.
        tenant: name, as ``workflow_type``.
        tail_ms: predicted milliseconds of critical path after this call, >= 0 (router to engine).
        background: the workflow is demoted (router to engine).
        service_class: ``batch`` for a call that nobody waits for, whatever else is said of its
            deadline; ``interactive`` for any other. Its header is ``x-hexgen-class``.
        resume_ms: milliseconds from the end of this call to the next one of its workflow, such as
            a tool takes; 0: none is expected.
        keep_ms: milliseconds for which the KV of this call should stay, > 0.
    """

    workflow_id: str | None
    workflow_type: str | None
    workflow_deadline_ms: float | None
    stage: str | None
    stages_left: int | None
    expected_output_tokens: int | None
    workflow_final: bool | None
    tenant: str | None
    tail_ms: float | None
    background: bool | None
    service_class: str | None
    resume_ms: float | None
    keep_ms: float | None

    def __init__(  # noqa: PLR0913 - one for each attribute
        self,
        *,
        workflow_id: str | None = None,
        workflow_type: str | None = None,
        workflow_deadline_ms: float | None = None,
        stage: str | None = None,
        stages_left: int | None = None,
        expected_output_tokens: int | None = None,
        workflow_final: bool | None = None,
        tenant: str | None = None,
        tail_ms: float | None = None,
        background: bool | None = None,
        service_class: str | None = None,
        resume_ms: float | None = None,
        keep_ms: float | None = None,
    ) -> None:
        self.workflow_id, self.workflow_type = workflow_id, workflow_type
        self.workflow_deadline_ms, self.tail_ms = workflow_deadline_ms, tail_ms
        self.stage, self.stages_left = stage, stages_left
        self.expected_output_tokens = expected_output_tokens
        self.workflow_final, self.tenant = workflow_final, tenant
        self.background, self.service_class = background, service_class
        self.resume_ms, self.keep_ms = resume_ms, keep_ms


def _id(value: object) -> str:
    if isinstance(value, str) and ID.fullmatch(value):
        return value
    raise ValueError(f"must be 1 to {MAX_ID_CHARS} printable ASCII characters without spaces")


def _name(value: object) -> str:
    if isinstance(value, str):
        if value in _SEEN_NAMES:
            return value
        if NAME.fullmatch(value):
            if len(_SEEN_NAMES) < _MOST_SEEN:
                _SEEN_NAMES.add(value)
            return value
    raise ValueError("must be 1 to 64 characters of letters, digits and _ . : / -")


def number(value: object) -> float:
    """Return the finite number that JSON or a header says.

    Raises:
        ValueError: there is none.
    """
    # A union would be made anew for every call.
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("must be a number")
    try:
        said = float(value)
    except (ValueError, OverflowError):
        raise ValueError("must be a number") from None
    if not math.isfinite(said):
        raise ValueError("must be finite")
    return said


def finite(value: float | None) -> float | None:
    """Return ``value`` as JSON can say it: what is unknown or without bound is ``None``."""
    return value if value is not None and math.isfinite(value) else None


def plain(value: Any, digits: int | None = None) -> Any:
    """Return ``value`` as JSON has it.

    Numbers without bound are ``None``, bytes hexadecimal, and what JSON does not know is text.

    Args:
        value: anything.
        digits: behind the point, to which numbers are rounded; ``None`` rounds none.
    """
    if isinstance(value, float):
        known = finite(value)
        return known if known is None or digits is None else round(known, digits)
    if isinstance(value, Mapping):
        return {str(name): plain(one, digits) for name, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one, digits) for one in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    return value if value is None or isinstance(value, str | int) else str(value)


def from_json(text: str | bytes) -> Any:
    """Return what a JSON text says, of whatever origin.

    Raises:
        ValueError: it is not JSON, or nested more deeply than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that ``text`` is, an empty one if it is none."""
    try:
        found = from_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _positive_ms(value: object) -> float:
    ms = number(value)
    if not 0 < ms <= MAX_TIME_MS:
        raise ValueError(f"must be more than 0 and at most {MAX_TIME_MS:.0e} milliseconds")
    return ms


def _least_0_ms(value: object) -> float:
    ms = number(value)
    if not 0 <= ms <= MAX_TIME_MS:
        raise ValueError(f"must be from 0 to {MAX_TIME_MS:.0e} milliseconds")
    return ms


def _count(value: object, least: int) -> int:
    said = number(value)
    if said != int(said) or not least <= said <= 2**31 - 1:
        raise ValueError(f"must be a whole number of at least {least}")
    return int(said)


def _whole(tokens: float) -> float:
    """Return a length in whole tokens; a positive one is at least 1."""
    return max(int(tokens), 1) if tokens > 0 else tokens


def _flag(value: object) -> bool:
    text = str(value).lower()
    if text in ("1", "true", "1.0"):
        return True
    if text in ("0", "false", "0.0"):
        return False
    raise ValueError("must be true or false")


def _class(value: object) -> str:
    if value in CLASSES:
        return str(value)
    raise ValueError(f"must be one of {', '.join(CLASSES)}")


_READERS: Final[dict[str, Callable[[object], Any]]] = {
    "workflow_id": _id,
    "workflow_type": _name,
    "workflow_deadline_ms": _positive_ms,
    "stage": _name,
    "stages_left": lambda v: _count(v, 0),
    "expected_output_tokens": lambda v: _count(v, 1),
    "workflow_final": _flag,
    "tenant": _name,
    "tail_ms": _least_0_ms,
    "background": _flag,
    "service_class": _class,
    "resume_ms": _least_0_ms,
    "keep_ms": _positive_ms,
}
FIELDS: Final = tuple(f.name for f in fields(CallMeta))
_SPELLED: Final = {"service_class": "class"}  # what a Python name cannot be
# What an agentic context calls our fields, and what its values are in our units.
_AGENTIC: Final[dict[str, tuple[str, Callable[[object], object]]]] = {
    "program_id": ("workflow_id", lambda v: v),
    "agent_role": ("stage", lambda v: v),
    "deadline_seconds": ("workflow_deadline_ms", lambda v: 1000.0 * number(v)),
    "expected_output_length": ("expected_output_tokens", lambda v: _whole(number(v))),
}


def header_name(field: str) -> str:
    """Return the header that carries ``field``."""
    return HEADER_PREFIX + _SPELLED.get(field, field).replace("_", "-")


def xarg_name(field: str) -> str:
    """Return the ``vllm_xargs`` key that carries ``field``."""
    return XARGS_PREFIX + _SPELLED.get(field, field)


_HEADERS: Final = {header_name(f): f for f in FIELDS}
_XARGS: Final = {xarg_name(f): f for f in FIELDS}


def _read(source: Mapping[str, object], names: dict[str, str], prefix: str) -> CallMeta:
    found = CallMeta()
    for key, value in source.items():
        field = names.get(key)
        if field is None:
            if key[: len(prefix)].lower() != prefix:
                continue
            field = names.get(key.lower())
        if field is None:
            raise BadRequest(f"{key} is not a known field.", param=key)
        try:
            setattr(found, field, _READERS[field](value))
        except ValueError as error:
            raise BadRequest(f"{key} {error}.", param=key) from None
    return found


def from_headers(headers: Mapping[str, str]) -> CallMeta:
    """Read the ``x-hexgen-*`` headers of a request; other headers are ignored.

    Raises:
        BadRequest: a value is wrong or a name under our prefix is unknown; ``param`` names it.
    """
    return _read(headers, _HEADERS, HEADER_PREFIX)


def from_xargs(xargs: Mapping[str, object]) -> CallMeta:
    """Read the flat ``hexgen_*`` keys of a body's ``vllm_xargs``; other keys are ignored.

    Raises:
        BadRequest: a value is wrong or a name under our prefix is unknown; ``param`` names it.
    """
    return _read(xargs, _XARGS, XARGS_PREFIX)


def read_leniently(xargs: Mapping[str, object]) -> tuple[CallMeta, tuple[str, ...]]:
    """Read ``hexgen_*`` keys where refusing is too late.

    Returns:
        What could be read, and the keys that could not.
    """
    found: dict[str, Any] = {}
    bad: list[str] = []
    for key, value in xargs.items():
        if not key.startswith(XARGS_PREFIX):
            continue
        field = _XARGS.get(key)
        try:
            if field is None:
                raise ValueError
            found[field] = _READERS[field](value)
        except ValueError:
            bad.append(key)
    return CallMeta(**found), tuple(bad)


def from_agentic_context(context: Mapping[str, object]) -> CallMeta:
    """Read the ``agentic_context`` that agents send for vllm-router.

    It is not ours, so what cannot be read counts as not said. Its deadline is that of one call.
    """
    found: dict[str, Any] = {}
    for name, (field, in_our_units) in _AGENTIC.items():
        if name not in context:
            continue
        try:
            found[field] = _READERS[field](in_our_units(context[name]))
        except ValueError:
            continue
    return CallMeta(**found)


def merged(first: CallMeta, second: CallMeta) -> CallMeta:
    """Return ``first`` with its gaps filled from ``second``."""
    gaps = {f: getattr(second, f) for f in FIELDS if getattr(first, f) is None}
    return replace(first, **gaps)


def _spelled(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def to_headers(meta: CallMeta) -> dict[str, str]:
    """Return the headers that say what ``meta`` says."""
    found = {}
    for name, field in _HEADERS.items():
        value = getattr(meta, field)
        if value is not None:
            found[name] = _spelled(value)
    return found


def to_xargs(meta: CallMeta) -> dict[str, str | int | float]:
    """Return flat ``vllm_xargs`` (or ``SamplingParams.extra_args``) that say what ``meta`` says."""
    values = ((k, getattr(meta, f)) for k, f in _XARGS.items())
    return {k: int(v) if isinstance(v, bool) else v for k, v in values if v is not None}


def with_fields(body: bytes, said: CallMeta) -> bytes:
    """Return ``body`` with the fields of ``said`` among its ``vllm_xargs``.

    A body that is not a JSON object comes back as it is: vLLM has the words for what is wrong.

    Args:
        body: the whole body, JSON in any encoding JSON allows.
        said: what the headers said; a field of it wins over the body's, and a ``hexgen_*`` key
            over the body's agentic context.

    Raises:
        BadRequest: a ``hexgen_*`` key of the body is unknown or has a bad value.
    """
    mentions = MEMBER.encode() in body or TIER.encode() in body
    if mentions or json.detect_encoding(body) != "utf-8":
        return _parsed(body, said)
    ours = to_xargs(said)
    return _spliced(body, ours) if ours else body


def _spliced(body: bytes, ours: dict[str, Any]) -> bytes:
    """Put a member in at the end, where it outranks one of the same name, however that is spelled.

    No other object becomes one by it, nor does a body that is none.
    """
    inner = body.strip(_BLANKS)
    if len(inner) < len(b"{}") or not (inner.startswith(b"{") and inner.endswith(b"}")):
        return body
    there = inner[:-1].rstrip(_BLANKS)
    comma = b"" if there == b"{" else b","
    return there + comma + b'"%s":%s}' % (MEMBER.encode(), json.dumps(ours).encode())


def _parsed(body: bytes, said: CallMeta) -> bytes:
    try:
        document = from_json(body)
    except ValueError:
        return body
    if not isinstance(document, dict):
        return body
    theirs = document.get(MEMBER)
    if theirs is None:
        theirs = {}
    if not isinstance(theirs, dict):
        return body
    written = from_xargs(theirs)
    if document.get(TIER) in _BATCH_TIERS:
        said = merged(said, merged(written, CallMeta(service_class=BATCH)))
        document[TIER] = _BATCH_TIERS[0]
    context = theirs.get(AGENTIC)
    if isinstance(context, dict):
        theirs = {name: value for name, value in theirs.items() if name != AGENTIC}
        said = merged(said, merged(written, from_agentic_context(context)))
    elif said == CallMeta():
        return body
    return json.dumps({**document, MEMBER: {**theirs, **to_xargs(said)}}).encode()


def stats_port(port: int) -> int | None:
    """Return where an engine process gives its telemetry whose server listens on ``port``.

    That is so where vLLM's server takes no middleware, and unless the engine is told another port;
    ``None`` if there is no such port.
    """
    found = port + _STATS_PORTS
    return found if port > 0 and found < 2**16 else None
