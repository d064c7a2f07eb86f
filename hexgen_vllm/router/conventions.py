"""What other projects call a session, a deadline, a priority and an output length.

Our own names (``x-hexgen-*`` headers, ``hexgen_*`` keys of ``vllm_xargs``) are read by
``hexgen_vllm.wire`` and go first. These are read for clients that know nothing of us, in the
order below; the first hit wins. Foreign values never make a request fail: what cannot be read
was not said.

A foreign session is not a workflow with an end-to-end deadline: it may last for hours. Its
deadlines count per call.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from hexgen_vllm import wire
from hexgen_vllm.policy.claims import MAX_PRIORITY

SESSION_HEADERS: Final = (
    "x-session-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "thread-id",
    "x-session-affinity",
    "x-dynamo-session-id",
    "x-litellm-trace-id",
    "x-litellm-session-id",
)
FINAL_HEADER: Final = "x-dynamo-session-final"
TENANT_HEADERS: Final = (
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    "x-tenant-id",
)
# Seconds after which an answer is of no use to the client any more.
TIMEOUT_HEADERS: Final = ("x-litellm-timeout", "x-stainless-read-timeout")
_VENDOR_SESSION: Final = re.compile(r"x-(?!parent-)[a-z0-9]+-session-id")
_DIGITS: Final = re.compile(r"[+-]?[0-9]{1,30}")
CLASSES: Final = {"system": 2, "interactive": 1, "default": 0, "bulk": -1}
_TIERS: Final = {"priority": 1, "flex": -1, "batch": -1}
_BATCH_TIERS: Final = ("flex", "batch")


_PRIORITY_HEADERS: Final = (
    "x-dynamo-request-priority",
    "x-vllm-priority",
    "x-request-priority",
    "x-smg-priority",
)
# A request without any of these says nothing in other projects' words.
_HEADERS: Final = frozenset(
    (*SESSION_HEADERS, FINAL_HEADER, *TENANT_HEADERS, *TIMEOUT_HEADERS, *_PRIORITY_HEADERS)
)
_BODY_FIELDS: Final = frozenset(
    ("vllm_xargs", "nvext", "agent_hint", "session_id", "priority", "service_tier")
)


class Foreign(NamedTuple):
    """What a request says in other projects' words; ``None`` means not said.

    Attributes:
        session_id: legal as a workflow id.
        stage: role or step of the agent.
        tenant: who pays.
        timeout_s: seconds after which the answer is of no use.
        expected_output_tokens: output length.
        priority: higher is sooner, 0 is normal, within :data:`MAX_PRIORITY`.
        final: nothing follows in this session.
        batch: nobody waits for the answer.
    """

    session_id: str | None = None
    stage: str | None = None
    tenant: str | None = None
    timeout_s: float | None = None
    expected_output_tokens: int | None = None
    priority: int = 0
    final: bool = False
    batch: bool = False


_NOTHING: Final = Foreign()


def agentic_context(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``vllm_xargs.agentic_context`` of a body, empty when it has none."""
    return _dict(_dict(body.get("vllm_xargs")).get("agentic_context"))


def read(headers: Mapping[str, str], body: Mapping[str, Any]) -> Foreign:
    """Read every convention from ``headers`` (by lower-case name) and a decoded ``body``."""
    if _BODY_FIELDS.isdisjoint(body) and _HEADERS.isdisjoint(headers):
        vendors = [name for name in headers if name.endswith("-session-id")]
        if not vendors:
            return _NOTHING
    agent, hints = agentic_context(body), _dict(_dict(body.get("nvext")).get("agent_hints"))
    said = wire.from_agentic_context(agent)
    deadline_ms = said.workflow_deadline_ms
    osl = said.expected_output_tokens or _positive(hints.get("osl"))
    return Foreign(
        session_id=_session(headers, body, agent),
        stage=said.stage,
        tenant=next((n for h in TENANT_HEADERS if (n := _name(headers.get(h)))), None),
        timeout_s=deadline_ms / 1000.0 if deadline_ms is not None else _timeout(headers, body),
        expected_output_tokens=None if osl is None else max(int(osl), 1),
        priority=_priority(headers, body, agent, hints),
        final=headers.get(FINAL_HEADER, "").lower() in ("true", "1"),
        batch=is_batch_tier(body.get("service_tier")),
    )


def is_batch_tier(tier: object) -> bool:
    """Return whether a ``service_tier`` says that nobody waits for the answer."""
    return isinstance(tier, str) and tier in _BATCH_TIERS


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _session(
    headers: Mapping[str, str], body: Mapping[str, Any], agent: Mapping[str, Any]
) -> str | None:
    hint = _dict(body.get("agent_hint"))
    in_body = (
        *(agent.get(name) for name in ("program_id", "task_id", "session_id")),
        hint.get("session_id"),
        body.get("session_id"),
        *(headers.get(name) for name in SESSION_HEADERS),
    )
    found = next((value for value in in_body if isinstance(value, str) and value), None)
    if found is None:
        found = next((v for k, v in headers.items() if _is_vendor_session(k) and v), None)
    return None if found is None else as_id(found)


def _is_vendor_session(name: str) -> bool:
    return name.endswith("-session-id") and _VENDOR_SESSION.fullmatch(name) is not None


def as_id(text: str) -> str:
    """Return ``text``, or a digest of it when it is not legal as a workflow id."""
    if wire.ID.fullmatch(text):
        return text
    return "h-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and wire.NAME.fullmatch(value) else None


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: object) -> int | None:
    """Return a number without its fraction; no digit of a long one is lost."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    return None if number is None else int(number)


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number <= 1e9 else None


def _timeout(headers: Mapping[str, str], body: Mapping[str, Any]) -> float | None:
    """Return the tightest timeout; a read timeout means one wait, so not for streams."""
    names = TIMEOUT_HEADERS[:1] if body.get("stream") else TIMEOUT_HEADERS
    found = [t for name in names if (t := _positive(headers.get(name))) is not None]
    return min(found, default=None)


def _priority(
    headers: Mapping[str, str],
    body: Mapping[str, Any],
    agent: Mapping[str, Any],
    hints: Mapping[str, Any],
) -> int:
    """Return the priority, higher is sooner; each source is turned the right way round here."""
    higher_is_sooner = (
        agent.get("priority"),
        headers.get("x-dynamo-request-priority"),
        hints.get("priority"),
    )
    lower_is_sooner = (
        headers.get("x-vllm-priority"),
        headers.get("x-request-priority"),
        body.get("priority"),
    )
    for sign, values in ((1, higher_is_sooner), (-1, lower_is_sooner)):
        for value in values:
            number = _whole(value)
            if number is not None:
                return sign * max(-MAX_PRIORITY, min(MAX_PRIORITY, number))
    named = CLASSES.get(headers.get("x-smg-priority", "").lower())
    tier = body.get("service_tier")
    return named if named is not None else _TIERS.get(tier if isinstance(tier, str) else "", 0)
