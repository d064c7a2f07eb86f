"""What a request says in the words of other projects.

Our own names (``x-hexgen-*`` headers, ``hexgen_*`` keys of ``vllm_xargs``) are read by
:mod:`hexgen_vllm.wire` and go first. These are read for clients that know nothing of us. Foreign
values never make a request fail: what cannot be read was not said.

A foreign session is not a workflow with an end-to-end deadline: it may last for hours. Its
deadlines count per call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from hexgen_vllm.router.words import ANY_VENDOR, READ_TIMEOUT, WORDS, Meaning, WordPlace

_DECODE_S: Final = 0.05
"""Time of an output token where only that of the first one is asked for: 20 a second, faster than
anybody reads."""
_DECODE_TOKENS: Final = 256
"""Output tokens for which that time is given where nothing is said of the length."""
_MOST_BAGGAGE: Final = 8192  # bytes, as W3C has it
_MOST_BLOCKS: Final = 16  # looked at; Anthropic takes four
_CACHE_CONTROL: Final = b'"cache_control"'
_VALUE: Final = re.compile(rb"[ \t\r\n]{0,100}:[ \t\r\n]{0,100}(\{[^{}]{0,200}\})")
_ENDS_VENDOR: Final = "-session-id"
_VENDOR_SESSION: Final = re.compile(r"x-(?!parent-)[a-z0-9]+-session-id")


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
        priority: higher is sooner, 0 is normal, within ``MAX_PRIORITY`` of the claims.
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


def read(headers: Mapping[str, str], body: Mapping[str, Any], raw: bytes = b"") -> Foreign:
    """Read every word.

    Args:
        headers: by lower-case name.
        body: decoded; what is long or deep may lack.
        raw: its bytes, where it has a prompt whose parts may say something.
    """
    found: list[tuple[int, object]] = []
    for name, text in headers.items():
        if name in _HEADERS or name.endswith(_ENDS_VENDOR):
            found += [(rank, text) for rank in _ranks(name)]
    if not _FIELDS.keys().isdisjoint(body):
        ranks = [rank for name in _FIELDS.keys() & body.keys() for rank in _FIELDS[name]]
        found += [(rank, _at(body, _PATHS[rank])) for rank in ranks]
    if "baggage" in headers:
        found += _in_baggage(headers["baggage"])
    if raw.find(_CACHE_CONTROL) >= 0:  # ``in`` takes four times as long to look into bytes
        found += [(_BLOCK, value) for value in _longest(raw)]
    if not found:
        return _NOTHING
    said: dict[Meaning, Any] = {}
    for rank, value in sorted(found, key=lambda one: one[0]):
        word = WORDS[rank]
        if word.name == READ_TIMEOUT and body.get("stream"):
            continue  # means one wait, so not the whole of a stream
        known = said.get(word.meaning)
        if known is not None and word.meaning is not Meaning.TIMEOUT:
            continue
        meant = word.form.read(value)
        if meant is not None:
            said[word.meaning] = meant if known is None else min(known, meant)
    return _together(said)


def _ranks(name: str) -> list[int]:
    found = _HEADERS.get(name)
    if found is None:
        return _VENDOR if _VENDOR_SESSION.fullmatch(name) else []
    return found


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
    read_s = WORDS[_BLOCK].form.read
    return sorted(found, key=lambda one: read_s(one) or 0.0, reverse=True)


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
        timeout_s=_timeout_s(said, length or _DECODE_TOKENS),
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
        first_s, token_s = said[Meaning.FIRST_TOKEN], said.get(Meaning.TOKEN, _DECODE_S)
        times.append(first_s + token_s * (tokens - 1))
    return min((one for one in times if one is not None), default=None)
