"""What other projects call a session, a deadline, a priority and an output length.

:data:`WORDS` is all that is read of them, in which order, and what the documentation shows.
:mod:`hexgen_vllm.router.foreign` reads them.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from hexgen_vllm import wire
from hexgen_vllm.policy.claims import MAX_PRIORITY

CLASSES: Final = {"system": 2, "interactive": 1, "default": 0, "bulk": -1}
ANY_VENDOR: Final = "x-*-session-id"
READ_TIMEOUT: Final = "x-stainless-read-timeout"
_TIERS: Final = {"priority": 1, "flex": -1, "batch": -1}
_BATCH_TIERS: Final = ("flex", "batch")
_DIGITS: Final = re.compile(r"[+-]?[0-9]{1,30}")
_GRPC: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_GRPC_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TTL: Final = re.compile(r"([0-9]{1,6})(s|m|h)")
_TTL_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_USUAL_TTL_S: Final = 300.0


class Meaning(enum.Enum):
    """What a word is about; its value says so in the documentation."""

    SESSION = "session"
    ROOT = "session at the top of the tree"
    PARENT = "session that began this one"
    WAITS = "whether the parent waits for it"
    AGENT = "agent"
    STAGE = "stage"
    TENANT = "tenant"
    DEADLINE = "deadline of the call"
    TIMEOUT = "timeout of the client"
    FIRST_TOKEN = "deadline of the first token"
    TOKEN = "time per output token"
    LENGTH = "output length"
    PRIORITY = "priority"
    BATCH = "nobody waits"
    FINAL = "end of the session"
    RESUME = "when the next call comes"
    KEEP = "how long the KV should stay"


class WordPlace(enum.Enum):
    """Where a word stands."""

    HEADER = "header"
    BODY = "body"
    BLOCK = "anywhere in the body"  # of a prompt: a content block, a message, a tool
    BAGGAGE = "baggage"  # a key of the W3C header of that name


class Form(NamedTuple):
    """How a value is read.

    Attributes:
        text: of it, for people.
        read: returns the value in our units, ``None`` for one that cannot be read.
    """

    text: str
    read: Callable[[object], Any]


def as_id(text: str) -> str:
    """Return ``text``, or a digest of it when it is not legal as a workflow id."""
    if wire.ID.fullmatch(text):
        return text
    return "h-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _batch(tier: object) -> bool:
    return isinstance(tier, str) and tier in _BATCH_TIERS


def _session(value: object) -> str | None:
    return as_id(value) if isinstance(value, str) and value else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and wire.NAME.fullmatch(value) else None


def _number(value: object) -> float | None:
    try:
        return wire.number(value)
    except ValueError:
        return None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number <= 1e9 else None


def _thousandths(value: object) -> float | None:
    number = _positive(value)
    return None if number is None else number / 1000.0


def _grpc(value: object) -> float | None:
    found = _GRPC.fullmatch(value.strip()) if isinstance(value, str) else None
    return None if found is None else _positive(int(found[1]) * _GRPC_S[found[2]])


def _tokens(value: object) -> int | None:
    number = _positive(value)
    return None if number is None else max(int(number), 1)


def _whole(value: object) -> int | None:
    """Return a number without its fraction; no digit of a long one is lost."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    return None if number is None else int(number)


def _higher(value: object) -> int | None:
    number = _whole(value)
    return None if number is None else max(-MAX_PRIORITY, min(MAX_PRIORITY, number))


def _lower(value: object) -> int | None:
    number = _higher(value)
    return None if number is None else -number


def _class(value: object) -> int | None:
    return CLASSES.get(value.lower()) if isinstance(value, str) else None


def _tier(value: object) -> int | None:
    return _TIERS.get(value) if isinstance(value, str) else None


