"""From runs to the goals: ratios, per scenario, in the mean and at worst. Values only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final, NamedTuple

Row = Mapping[str, Any]

STOCK: Final = "round_robin+fcfs"
EDF: Final = "least_outstanding+edf"
HEXGEN: Final = "hexgen"
OURS: Final = "slack"
PROTECT: Final = "slack protect"
ORACLE: Final = "oracle"
BASELINES: Final = (STOCK, "least_outstanding+fcfs", EDF, HEXGEN)
ON_TIME: Final = 0.95


class Goal(NamedTuple):
    """One line of the table of goals."""

    key: str
    text: str
    goal: float
    more_is_better: bool = True

    def reached(self, value: float | None) -> bool:
        """Return whether ``value`` meets the goal."""
        if value is None:
            return False
        return value >= self.goal if self.more_is_better else value <= self.goal


GOALS: Final = (
    Goal("min_deadline_95_vs_stock", "min deadline @95 %, 0.3 / 0.45 / 0.6 λ*, stock ÷ ours", 2.0),
    Goal("min_deadline_95_vs_hexgen", "min deadline @95 %, 0.8 λ*, paper's policy ÷ ours", 1.3),
    Goal("min_deadline_95_vs_edf", "min deadline @95 %, 0.8 λ*, EDF ÷ ours", 1.2),
    Goal("sustained_vs_stock", "sustained rate, ours ÷ stock", 1.9),
    Goal("sustained_vs_hexgen", "sustained rate, ours ÷ paper's policy", 1.25),
    Goal("goodput_overload_vs_hexgen", "on-time goodput, 1.3 and 2 λ*, ours ÷ paper's", 2.5),
    Goal("goodput_overload_vs_best_baseline", "the same, ours ÷ best baseline", 1.3),
    Goal("p95_over_oracle", "P95 ÷ P95 of the oracle, 0.8 λ*", 1.10, more_is_better=False),
    Goal("sustained_over_lp", "sustained rate ÷ λ*", 0.85),
    Goal(
        "live_min_deadline_95_vs_vllm_router",
        "live, min deadline @95 %, vllm-router (programs) ÷ ours",
        1.3,
    ),
)


class Figures:
    """The runs of one scenario."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._runs: dict[tuple[str, float], list[Row]] = {}
        for row in rows:
            self._runs.setdefault((row["policy"], row["load"]), []).append(row)

    @property
    def loads(self) -> list[float]:
        """All loads, ascending."""
        return sorted({load for _, load in self._runs})

    @property
    def policies(self) -> list[str]:
        """All policies, in order of first appearance."""
        return list(dict.fromkeys(policy for policy, _ in self._runs))

    def runs(self, policy: str, load: float) -> Sequence[Row]:
        """Return the runs of a policy at a load, one per seed."""
        return self._runs.get((policy, load), ())

    def mean(self, policy: str, load: float, key: str) -> float | None:
        """Return a figure's mean over seeds, ``None`` when a run has none."""
        values = [run[key] for run in self.runs(policy, load)]
        return None if not values or None in values else fmean(values)

    def on_time(self, policy: str, load: float) -> float | None:
        """Return the mean share of workflows on time."""
        shares = [run["on_time"] / run["workflows"] for run in self.runs(policy, load)]
        return fmean(shares) if shares else None

    def collapsed(self, policy: str, load: float) -> bool:
        """Return whether a policy's queue grew without end in any run."""
        return any(run["collapsed"] for run in self.runs(policy, load))

    def sustained_at_most(self, policy: str) -> float | None:
        """Return :meth:`sustained`, or the lowest load when not even that is sustained."""
        found = self.sustained(policy)
        if found is not None:
            return found
        return next((x for x in self.loads if self.runs(policy, x)), None)

    def sustained(self, policy: str) -> float | None:
        """Return the load up to which 95 % are on time, between loads by a straight line.

        ``None`` when the lowest load fails; the highest load when none does.
        """
        before: tuple[float, float] | None = None
        for load in self.loads:
            share = self.on_time(policy, load)
            if share is None:
                continue
            if share < ON_TIME:
                return None if before is None else _crossing(before, (load, share))
            before = (load, share)
        return None if before is None else before[0]

    def ratio(self, key: str, over: str, under: str, load: float) -> float | None:
        """Return the ratio of a figure of two policies; ``None`` if either lacks it or the one
        that is compared against has collapsed."""
        against = over if under in (OURS, PROTECT) else under
        a, b = self.mean(over, load, key), self.mean(under, load, key)
        if a is None or not b or self.collapsed(against, load):
            return None
        return a / b


def _crossing(left: tuple[float, float], right: tuple[float, float]) -> float:
    (x0, y0), (x1, y1) = left, right
    return x0 + (x1 - x0) * (y0 - ON_TIME) / (y0 - y1)


def goals(figures: Figures) -> dict[str, float | None]:
    """Return every goal's value in one scenario; ``None`` where there is none."""
    ours = figures.sustained(OURS)
    values: dict[str, float | None] = {
        "min_deadline_95_vs_stock": mean_of(
            figures.ratio("min_deadline_95_s", STOCK, OURS, load) for load in (0.3, 0.45, 0.6)
        ),
        "min_deadline_95_vs_hexgen": figures.ratio("min_deadline_95_s", HEXGEN, OURS, 0.8),
        "min_deadline_95_vs_edf": figures.ratio("min_deadline_95_s", EDF, OURS, 0.8),
        "sustained_vs_stock": _divided(ours, figures.sustained_at_most(STOCK)),
        "sustained_vs_hexgen": _divided(ours, figures.sustained_at_most(HEXGEN)),
        "p95_over_oracle": figures.ratio("p95_s", OURS, ORACLE, 0.8),
        "sustained_over_lp": ours,
        "goodput_overload_vs_hexgen": _goodput(figures, (HEXGEN,)),
        "goodput_overload_vs_best_baseline": _goodput(figures, BASELINES),
        "live_min_deadline_95_vs_vllm_router": None,
    }
    return values


def _goodput(figures: Figures, baselines: Sequence[str]) -> float | None:
    """Return on-time workflows over those of the best of ``baselines``, mean of both overloads."""
    ratios = []
    for load in (1.3, 2.0):
        ours = figures.on_time(PROTECT, load)
        others = [s for b in baselines if (s := figures.on_time(b, load)) is not None]
        best = max(others, default=None)
        ratios.append(_divided(ours, best))
    return mean_of(ratios)


def _divided(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values there are, ``None`` when there is none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return fmean(known) if known else None


def summary(by_scenario: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Return ``summary``, means over text-to-SQL scenarios, and ``worst``, over all scenarios."""
    text2sql = [v for name, v in by_scenario.items() if name.startswith("text2sql")]
    means = {g.key: mean_of(values.get(g.key) for values in text2sql) for g in GOALS}
    return {"summary": means, "worst": {g.key: _worst(g, by_scenario) for g in GOALS}}


def _worst(
    goal: Goal, by_scenario: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any] | None:
    pairs = [(v, s) for s, values in by_scenario.items() if (v := values.get(goal.key)) is not None]
    if not pairs:
        return None
    choose: Callable[..., tuple[float, str]] = min if goal.more_is_better else max
    value, scenario = choose(pairs)
    return {"value": value, "scenario": scenario}
