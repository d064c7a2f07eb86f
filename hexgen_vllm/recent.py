"""Our own format, workflows as JSON lines: names, lengths and timings, never text.

One line for each workflow that ended::

    {"type": "text2sql", "tenant": "default", "arrived_s": 12.5, "deadline_s": 30.0,
     "latency_s": 21.3, "calls": [
       {"stage": "revise", "at_s": 0.0, "took_s": 1.2, "prompt": 5963, "cached": 3056,
        "output": 79}, ...]}

``arrived_s`` counts from any moment that all lines share; ``at_s`` from the workflow's arrival.
``deadline_s`` is ``null`` when there is none, ``latency_s`` when it did not finish, ``cached``
when the engine did not say how much of the prompt its prefix cache had.

Routers write no more than that. What comes from other formats also has, of each call, ``after``
(the calls that it waits for, by their place), ``think_s`` (from their end to its sending) and
``blocks`` (hashes of its prompt's blocks), and of a workflow ``block_tokens`` and ``local``, as in
:mod:`hexgen_vllm.sim.workloads.traces.model`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import known_names
from hexgen_vllm.wire import from_json

MAX_CALLS: Final = 1024
"""Calls of a workflow that a router remembers; those of other formats may have more."""
_MOST_CALLS: Final = 100_000
_MAX_TOKENS: Final = 10_000_000
_CALL_EXTRAS: Final[dict[str, Any]] = {"after": None, "think_s": 0.0, "blocks": ()}
_WORKFLOW_EXTRAS: Final[dict[str, Any]] = {"block_tokens": 0, "local": False}
_OPTIONAL: Final = {
    "tenant", "deadline_s", "latency_s", "cached", *_CALL_EXTRAS, *_WORKFLOW_EXTRAS
}  # fmt: skip
_TOLD: Final = object()
MAX_NAME: Final = 128


@dataclass(frozen=True, slots=True)
class RecentCall:
    """One answered call; lengths in tokens, times in seconds.

    Attributes:
        after, think_s, blocks: as in a trace; ``after`` is ``None`` when times say it.
    """

    stage: str
    at_s: float
    took_s: float
    prompt: int
    output: int
    cached: int | None = None
    after: tuple[int, ...] | None = None
    think_s: float = 0.0
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RecentWorkflow:
    """One workflow that ended."""

    type: str
    arrived_s: float
    calls: tuple[RecentCall, ...]
    tenant: str = "default"
    deadline_s: float | None = None
    latency_s: float | None = None
    block_tokens: int = 0
    local: bool = False

    def line(self) -> str:
        """Return it as one line of JSON, without the line break."""
        told = _without(asdict(self), _WORKFLOW_EXTRAS)
        told["calls"] = [_without(call, _CALL_EXTRAS) for call in told["calls"]]
        return json.dumps(told, separators=(",", ":"))


def _without(told: dict[str, Any], extras: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``told`` without those ``extras`` that say nothing."""
    return {key: value for key, value in told.items() if value != extras.get(key, _TOLD)}


class Ring:
    """The last ``size`` workflows, as a router remembers them for its tuner.

    Memory is bounded: a workflow with more than :data:`MAX_CALLS` calls is not kept.
    """

    def __init__(self, size: int = 2000) -> None:
        self._kept: deque[RecentWorkflow] = deque(maxlen=size)
        self.seen = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[RecentWorkflow]:
        return iter(self._kept)

    def add(self, workflow: RecentWorkflow) -> None:
        """Keep a workflow; the oldest one goes when the ring is full."""
        if 0 < len(workflow.calls) <= MAX_CALLS:
            self.seen += 1
            self._kept.append(workflow)

    def text(self) -> str:
        """Return all of them as JSON lines; another thread may add some meanwhile."""
        return "".join(f"{workflow.line()}\n" for workflow in list(self._kept))


