"""The page of the evaluation: goals, one section per scenario, ablation. Markdown, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from hexgen_vllm.bench.evaluation import GOALS, OURS, Figures, Goal
from hexgen_vllm.bench.table import markdown, seconds

ABLATION: Final = "ablation"

_INTRO: Final = """# Evaluation

Written by `hexgen-vllm bench report` from the scenario files in `{folder}`; do not edit.
All figures but those under Live are simulated. {size}

Terms: λ* is the fluid capacity with a perfect prefix cache, load is the arrival rate over it. Min
deadline @95 % is the shortest deadline that 95 % of workflows meet. Sustained rate is the load up
to which 95 % meet the scenario's own deadline, on a straight line between measured loads; a
baseline that misses it at the lowest load is taken to sustain that load, in its favour. Above λ*,
on-time goodput counts refused and unfinished workflows as late. ∞ marks a policy whose queue grew
without end (median latency of the last quarter of workflows over twice that of the second);
ratios against it are left out of means. A sustained rate above λ* says that the run was too short
for its queue to outgrow the deadline. The paper's policy has its own best alpha of
0, 0.1, ..., 1 near each load, found on a seed that is not reported.
"""


@dataclass(frozen=True)
class Section:
    """Results of one scenario.

    Attributes:
        name: of its file.
        about: its first comment.
        figures: its runs.
        goals: value of each goal.
        alphas: the paper's best alpha by load.
        plots: links to images.
    """

    name: str
    about: str
    figures: Figures
    goals: Mapping[str, float | None]
    alphas: Mapping[float, float]
    plots: tuple[str, ...] = ()


def page(
    folder: str, size: str, totals: Mapping[str, Any], sections: Sequence[Section], live: str = ""
) -> str:
    """Return the whole page; ``live`` is the part about runs on real engines."""
    parts = [_INTRO.format(folder=folder, size=size), _goals(totals), live, _by_scenario(sections)]
    parts += [_section(section) for section in sections]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _goals(totals: Mapping[str, Any]) -> str:
    lines = [_goal(goal, totals) for goal in GOALS]
    heads = ("goal", "wanted", "mean over text2sql", "reached", "worst of all scenarios")
    return "## Goals\n\n" + markdown(heads, lines)


def _goal(goal: Goal, totals: Mapping[str, Any]) -> tuple[str, ...]:
    value, worst = totals["summary"][goal.key], totals["worst"][goal.key]
    sign = "≥" if goal.more_is_better else "≤"
    reached = "not run" if value is None else "yes" if goal.reached(value) else "no"
    least = "–" if worst is None else f"{worst['value']:.2f} ({worst['scenario']})"
    return goal.text, f"{sign} {goal.goal:g}", _number(value), reached, least


def _by_scenario(sections: Sequence[Section]) -> str:
    compared = [s for s in sections if not s.name.startswith(ABLATION)]
    names = [s.name for s in compared]
    lines = [
        (goal.text, *(_number(s.goals.get(goal.key)) for s in compared))
        for goal in GOALS
        if any(s.goals.get(goal.key) is not None for s in compared)
    ]
    return "## Goals by scenario\n\n" + markdown(("goal", *names), lines)


def _section(section: Section) -> str:
    figures = section.figures
    parts = [f"## {section.name}\n\n{section.about}\n", _limits(figures)]
    parts.append("Min deadline @95 %, seconds:\n\n" + _by_load(section, _deadline))
    parts.append("Workflows on time, %:\n\n" + _by_load(section, _share))
    if any(load > 1 for load in figures.loads):
        parts.append("Longest workflow, seconds (starvation):\n\n" + _by_load(section, _worst))
    if section.alphas:
        alphas = ", ".join(f"{a:g} at {load:g}" for load, a in section.alphas.items())
        parts.append(f"Best alpha of the paper's policy: {alphas}.\n")
    parts += [f"![{section.name}]({plot})\n" for plot in section.plots]
    return "\n".join(parts)


def _limits(figures: Figures) -> str:
    runs = [r for p in figures.policies for x in figures.loads for r in figures.runs(p, x)]
    first = runs[0]
    text = (
        f"λ* {first['capacity_per_s']:.3f} workflows/s, base SLO {first['base_s']:.1f} s, "
        f"deadline {first['deadline_s']:.1f} s, standalone horizon P95 "
        f"{first['horizon_95_s']:.1f} s."
    )
    over = _over_horizon(figures)
    return f"{text}{over}\n"


def _over_horizon(figures: Figures) -> str:
    found = [
        f"{value:.2f}× at {load:g}"
        for load in figures.loads
        if load <= 1 and (value := figures.mean(OURS, load, "p95_over_horizon")) is not None
    ]
    return f" P95 of {OURS} over the horizon: {', '.join(found)}." if found else ""


def _by_load(section: Section, cell: Any) -> str:
    figures = section.figures
    heads = ("policy", *(f"{load:g}" for load in figures.loads))
    lines = [(p, *(cell(figures, p, load) for load in figures.loads)) for p in figures.policies]
    return markdown(heads, lines)


def _deadline(figures: Figures, policy: str, load: float) -> str:
    if not figures.runs(policy, load):
        return ""
    runs = [run["min_deadline_95_s"] for run in figures.runs(policy, load)]
    if None in runs:  # more than 5 % were refused
        return "–"
    mark = " ∞" if figures.collapsed(policy, load) else ""
    return f"{seconds(fmean(runs))} ±{seconds((max(runs) - min(runs)) / 2)}{mark}"


def _share(figures: Figures, policy: str, load: float) -> str:
    share = figures.on_time(policy, load)
    return "" if share is None else f"{100 * share:.1f}"


def _worst(figures: Figures, policy: str, load: float) -> str:
    return seconds(figures.mean(policy, load, "worst_s")) if figures.runs(policy, load) else ""
