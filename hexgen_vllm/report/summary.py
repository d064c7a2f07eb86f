"""What a run amounts to: percentiles, deadlines met, goodput, and their spread over seeds.

One definition of each, used by the live bench, the simulator and the tuner:

- Percentile at share q of n values: the ceil(q·n)-th smallest (nearest rank), a value that
  occurred. No interpolation.
- Min deadline @q: the smallest deadline that a share q of *all* workflows meet; one that failed
  or was lost meets none. The paper's metric, there as a multiple of a base SLO.
- On time: finished within its own deadline; failed, rejected and lost count as late.
- Goodput: workflows on time per second of the run.
- Sustained rate at q: the highest arrival rate up to which every measured rate has a share of at
  least q on time. The paper's throughput.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from hexgen_vllm.records import CallRecord, WorkflowRecord


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of ``values`` do not exceed.

    Args:
        values: numbers in any order, ``inf`` allowed; none gives ``nan``.
        share: more than 0, at most 1.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be more than 0 and at most 1, not {share}")
    if not values:
        return math.nan
    # 0.07 * 100 is 7.000000000000001: a rank must not grow by a rounding error.
    rank = math.ceil(round(share * len(values), 9))
    return sorted(values)[rank - 1]


class MinDeadline(NamedTuple):
    """The smallest deadline that a share of workflows meet; ``inf`` when none does."""

    seconds: float
    scale: float  # seconds over the base SLO


def min_deadline(latencies_s: Sequence[float | None], share: float, base_s: float) -> MinDeadline:
    """Return the smallest deadline that ``share`` of workflows meet.

    Args:
        latencies_s: one per workflow, ``None`` for one that did not finish.
        share: more than 0, at most 1.
        base_s: base SLO, seconds, more than 0.

    Raises:
        ValueError: ``share`` or ``base_s`` is out of range.
    """
    if not base_s > 0:
        raise ValueError(f"base_s must be more than 0, not {base_s}")
    seconds = percentile([math.inf if v is None else v for v in latencies_s], share)
    return MinDeadline(seconds, seconds / base_s)


def attainment(latencies_s: Sequence[float | None], deadline_s: float) -> float:
    """Return the share of workflows that meet ``deadline_s``, ``nan`` when there are none."""
    if not latencies_s:
        return math.nan
    met = sum(1 for v in latencies_s if v is not None and v <= deadline_s)
    return met / len(latencies_s)


def goodput(records: Iterable[WorkflowRecord], duration_s: float) -> float:
    """Return workflows on time per second of a run of ``duration_s``."""
    return sum(r.on_time for r in records) / duration_s if duration_s > 0 else math.nan


class Spread(NamedTuple):
    """One figure over several seeds."""

    mean: float
    least: float
    most: float
    deviation: float  # of the population
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Return mean, range and standard deviation; ``nan`` for no value, ``inf`` is kept."""
    if not values:
        return Spread(math.nan, math.nan, math.nan, math.nan, 0)
    finite = all(map(math.isfinite, values))
    deviation = pstdev(values) if finite else math.nan
    return Spread(fmean(values), min(values), max(values), deviation, len(values))


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The figures of one run; seconds unless named otherwise, ``nan`` when there is no value.

    Attributes:
        policy: name of what was measured.
        seed: seed of workload and arrivals.
        rate: mean arrivals per second.
        workflows: workflows of the run.
        on_time: of them, finished within their deadline.
        p50_s, p95_s, p99_s: latency of the workflows that finished.
        min_deadline_95_s, min_deadline_99_s: over all workflows, ``inf`` when out of reach.
        min_deadline_95_x, min_deadline_99_x: the same over the base SLO.
        ttft_p50_s, ttft_p95_s: time to first token of calls.
        goodput_per_s: workflows on time per second, from the first arrival to the last end.
        answered_calls: calls that were answered.
        errors: workflows that failed with an error.
        lost: workflows that neither finished nor failed.
    """

    policy: str
    seed: int
    rate: float
    workflows: int
    on_time: int
    p50_s: float
    p95_s: float
    p99_s: float
    min_deadline_95_s: float
    min_deadline_99_s: float
    min_deadline_95_x: float
    min_deadline_99_x: float
    ttft_p50_s: float
    ttft_p95_s: float
    goodput_per_s: float
    answered_calls: int
    errors: int
    lost: int


def summarise(
    workflows: Sequence[WorkflowRecord],
    calls: Sequence[CallRecord],
    *,
    policy: str,
    seed: int,
    rate: float,
    base_s: float,
) -> RunSummary:
    """Return the figures of a run; ``base_s`` is the base SLO in seconds."""
    latencies = [record.latency_s for record in workflows]
    done = [v for v in latencies if v is not None]
    ttfts = [call.ttft_s for call in calls if call.ttft_s is not None]
    at_95, at_99 = (min_deadline(latencies, share, base_s) for share in (0.95, 0.99))
    return RunSummary(
        policy=policy,
        seed=seed,
        rate=rate,
        workflows=len(workflows),
        on_time=sum(record.on_time for record in workflows),
        p50_s=percentile(done, 0.50),
        p95_s=percentile(done, 0.95),
        p99_s=percentile(done, 0.99),
        min_deadline_95_s=at_95.seconds,
        min_deadline_99_s=at_99.seconds,
        min_deadline_95_x=at_95.scale,
        min_deadline_99_x=at_99.scale,
        ttft_p50_s=percentile(ttfts, 0.50),
        ttft_p95_s=percentile(ttfts, 0.95),
        goodput_per_s=goodput(workflows, _duration_s(workflows)),
        answered_calls=sum(call.error is None for call in calls),
        errors=sum(record.error is not None for record in workflows),
        lost=sum(record.lost for record in workflows),
    )


def _duration_s(workflows: Sequence[WorkflowRecord]) -> float:
    """Return seconds from the first arrival to the end of the last workflow that finished."""
    ends = [r.arrived_s + r.latency_s for r in workflows if r.latency_s is not None]
    return max(ends) - min(r.arrived_s for r in workflows) if ends else 0.0


def stage_figures(calls: Iterable[CallRecord]) -> dict[str, dict[str, Any]]:
    """Return per stage: calls, errors, TTFT and latency P50/P95, and calls per engine."""
    stages: dict[str, list[CallRecord]] = {}
    for call in calls:
        stages.setdefault(call.stage, []).append(call)
    return {name: _stage(members) for name, members in sorted(stages.items())}


def _stage(calls: Sequence[CallRecord]) -> dict[str, Any]:
    answered = [call for call in calls if call.error is None]
    latencies = [call.latency_s for call in answered]
    ttfts = [call.ttft_s for call in answered if call.ttft_s is not None]
    engines = Counter(call.engine for call in answered if call.engine is not None)
    return {
        "calls": len(answered),
        "errors": len(calls) - len(answered),
        "latency_p50_s": percentile(latencies, 0.50),
        "latency_p95_s": percentile(latencies, 0.95),
        "ttft_p50_s": percentile(ttfts, 0.50),
        "ttft_p95_s": percentile(ttfts, 0.95),
        "engines": dict(sorted(engines.items())),
    }