def parse(lines: Iterable[str], name: str) -> list[RecentWorkflow]:
    """Read JSON lines, in order of arrival; empty lines are skipped.

    Args:
        lines: of the file.
        name: what errors call it.

    Raises:
        ConfigError: a line is wrong; names file, line and key.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_workflow(line, f"{name}, line {number}"))
    if not found:
        raise ConfigError(f"{name} holds no workflow.")
    return sorted(found, key=lambda w: w.arrived_s)


def _workflow(line: str, where: str) -> RecentWorkflow:
    try:
        data = from_json(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from None
    return workflow_in(data, where)


def workflow_in(data: Any, where: str) -> RecentWorkflow:
    """Return the workflow of one decoded line.

    Raises:
        ConfigError: it is wrong; names ``where`` and the key.
    """
    _check_keys(data, RecentWorkflow, where)
    listed = data["calls"]
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_CALLS:
        raise ConfigError(f'{where}: "calls" must be a list of 1 to {_MOST_CALLS} calls.')
    calls = tuple(_call(call, f"{where}, call {i}", i) for i, call in enumerate(listed, 1))
    if any(call.blocks for call in calls) and not data.get("block_tokens"):
        raise ConfigError(f'{where}: "block_tokens" is missing, and calls have "blocks".')
    return RecentWorkflow(
        type=_text(data, "type", where),
        arrived_s=_number(data, "arrived_s", where),
        calls=calls,
        tenant=_text(data, "tenant", where) if "tenant" in data else "default",
        deadline_s=_maybe_s(data, "deadline_s", where),
        latency_s=_maybe_s(data, "latency_s", where),
        block_tokens=_tokens(data, "block_tokens", where, 0) if "block_tokens" in data else 0,
        local=data.get("local") is True,
    )


def _call(data: object, where: str, place: int) -> RecentCall:
    known = _check_keys(data, RecentCall, where)
    cached = known.get("cached")
    return RecentCall(
        stage=_text(known, "stage", where),
        at_s=_number(known, "at_s", where),
        took_s=_number(known, "took_s", where, least=0.0),
        prompt=_tokens(known, "prompt", where, 1),
        output=_tokens(known, "output", where, 1),
        cached=None if cached is None else _tokens(known, "cached", where, 0),
        after=None if known.get("after") is None else _places(known, where, place),
        think_s=_number(known, "think_s", where, 0.0) if "think_s" in known else 0.0,
        blocks=_blocks(known, where),
    )


def _places(data: Mapping[str, Any], where: str, place: int) -> tuple[int, ...]:
    value = data["after"]
    good = isinstance(value, list) and all(type(v) is int and 0 <= v < place - 1 for v in value)
    if not good:
        raise ConfigError(f'{where}: "after" must list places of calls before it, not {value!r}.')
    return tuple(value)


def _blocks(data: Mapping[str, Any], where: str) -> tuple[int, ...]:
    value = data.get("blocks", [])
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise ConfigError(f'{where}: "blocks" must be a list of whole numbers.')
    return tuple(value)


def _check_keys(data: object, cls: type[Any], where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a JSON object.")
    names = [f.name for f in fields(cls)]
    for key in data:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {known_names(key, names)}.")
    for f in fields(cls):
        if f.name not in _OPTIONAL and f.name not in data:
            raise ConfigError(f'{where}: "{f.name}" is missing.')
    return data


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise ConfigError(f'{where}: "{key}" must be a name, not {value!r}.')
    return value


def _number(data: Mapping[str, Any], key: str, where: str, least: float = -math.inf) -> float:
    value = data[key]
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least:
        raise ConfigError(f'{where}: "{key}" must be a number of seconds, not {value!r}.')
    return float(value)


def _maybe_s(data: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if data.get(key) is None else _number(data, key, where, 0.0)


def _tokens(data: Mapping[str, Any], key: str, where: str, least: int) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_TOKENS:
        raise ConfigError(
            f'{where}: "{key}" must be a whole number from {least} to {_MAX_TOKENS}, not {value!r}.'
        )
    return value
