"""What several router processes show of themselves, as one: see :mod:`.overview`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hexgen_vllm.router.overview import SHOWN_DECISIONS, SHOWN_TYPES, SHOWN_WORKFLOWS

_Json = dict[str, Any]


def total(parts: Sequence[_Json]) -> _Json:
    """Return the overview of all processes; what all see alike is taken from the first.

    Calls, workflows and decisions are each known to one process. Engines are known to all, but
    the calls placed on them are not.

    Args:
        parts: at least one; the first is that of the process that was asked.
    """
    first = parts[0]
    shown = sorted(
        (one for part in parts for one in part["workflows"]["shown"]),
        key=lambda one: float("inf") if one["slack_s"] is None else one["slack_s"],
    )
    decisions = sorted(
        (one for part in parts for one in part["decisions"]), key=lambda one: float(one["age_s"])
    )
    workflows = _sums(part["workflows"] for part in parts)
    slack = [part["slack"]["calls"] for part in parts]
    return {
        **first,
        "up_s": min(part["up_s"] for part in parts),
        "calls": _calls([part["calls"] for part in parts]),
        "workflows": {**workflows, "shown": shown[:SHOWN_WORKFLOWS]},
        "slack": {**first["slack"], "calls": [sum(column) for column in zip(*slack, strict=True)]},
        "ended": _ended([part["ended"] for part in parts]),
        "engines": [_engine(one, parts) for one in first["engines"]],
        "decisions": decisions[:SHOWN_DECISIONS],
    }


def _sums(parts: Iterable[_Json]) -> _Json:
    """Return the sums of all numbers, by key."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update({name: n for name, n in part.items() if isinstance(n, int | float)})
    return dict(found)


def _calls(parts: Sequence[_Json]) -> _Json:
    failed = _sums(part["failed"] for part in parts)
    oldest_s = max(part["oldest_held_s"] for part in parts)
    return {**_sums(parts), "oldest_held_s": oldest_s, "failed": failed}


def _ended(parts: Sequence[_Json]) -> _Json:
    """Return the sums of periods and types; periods of two processes begin at different moments."""
    types: dict[str, list[_Json]] = {}
    for part in parts:
        for one in part["types"]:
            types.setdefault(one["type"], []).append(one)
    counts = [{"type": name, **_sums(of)} for name, of in types.items()]
    counts.sort(key=lambda one: -sum(n for n in one.values() if isinstance(n, int)))
    columns = zip(*(part["periods"] for part in parts), strict=True)
    return {
        **parts[0],
        "periods": [_sums(column) for column in columns],
        "types": counts[:SHOWN_TYPES],
    }


def _engine(one: _Json, parts: Sequence[_Json]) -> _Json:
    same = [e for part in parts for e in part["engines"] if e["name"] == one["name"]]
    placed = {name: sum(e.get(name) or 0 for e in same) for name in ("calls", "tokens")}
    return {**one, **{name: n for name, n in placed.items() if name in one}}
