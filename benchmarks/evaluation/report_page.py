"""The page of the evaluation: margins, wins and losses, where it loses, scenarios. Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from benchmarks.evaluation.evaluation import (
    FIGURES,
    NO_RIVALS,
    OURS,
    Cell,
    Margin,
    Results,
    behind,
)
from hexgen_vllm.report.table import markdown, seconds

ABLATION: Final = "ablation"

_INTRO: Final = """# Evaluation

Written by `{command}` from the scenario files in
`{folder}`; do not edit. All figures but those under Live are simulated. {size}

How it is compared. A cell is one scenario at one load with one seed: every policy gets the same
workflows at the same moments. λ* is the fleet's fluid capacity with a perfect prefix cache, load
the arrival rate over it. The simulated engines take 3 % longer or shorter at random, and our
policy knows their speed only as fitted from their steps; rivals that weigh by speed are told it.
Each rival plays with its published knobs, and with knobs tuned in the same training scenarios and
on the same seed as ours ({tuned}); the paper's policy with its best alpha in each
cell. A policy whose queue grows through the second half of a run has no deadline to compare: it is
left out of ratios and listed. Above λ* rivals have a cap on open workflows, the best of a grid on
another seed. Formulas and sources of the rivals: `hexgen_vllm/policy/rivals.py`.

A ratio above 1 says that the best rival of the cell needs that many times our deadline.

