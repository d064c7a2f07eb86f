"""From the records of a simulation to figures, in the same words as live results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, Final

from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.report.summary import (
    RunSummary,
    min_deadline,
    percentile,
    stage_figures,
    summarise,
)
from hexgen_vllm.report.table import aligned, seconds
from hexgen_vllm.sim.engine.engine import StepObserver
from hexgen_vllm.sim.limits import Limits, uncontended
from hexgen_vllm.sim.scenario import DeadlineOptions, Scenario, ScenarioRun
from hexgen_vllm.sim.simulator import Simulation
from hexgen_vllm.sim.workloads.workload import WorkflowSpec
from hexgen_vllm.wire import plain

TRUE_RATES: Final = "true rates: policies know what steps cost, which live they must learn"
"""Title of results that were played so."""
_LEGEND: Final = (
    "times in seconds; range of on time over seeds in brackets; goodput is workflows on time per "
    "second; - is no value"
)
_OWN: Final = "x base: multiples of each workflow's own time alone"
Row = dict[str, Any]


def simulate(
    scenario: Scenario,
    run: ScenarioRun,
    bounds: Limits,
    specs: Sequence[WorkflowSpec] | None = None,
    *,
    observer: StepObserver | None = None,
    progress: Callable[[int], None] | None = None,
) -> Simulation:
    """Play one run to its end and return it.

    Args:
        scenario: what it belongs to.
        run: which one.
        bounds: of the scenario; give the base SLO.
        specs: its workflows if they are known already.
        observer: sees every engine step.
        progress: called with the number of workflows that have ended, each time one does.
    """
    deadline_s = scenario.deadline.of(scenario.base_s(bounds), scenario.fleet)
    simulation = Simulation(
        scenario.fleet,
        run.policy,
        deadline_s,
        scenario.simulation,
        observer=observer,
        seed=run.seed,
    )
    simulation.run(scenario.specs(run) if specs is None else specs, progress)
    return simulation


def row(scenario: Scenario, run: ScenarioRun, bounds: Limits, simulation: Simulation) -> Row:
    """Return the result as one JSON object; ``null`` stands for no value and for never.

    ``latencies_s`` and ``arrivals_s`` have one entry for each workflow, in order of arrival.
    """
    workflows, calls = counted(scenario, simulation)
    base_s = scenario.base_s(bounds)
    summary = summarise(
        workflows, calls, policy=run.policy.name, seed=run.seed, rate=run.rate, base_s=base_s
    )
    if scenario.deadline.by == "own":
        summary = _by_own_time(summary, scenario, run, workflows)
    horizon_s = percentile(bounds.horizons_s, 0.95)
    errors = Counter(w.error for w in workflows if w.error is not None)
    engines = Counter(c.engine for c in calls if c.engine is not None)
    figures = {
        **asdict(summary),
        "load": run.load,
        "deadline_s": _deadline_s(scenario, base_s, workflows),
        "deadline_by": scenario.deadline.by,
        "base_s": base_s,
        "capacity_per_s": bounds.rate_per_s,
        "cold_capacity_per_s": bounds.cold_rate_per_s,
        "horizon_95_s": horizon_s,
        "p95_over_horizon": summary.p95_s / horizon_s,
        "cached_share": cached_share(simulation),
        "preemptions": preemptions(simulation),
        "workload": scenario.workload.name,
        "burstiness": scenario.arrivals.burstiness,
        "length_scale": scenario.workload.length_scale,
        "warmup": scenario.workload.warmup,
        "rates": scenario.simulation.rates,
        "step_noise": scenario.simulation.step_noise,
        "latencies_s": [w.latency_s for w in workflows],
        "arrivals_s": [w.arrived_s for w in workflows],
        "error_messages": dict(sorted(errors.items())),
        "calls": {"stages": stage_figures(calls), "engines": dict(sorted(engines.items()))},
    }
    return {**plain(figures, 6)}


def _deadline_s(
    scenario: Scenario, base_s: float, workflows: Sequence[WorkflowRecord]
) -> float | None:
    """Return the deadline of workflows; their mean where each has its own."""
    if scenario.deadline.by == "base":
        return scenario.deadline.scale * base_s
    return fmean(w.deadline_s for w in workflows) if workflows else None


def _by_own_time(
    summary: RunSummary, scenario: Scenario, run: ScenarioRun, workflows: Sequence[WorkflowRecord]
) -> RunSummary:
    """Return ``summary`` with least deadlines as multiples of each workflow's own time alone."""
    alone = {spec.workflow_id: uncontended(scenario.fleet, spec) for spec in scenario.specs(run)}
    scales = [
        None if w.latency_s is None else alone[w.workflow_id].scale(w.latency_s) for w in workflows
    ]
    at_95, at_99 = (min_deadline(scales, share, 1.0).scale for share in (0.95, 0.99))
    return replace(
        summary,
        min_deadline_95_s=math.nan,
        min_deadline_99_s=math.nan,
        min_deadline_95_x=at_95,
        min_deadline_99_x=at_99,
    )


