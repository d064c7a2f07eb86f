"""What other projects call a session, a deadline, a priority and an output length.

Our own names (``x-hexgen-*`` headers, ``hexgen_*`` keys of ``vllm_xargs``) are read by
``hexgen_vllm.wire`` and go first. These are read for clients that know nothing of us, and
:data:`WORDS` is all of them: what is read, in which order, and what the documentation shows.
Foreign values never make a request fail: what cannot be read was not said.

A foreign session is not a workflow with an end-to-end deadline: it may last for hours. Its
deadlines count per call.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from hexgen_vllm import wire
from hexgen_vllm.policy.claims import MAX_PRIORITY

CLASSES: Final = {"system": 2, "interactive": 1, "default": 0, "bulk": -1}
DECODE_S: Final = 0.05
"""Time of an output token where only that of the first one is asked for: 20 a second, faster than
anybody reads."""
DECODE_TOKENS: Final = 256
"""Output tokens for which that time is given where nothing is said of the length."""

ANY_VENDOR: Final = "x-*-session-id"
_READ_TIMEOUT: Final = "x-stainless-read-timeout"
_TIERS: Final = {"priority": 1, "flex": -1, "batch": -1}
_BATCH_TIERS: Final = ("flex", "batch")
_VENDOR_SESSION: Final = re.compile(r"x-(?!parent-)[a-z0-9]+-session-id")
_DIGITS: Final = re.compile(r"[+-]?[0-9]{1,30}")
_GRPC: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_GRPC_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TTL: Final = re.compile(r"([0-9]{1,6})(s|m|h)")
_TTL_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_USUAL_TTL_S: Final = 300.0
_MOST_BAGGAGE: Final = 8192  # bytes, as W3C has it
_MOST_BLOCKS: Final = 16  # looked at; Anthropic takes four
_CACHE_CONTROL: Final = b'"cache_control"'
_VALUE: Final = re.compile(rb"[ \t\r\n]{0,100}:[ \t\r\n]{0,100}(\{[^{}]{0,200}\})")


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


class Foreign(NamedTuple):
    """What a request says in other projects' words; ``None`` means not said.

    Attributes:
        session_id: legal as a workflow id.
        root_id: the session at the top of the tree that it is part of, likewise.
        parent_id: the session that began it, likewise.
        detached: the parent does not wait for it.
        agent: the agent's name or id.
        stage: role or step of the agent.
        tenant: who pays.
        timeout_s: seconds after which the answer is of no use.
        expected_output_tokens: output length.
        priority: higher is sooner, 0 is normal, within :data:`MAX_PRIORITY`.
        final: nothing follows in this session.
        batch: nobody waits for the answer.
        resume_s: seconds until the next call of the session, 0 if none is expected.
        keep_s: seconds for which the KV should stay.
    """

    session_id: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    detached: bool = False
    agent: str | None = None
    stage: str | None = None
    tenant: str | None = None
    timeout_s: float | None = None
    expected_output_tokens: int | None = None
    priority: int = 0
    final: bool = False
    batch: bool = False
    resume_s: float | None = None
    keep_s: float | None = None


_NOTHING: Final = Foreign()


def as_id(text: str) -> str:
    """Return ``text``, or a digest of it when it is not legal as a workflow id."""
    if wire.ID.fullmatch(text):
        return text
    return "h-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def is_batch_tier(tier: object) -> bool:
    """Return whether a ``service_tier`` says that nobody waits for the answer."""
    return isinstance(tier, str) and tier in _BATCH_TIERS


def _session(value: object) -> str | None:
    return as_id(value) if isinstance(value, str) and value else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and wire.NAME.fullmatch(value) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


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
    yield Word(Meaning.TIMEOUT, header, _READ_TIMEOUT, _S, "OpenAI, Anthropic SDK")
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
    yield Word(Meaning.BATCH, body, "service_tier", Form(batch, is_batch_tier), "OpenAI")
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

SESSION_HEADERS: Final = tuple(
    w.name
    for w in WORDS
    if w.meaning is Meaning.SESSION and w.place is WordPlace.HEADER and w.name != ANY_VENDOR
)


def _by(place: WordPlace) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, word in enumerate(WORDS):
        if word.place is place:
            first = word.name.partition(".")[0] if place is WordPlace.BODY else word.name
            found.setdefault(first, []).append(rank)
    return found


_HEADERS: Final = _by(WordPlace.HEADER)
_FIELDS: Final = _by(WordPlace.BODY)
_BAGGAGE: Final = _by(WordPlace.BAGGAGE)
(_BLOCK,) = _by(WordPlace.BLOCK)["cache_control"]
_VENDOR: Final = _HEADERS[ANY_VENDOR]
_PATHS: Final = tuple(tuple(word.name.split(".")) for word in WORDS)


def agentic_context(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``vllm_xargs.agentic_context`` of a body, empty when it has none."""
    context = _at(body, ("vllm_xargs", "agentic_context"))
    return context if isinstance(context, dict) else {}


