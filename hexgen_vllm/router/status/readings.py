"""What the router says of itself, as numbers for :mod:`hexgen_vllm.policy.scaling`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

from hexgen_vllm.policy.scaling import OfferedLoad
from hexgen_vllm.router.engines.ranks import worker_of
from hexgen_vllm.types import StepCost

START_S: Final = 60.0
"""What the start of an engine is taken to last until one has been seen."""
_COST: Final = ("c0", "c1", "c2", "p0", "p1", "p2")
_Said = Mapping[str, Any]


class Rate:
    """How fast a count grows, smoothed; one that is smaller than before has begun anew.

    Args:
        window_s: time over which it is smoothed.
    """

    def __init__(self, window_s: float) -> None:
        self.per_s = 0.0
        self._window_s = window_s
        self._count: int | None = None
        self._at_s = 0.0

    def count(self, count: int, now: float) -> None:
        """Take in the count at ``now``."""
        before, passed_s = self._count, now - self._at_s
        if before is not None and count >= before and passed_s > 0:
            old = math.exp(-passed_s / self._window_s)
            self.per_s = old * self.per_s + (1 - old) * (count - before) / passed_s
        self._count, self._at_s = count, now


class Readings:
    """The latest of the router's answers, and what earlier ones add to it.

    Args:
        window_s: time over which arrivals are smoothed.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._overview: _Said = {}
        self._engines: list[_Said] = []
        self._mean_call: tuple[float, float] | None = None
        self._arrivals, self._answers = Rate(window_s), Rate(window_s)
        self._now = self._idle_s = 0.0

    def take(self, overview: _Said, diagnostics: _Said, now: float) -> None:
        """Take in an answer of ``/ui/data`` and one of ``/scheduling/diagnostics``."""
        self._overview, self._engines = overview, list(diagnostics["engines"])
        self._arrivals.count(overview["calls"]["received"], now)
        self._answers.count(overview["calls"]["answered"], now)
        self._now = now
        if not self._waiting():
            self._idle_s = now
        placed = [one for one in diagnostics["decisions"] if "uncached_tokens" in one]
        if placed:
            prompt = sum(one["uncached_tokens"] for one in placed) / len(placed)
            output = sum(one["expected_output_tokens"] for one in placed) / len(placed)
            self._mean_call = prompt, output

    def _waiting(self) -> int:
        return int(self._overview["calls"]["held"]) + sum(map(_queued, self._engines))

    def traffic(self, start_s: float | None) -> OfferedLoad:
        """Return what there is to do, if the start of an engine lasts ``start_s``."""
        slack, full_s = self._overview["slack"], self._now - self._idle_s
        bounds = (-math.inf, *slack["bounds_s"])
        return OfferedLoad(
            arrivals_per_s=self._arrivals.per_s,
            waiting=self._waiting(),
            slack=tuple(zip(bounds, slack["calls"], strict=True)),
            start_s=START_S if start_s is None else start_s,
            served_per_s=self._answers.per_s if full_s >= self._window_s else None,
        )

    def calls_per_s(self, names: Collection[str]) -> float | None:
        """Return the mean of what the engines ``names`` serve when all their slots are in use.

        ``None`` while no call was placed, or none of them has measured its steps.
        """
        rates: dict[str, float] = {}
        for engine in self._engines:
            name = worker_of(str(engine["name"]))
            rate = None if self._mean_call is None else _rate(engine, *self._mean_call)
            if name in names and rate is not None:
                rates[name] = rates.get(name, 0.0) + rate
        return sum(rates.values()) / len(rates) if rates else None

    def load(self, name: str) -> int:
        """Return the calls on an engine."""
        return sum(e["load"] for e in self._engines if worker_of(e["name"]) == name)


def _queued(engine: _Said) -> int:
    """Return the calls on an engine for which it has no slot."""
    slots = engine["max_num_seqs"]
    return 0 if slots is None else max(engine["load"] - slots, 0)


def _rate(engine: _Said, prompt: float, output: float) -> float | None:
    cost, slots = engine.get("cost"), engine["max_num_seqs"]
    if cost is None or not slots:
        return None
    step = StepCost(*(cost[name] for name in _COST))
    context = slots * (prompt + output / 2)
    call_s = step.prefill_s(prompt) + output * step.step_s(slots, context) / slots
    return 1.0 / call_s if call_s > 0 else None