Goals are against the best rival of each cell in hindsight. The best of a dozen is in part the
luckiest, and nobody knows it in advance, so the same is shown against the rival that was best in
the other half of the same run, and against the one rival that is best over all cells. A cell is
lost or won beyond noise where 97.5 % of 400 draws of its workflows, in blocks of 20, say so.
"""
_GOAL_TEXTS: Final = {
    "best_rival_md95": ("best rival ÷ ours, deadline that 95 % meet, geometric mean", "≥ 1.10"),
    "best_rival_md99": ("the same, 99 %", "≥ 1.12"),
    "cells_lost_pct": ("cells lost by more than 1 % @95, %", "≤ 3"),
    "p50_vs_best_rival": ("best rival ÷ ours, P50", "≥ 0.99"),
    "longest_tenth_vs_best_rival": ("longest tenth of workflows on time, ours ÷ best rival", "≥ 1"),
    "overload_vs_best_capped": ("above λ*: on time, ours ÷ best capped rival", "≥ 1.10"),
    "fitted_over_true_md95": ("fitted ÷ true rates, deadline that 95 % meet", "≤ 1.03"),
    "live_vs_worst_margin": ("live: least ratio of a rival's deadline to ours", "≥ 1.15"),
}


@dataclass(frozen=True)
class Section:
    """Results of one scenario.

    Attributes:
        name: of its file.
        about: its first comment.
        results: its runs.
        plots: links to images.
    """

    name: str
    about: str
    results: Results
    plots: tuple[str, ...] = ()


def page(
    said: Mapping[str, str],
    totals: Mapping[str, Any],
    results: Results,
    sections: Sequence[Section],
    live: str = "",
) -> str:
    """Return the whole page.

    Args:
        said: command, folder, size and tuned knobs, in words.
        totals: summary and worst cells.
        results: of all scenarios but ablations.
        sections: one a scenario.
        live: the part about runs on real engines.
    """
    parts = [
        _INTRO.format(**said),
        _goals(totals),
        _wins(results),
        _loses(results),
        live,
        *(_section(section) for section in sections),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _goals(totals: Mapping[str, Any]) -> str:
    lines = []
    for key, (text, goal) in _GOAL_TEXTS.items():
        value = totals["summary"].get(key)
        worst = totals["worst"].get(key)
        others = [
            _number(known) if (known := totals["summary"].get(f"{key}_{how}")) else ""
            for how in ("chosen_apart", "one_rival")
        ]
        found = (_number(value), _reached(goal, value))
        lines.append((text, goal, *found, *others, _worst(worst)))
    heads = (
        "figure", "goal", "found", "reached",
        "rival of the other half", "one rival for all", "worst cell",
    )  # fmt: skip
    return "## Goals\n\n" + markdown(heads, lines) + _noise(totals["summary"])


def _noise(figures: Mapping[str, Any]) -> str:
    lost, won = (figures.get(f"cells_{name}_beyond_noise_pct") for name in ("lost", "won"))
    if lost is None or won is None:
        return ""
    return f"\nBeyond noise, @95: {lost:.1f} % of cells lost, {won:.1f} % won.\n"


def _reached(goal: str, value: float | None) -> str:
    if value is None:
        return "not run"
    sign, number = goal.split()
    good = value >= float(number) if sign == "≥" else value <= float(number)
    return "yes" if good else "no"


def _worst(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return ""
    if "points" in worst:
        return f"{worst['points']:+.1f} points ({worst['cell']})"
    return f"{worst['value']:.3g} ({worst['cell']})"


def _wins(results: Results) -> str:
    """Return the table of every rival, and of the best one of each cell."""
    lines = []
    below = [name for name in results.rivals if not name.endswith(" capped")]
    for name in (*below, None):
        rivals = results.rivals if name is None else [name]
        cells = [name or "**the best of each cell**"]
        for figure in FIGURES.values():
            cells += _margin(results.margin(figure, rivals))
        lines.append(cells)
    heads = ["rival"]
    for figure in FIGURES.values():
        heads += [f"{figure.text}: rival ÷ ours", "worst", "lost"]
    return f"## Rivals, load up to λ*\n\n{markdown(tuple(heads), lines)}"


def _margin(margin: Margin | None) -> list[str]:
    if margin is None:
        return ["–", "–", "–"]
    return [f"{margin.mean:.3f}", f"{margin.worst:.2f}", f"{margin.lost} of {margin.cells}"]


def _loses(results: Results) -> str:
    """Return where ours is behind, cell by cell."""
    figure = FIGURES["best_rival_md95"]
    lines = []
    for cell in results.below_capacity():
        ratio = results.ratio(cell, figure, results.rivals)
        if ratio is not None and ratio < 1.0:
            rival, deadline = _best(results, cell)
            lines.append((str(cell), f"{ratio:.3f}", rival, seconds(deadline)))
    parts = ["## Where it loses\n"]
    if lines:
        heads = ("cell", "best rival ÷ ours, @95", "rival", "its deadline, s")
        parts.append(markdown(heads, lines))
    else:
        parts.append("In no cell does a rival have a shorter deadline @95.\n")
    late = [(str(cell), f"{ours:.1f}", f"{best:.1f}") for cell, ours, best in behind(results)]
    if late:
        parts.append("Fewer on time by more than a point, where a rival has at least half:\n")
        parts.append(markdown(("cell", "ours, %", "best rival, %"), late))
    grown: dict[str, int] = {}
    for name, _ in results.growing():
        grown[name] = grown.get(name, 0) + 1
    if grown:
        said = ", ".join(f"{name} ({count})" for name, count in sorted(grown.items()))
        parts.append(
            f"Queues that grew below λ*, left out of ratios, and in how many cells: {said}.\n"
        )
    return "\n".join(parts)


def _best(results: Results, cell: Cell) -> tuple[str, float | None]:
    found = {
        name: value
        for name in results.rivals
        if (value := results.value(cell, name, "min_deadline_95_s")) is not None
    }
    best = min(found, key=lambda name: found[name], default="")
    return best, found.get(best)


def _section(section: Section) -> str:
    results = section.results
    parts = [f"## {section.name}\n\n{section.about}\n", _limits(results)]
    parts.append("Deadline that 95 % meet, seconds:\n\n" + _by_load(results, _deadline))
    parts.append("On time, %:\n\n" + _by_load(results, _share("share_on_time")))
    if not section.name.startswith(ABLATION):
        parts.append("Longest tenth on time, %:\n\n" + _by_load(results, _share("longest_tenth")))
    tenants = _tenants(results)
    if tenants:
        parts.append(tenants)
    parts += [f"![{section.name}]({plot})\n" for plot in section.plots]
    return "\n".join(parts)


def _limits(results: Results) -> str:
    first = next(run for c in results.cells for p in results.policies if (run := results.run(c, p)))
    return (
        f"λ* {first['capacity_per_s']:.3f} workflows/s, base SLO {first['base_s']:.1f} s, deadline "
        f"{first['deadline_s']:.1f} s, standalone horizon P95 {first['horizon_95_s']:.1f} s.\n"
    )


def _by_load(results: Results, shown: Any) -> str:
    loads = sorted({cell.load for cell in results.cells})
    lines = []
    for policy in results.policies:
        runs = [
            [run for c in results.cells if c.load == at and (run := results.run(c, policy))]
            for at in loads
        ]
        lines.append((f"**{policy}**" if policy in NO_RIVALS else policy, *map(shown, runs)))
    return markdown(("policy", *(f"{at:g}" for at in loads)), lines)


def _deadline(runs: Sequence[Mapping[str, Any]]) -> str:
    values = [run["min_deadline_95_s"] for run in runs]
    if not values:
        return ""
    if None in values:  # more than 5 % were refused
        return "–"
    mark = " grows" if any(run["grows"] for run in runs) else ""
    return f"{seconds(fmean(values))} ±{seconds((max(values) - min(values)) / 2)}{mark}"


def _share(key: str) -> Any:
    return lambda runs: f"{100 * fmean(run[key] for run in runs):.1f}" if runs else ""


def _tenants(results: Results) -> str:
    names = sorted({t for c in results.cells for p in results.policies
                    for t in (results.run(c, p) or {"tenants": ()})["tenants"]})  # fmt: skip
    if len(names) < 2:
        return ""
    lines = []
    for policy in results.policies:
        runs = [run for c in results.below_capacity() if (run := results.run(c, policy))]
        if runs:
            shares = [fmean(run["tenants"].get(name, 0.0) for run in runs) for name in names]
            shown = f"**{policy}**" if policy == OURS else policy
            lines.append((shown, *(f"{100 * share:.1f}" for share in shares)))
    return "On time by tenant, up to λ*, %:\n\n" + markdown(("policy", *names), lines)