def read(headers: Mapping[str, str], body: Mapping[str, Any], raw: bytes = b"") -> Foreign:
    """Read every convention.

    Args:
        headers: by lower-case name.
        body: decoded; what is long or deep may lack.
        raw: its bytes, where it has a prompt whose parts may say something.
    """
    found: list[tuple[int, object]]
    found = [(rank, value) for name, value in headers.items() for rank in _ranks(name)]
    if not _FIELDS.keys().isdisjoint(body):
        ranks = [rank for name in _FIELDS.keys() & body.keys() for rank in _FIELDS[name]]
        found += [(rank, _at(body, _PATHS[rank])) for rank in ranks]
    if "baggage" in headers:
        found += _in_baggage(headers["baggage"])
    if _CACHE_CONTROL in raw:
        found += [(_BLOCK, value) for value in _longest(raw)]
    if not found:
        return _NOTHING
    said: dict[Meaning, Any] = {}
    for rank, value in sorted(found, key=lambda one: one[0]):
        word = WORDS[rank]
        if word.name == _READ_TIMEOUT and body.get("stream"):
            continue  # means one wait, so not the whole of a stream
        known = said.get(word.meaning)
        if known is not None and word.meaning is not Meaning.TIMEOUT:
            continue
        meant = word.form.read(value)
        if meant is not None:
            said[word.meaning] = meant if known is None else min(known, meant)
    return _together(said)


def _ranks(name: str) -> list[int] | tuple[()]:
    found = _HEADERS.get(name)
    if found is None and name.endswith("-session-id") and _VENDOR_SESSION.fullmatch(name):
        return _VENDOR
    return found or ()


def _at(body: Mapping[str, Any], path: tuple[str, ...]) -> object:
    found: object = body
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _longest(raw: bytes) -> list[object]:
    """Return what blocks of a prompt say of its KV, the longest time first.

    A body may have megabytes of blocks: its bytes are searched, and few places looked at. In a
    string the quotes of the name would be escaped, so that what is found is a name.
    """
    found: list[object] = []
    at = -1
    for _ in range(_MOST_BLOCKS):
        at = raw.find(_CACHE_CONTROL, at + 1)
        if at < 0:
            break
        value = _VALUE.match(raw, at + len(_CACHE_CONTROL))
        if value is not None:
            with suppress(ValueError):
                found.append(json.loads(value[1]))
    return sorted(found, key=lambda one: _cache_control(one) or 0.0, reverse=True)


def _in_baggage(text: str) -> Iterator[tuple[int, str]]:
    for member in text[:_MOST_BAGGAGE].split(","):
        name, _, value = member.partition(";")[0].partition("=")
        for rank in _BAGGAGE.get(name.strip(), ()):
            yield rank, unquote(value.strip())


def _together(said: Mapping[Meaning, Any]) -> Foreign:
    session = said.get(Meaning.SESSION)
    # Who is its own parent has none.
    root, parent = (
        None if one == session else one
        for one in (said.get(Meaning.ROOT), said.get(Meaning.PARENT))
    )
    length = said.get(Meaning.LENGTH)
    return Foreign(
        session_id=session,
        root_id=root,
        parent_id=parent,
        detached=said.get(Meaning.WAITS) is False,
        agent=said.get(Meaning.AGENT),
        stage=said.get(Meaning.STAGE),
        tenant=said.get(Meaning.TENANT),
        timeout_s=_timeout_s(said, length or DECODE_TOKENS),
        expected_output_tokens=length,
        priority=said.get(Meaning.PRIORITY, 0),
        final=bool(said.get(Meaning.FINAL)),
        batch=bool(said.get(Meaning.BATCH)),
        resume_s=said.get(Meaning.RESUME),
        keep_s=said.get(Meaning.KEEP),
    )


def _timeout_s(said: Mapping[Meaning, Any], tokens: int) -> float | None:
    """Return the deadline; else that by which a stream ends that begins in time; else the timeout.

    The time to the first token is no deadline of the end: that of the other tokens is added.
    """
    deadline_s: float | None = said.get(Meaning.DEADLINE)
    if deadline_s is not None:
        return deadline_s
    times = [said.get(Meaning.TIMEOUT)]
    if Meaning.FIRST_TOKEN in said:
        first_s, token_s = said[Meaning.FIRST_TOKEN], said.get(Meaning.TOKEN, DECODE_S)
        times.append(first_s + token_s * (tokens - 1))
    return min((one for one in times if one is not None), default=None)