def _flag(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None


def _resume(value: object) -> float | None:
    """Return seconds, 0 for no; that there is one, without saying when, is nothing new."""
    return 0.0 if _flag(value) is False else _positive(value)


def _cache_control(value: object) -> float | None:
    if not isinstance(value, dict) or value.get("type") != "ephemeral":
        return None
    found = _TTL.fullmatch(str(value.get("ttl", "")))
    return _USUAL_TTL_S if found is None else _positive(int(found[1]) * _TTL_S[found[2]])


_ID: Final = Form("text", _session)
_NAME: Final = Form("name", _name)
_S: Final = Form("seconds", _positive)
_MS: Final = Form("milliseconds", _thousandths)
_HIGHER: Final = Form("number, higher is sooner", _higher)
_LOWER: Final = Form("number, lower is sooner", _lower)
_CLASS: Final = Form(", ".join(f"`{name}` {n:+d}" for name, n in CLASSES.items()), _class)
_YES_NO: Final = Form("true or false", _flag)
_TOKENS: Final = Form("tokens", _tokens)


class Word(NamedTuple):
    """A word of another project.

    Attributes:
        meaning: what it is about.
        place: where it stands.
        name: of the header in lower case, of the key, or the path in the body, with dots.
        form: of its values.
        of: whose it is.
    """

    meaning: Meaning
    place: WordPlace
    name: str
    form: Form
    of: str


def _table() -> Iterator[Word]:  # noqa: PLR0915 - a table
    agent, hints = "vllm_xargs.agentic_context.", "nvext.agent_hints."
    header, body, baggage = WordPlace.HEADER, WordPlace.BODY, WordPlace.BAGGAGE
    for key in ("program_id", "task_id", "session_id"):
        yield Word(Meaning.SESSION, body, agent + key, _ID, "vllm-router")
    yield Word(Meaning.SESSION, body, "agent_hint.session_id", _ID, "vLLM, proposed")
    yield Word(Meaning.SESSION, body, "session_id", _ID, "vLLM")
    yield Word(Meaning.SESSION, header, "x-session-id", _ID, "vLLM, vllm-router")
    yield Word(Meaning.SESSION, header, "x-claude-code-session-id", _ID, "Claude Code")
    for name in ("session-id", "session_id", "thread-id"):
        yield Word(Meaning.SESSION, header, name, _ID, "Codex")
    yield Word(Meaning.SESSION, header, "x-session-affinity", _ID, "OpenCode")
    yield Word(Meaning.SESSION, header, "x-dynamo-session-id", _ID, "Dynamo")
    yield Word(Meaning.SESSION, body, hints + "prefix_id", _ID, "NeMo Agent Toolkit")
    yield Word(Meaning.SESSION, header, "x-litellm-trace-id", _ID, "LiteLLM")
    yield Word(Meaning.SESSION, header, "x-litellm-session-id", _ID, "LiteLLM")
    yield Word(Meaning.SESSION, header, ANY_VENDOR, _ID, "any vendor")
    for key in ("hexgen.workflow.id", "gen_ai.conversation.id", "session.id"):
        yield Word(Meaning.SESSION, baggage, key, _ID, "OpenTelemetry")
    yield Word(Meaning.ROOT, body, agent + "root_program_id", _ID, "vllm-router")
    yield Word(Meaning.PARENT, body, agent + "parent_program_id", _ID, "vllm-router")
    yield Word(Meaning.PARENT, body, "agent_hint.parent_session_id", _ID, "vLLM, proposed")
    yield Word(Meaning.PARENT, header, "x-dynamo-parent-session-id", _ID, "Dynamo")
    yield Word(Meaning.PARENT, header, "x-parent-session-id", _ID, "Dynamo")
    yield Word(Meaning.WAITS, body, agent + "blocks_parent", _YES_NO, "vllm-router")
    yield Word(Meaning.AGENT, body, agent + "agent_id", _NAME, "vllm-router")
    yield Word(Meaning.AGENT, header, "x-claude-code-agent-id", _NAME, "Claude Code")
    yield Word(Meaning.AGENT, baggage, "gen_ai.agent.name", _NAME, "OpenTelemetry")
    yield Word(Meaning.STAGE, body, agent + "agent_role", _NAME, "vllm-router")
    yield Word(Meaning.TENANT, header, "x-llm-d-inference-fairness-id", _NAME, "llm-d")
    yield Word(Meaning.TENANT, header, "x-gateway-inference-fairness-id", _NAME, "llm-d, old")
    yield Word(Meaning.TENANT, header, "x-tenant-id", _NAME, "vllm-router")
    yield Word(Meaning.TENANT, baggage, "hexgen.tenant", _NAME, "OpenTelemetry")
    yield Word(Meaning.DEADLINE, body, agent + "deadline_seconds", _S, "vllm-router")
    yield Word(Meaning.TIMEOUT, header, "grpc-timeout", Form("`5S`, `100m`", _grpc), "gRPC")
    yield Word(Meaning.TIMEOUT, header, "x-envoy-expected-rq-timeout-ms", _MS, "Envoy")
    yield Word(Meaning.TIMEOUT, header, "x-litellm-timeout", _S, "LiteLLM")
    yield Word(Meaning.TIMEOUT, header, READ_TIMEOUT, _S, "OpenAI, Anthropic SDK")
    for name, of in (
        ("x-llm-d-slo-ttft-ms", "llm-d"),
        ("x-slo-ttft-ms", "llm-d, old"),
        ("x-dynamo-slo-ttft-ms", "Dynamo"),
    ):
        yield Word(Meaning.FIRST_TOKEN, header, name, _MS, of)
    yield Word(Meaning.TOKEN, header, "x-llm-d-slo-tpot-ms", _MS, "llm-d")
    yield Word(Meaning.TOKEN, header, "x-slo-tpot-ms", _MS, "llm-d, old")
    yield Word(Meaning.LENGTH, body, agent + "expected_output_length", _TOKENS, "vllm-router")
    yield Word(Meaning.LENGTH, body, hints + "osl", _TOKENS, "Dynamo, NeMo Agent Toolkit")
    yield Word(Meaning.PRIORITY, body, agent + "priority", _HIGHER, "vllm-router")
    yield Word(Meaning.PRIORITY, header, "x-dynamo-request-strict-priority", _HIGHER, "Dynamo")
    yield Word(Meaning.PRIORITY, header, "x-dynamo-request-priority", _HIGHER, "Dynamo")
    yield Word(Meaning.PRIORITY, body, hints + "strict_priority", _HIGHER, "Dynamo")
    yield Word(Meaning.PRIORITY, body, hints + "priority", _HIGHER, "Dynamo")
    yield Word(Meaning.PRIORITY, body, hints + "latency_sensitivity", _HIGHER, "NeMo Agent Toolkit")
    yield Word(Meaning.PRIORITY, header, "x-vllm-priority", _LOWER, "vLLM")
    yield Word(Meaning.PRIORITY, header, "x-request-priority", _LOWER, "production-stack")
    yield Word(Meaning.PRIORITY, body, "priority", _LOWER, "vLLM, LiteLLM")
    for name, of in (
        ("x-smg-priority", "SGLang"),
        ("x-dynamo-meta-policy-class", "Dynamo"),
        ("x-llm-d-inference-objective", "llm-d"),
        ("x-gateway-inference-objective", "llm-d, old"),
    ):
        yield Word(Meaning.PRIORITY, header, name, _CLASS, of)
    tiers = ", ".join(f"`{name}` {n:+d}" for name, n in _TIERS.items())
    yield Word(Meaning.PRIORITY, body, "service_tier", Form(tiers, _tier), "OpenAI")
    batch = " or ".join(f"`{name}`" for name in _BATCH_TIERS)
    yield Word(Meaning.BATCH, body, "service_tier", Form(batch, _batch), "OpenAI")
    yield Word(Meaning.FINAL, header, "x-dynamo-session-final", _YES_NO, "Dynamo")
    resume = Form("seconds, or `false` if none is expected", _resume)
    yield Word(Meaning.RESUME, body, agent + "expected_resume", resume, "vllm-router")
    yield Word(Meaning.RESUME, body, hints + "iat", _MS, "NeMo Agent Toolkit")
    yield Word(Meaning.KEEP, body, agent + "kv_retention_ttl_seconds", _S, "vllm-router")
    control = Form('`{"type": "ephemeral", "ttl": "5m"}`', _cache_control)
    yield Word(Meaning.KEEP, body, "cache_control", control, "Anthropic")
    yield Word(Meaning.KEEP, body, "nvext.cache_control", control, "NeMo Agent Toolkit")
    yield Word(Meaning.KEEP, WordPlace.BLOCK, "cache_control", control, "Anthropic, LiteLLM")


WORDS: Final = tuple(_table())
"""Every word that is read. Of those with one meaning the first that can be read counts, but of
timeouts the shortest."""

LEFT: Final[Mapping[str, str]] = {
    "prompt_cache_key": "many sessions may share one; the router compares the prompts themselves",
    "previous_response_id": "no hint: the call goes to the engine that has the response",
    "kv_hints": "goes on to the engine, where our scheduler reads it",
    "nvext.agent_hints.total_requests": "how many calls follow is learned",
    "nvext.agent_hints.speculative_prefill": "nothing is computed that nobody asked for",
    "x-claude-code-parent-agent-id": "all agents of a session have the session's id: one workflow",
    "x-stainless-timeout": "`x-stainless-read-timeout` comes with it and says the same",
}
"""Words that look as if they were read, and why they are not."""