def counted(
    scenario: Scenario, simulation: Simulation
) -> tuple[list[WorkflowRecord], list[CallRecord]]:
    """Return the records of workflows after the warm-up, in order of arrival."""
    in_order = sorted(simulation.workflows, key=lambda w: (w.arrived_s, w.workflow_id))
    workflows = in_order[scenario.workload.warmup :]
    names = {w.workflow_id for w in workflows}
    return workflows, [c for c in simulation.calls if c.workflow_id in names]


def cached_share(simulation: Simulation) -> float:
    """Return the share of prompt tokens that prefix caches served."""
    return simulation.records.cached_tokens / max(simulation.records.prompt_tokens, 1)


def preemptions(simulation: Simulation) -> int:
    """Return the preemptions in all engines."""
    return sum(engine.batch.preemptions for engine in simulation.engines.values())


RowView = Mapping[str, Any]
_FIGURES: Final[tuple[tuple[str, str, Callable[[float | None], str]], ...]] = (
    ("min deadline @95%", "min_deadline_95_s", seconds),
    ("x base", "min_deadline_95_x", seconds),
    ("@99%", "min_deadline_99_s", seconds),
    ("x base", "min_deadline_99_x", seconds),
    ("goodput/s", "goodput_per_s", lambda v: "-" if v is None else f"{v:.3f}"),
    ("P50", "p50_s", seconds),
    ("P95", "p95_s", seconds),
    ("x horizon", "p95_over_horizon", seconds),
    ("TTFT P95", "ttft_p95_s", seconds),
    ("cached", "cached_share", lambda v: "-" if v is None else f"{v:.0%}"),
    ("preempted", "preemptions", lambda v: "-" if v is None else f"{v:.0f}"),
)


def summary_table(rows: Sequence[RowView]) -> str:
    """Return one line per policy and load, means over seeds."""
    groups: dict[tuple[float, str], list[RowView]] = {}
    for row in rows:
        # By the rounded load: λ* is the same for all seeds, so rates of one load are, too.
        groups.setdefault((round(row["load"], 4), row["policy"]), []).append(row)
    heads = ["policy", "load", "rate/s", "runs", "on time", *(name for name, _, _ in _FIGURES)]
    lines = [
        [policy, f"{load:.2f}", f"{runs[0]['rate']:.3f}", str(len(runs)), _on_time(runs)]
        + [show(_mean(runs, key)) for _, key, show in _FIGURES]
        for (load, policy), runs in groups.items()
    ]
    text = f"{aligned(heads, lines)}\n\n{_LEGEND}"
    if any(row.get("deadline_by") == "own" for row in rows):
        text = f"{text}; {_OWN}"
    return f"{TRUE_RATES}\n\n{text}" if any(r["rates"] == "true" for r in rows) else text


def limits_text(bounds: Limits, deadline: DeadlineOptions, base_s: float) -> str:
    """Return the limits as text."""
    horizons = bounds.horizons_s
    if deadline.by == "own":
        told = f"{deadline.scale:g} x each workflow's own time alone"
    else:
        told = f"{deadline.scale * base_s:.1f} s"
    return (
        f"limits: capacity λ* {bounds.rate_per_s:.3f} workflows/s "
        f"({bounds.cold_rate_per_s:.3f} without prefix cache), standalone horizon "
        f"P50 {percentile(horizons, 0.5):.1f} s, P95 {percentile(horizons, 0.95):.1f} s\n"
        f"base SLO {base_s:.1f} s, deadline {told}"
    )


def _mean(runs: Sequence[RowView], key: str) -> float | None:
    values = [run[key] for run in runs]
    return None if any(v is None for v in values) else fmean(values)


def _on_time(runs: Sequence[RowView]) -> str:
    shares = [run["on_time"] / run["workflows"] for run in runs]
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{fmean(shares):.1%} [{min(shares):.1%}, {max(shares):.1%}]"
