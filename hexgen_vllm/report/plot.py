"""Attainment: the share of workflows on time against the deadline, one line per policy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report.summary import attainment, percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

# Okabe and Ito's colours: told apart with any kind of colour vision; dashes help in grey print.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
STYLES: Final = {
    "slack": 0,
    "round_robin+fcfs": 1,
    "least_outstanding+fcfs": 2,
    "least_outstanding+edf": 3,
    "paper": 4,
    "slack protect": 5,
    "oracle": 5,  # the evaluation draws it up to full load, and protection beyond
    "vllm_router_program": 5,
    "vllm_router": 6,
}
"""Which colour and dash a policy has in every plot."""
OURS: Final = "slack"
POINTS: Final = 400
SQUEEZE: Final = 8.0  # the slowest run's P99 is drawn up to this many times the fastest's
_FIRST: Final = 0.02  # the share on time at which the axis of deadlines begins
_SEEDS_NAMED: Final = 4
_TICKS: Final = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 3, 5, 7)]
_WIDE: Final = 5.0  # an axis that spans more than this is logarithmic


def require_matplotlib() -> None:
    """Raise :class:`ConfigError` if plots cannot be drawn."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(
            "plots need matplotlib; install it with: pip install 'hexgen-vllm[plot]'."
        ) from None
    mpl.use("Agg")


def check_plot(path: Path) -> None:
    """Raise :class:`ConfigError` if no plot can be drawn to ``path``, before anything is played."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix.lower()[1:] not in {"", *FigureCanvasBase.get_supported_filetypes()}:
        raise ConfigError(
            f"--plot must end in .png, .svg, .pdf or another format of matplotlib, not {path}."
        )


def draw_attainment(rows: Sequence[Row], path: Path) -> None:
    """Draw one line per policy, the mean of its runs, and a thin one for every run.

    Our own is the thickest and lies above the others. The axis begins where the first policy has
    any workflow on time. Workflows that did not finish are late at every deadline.

    Args:
        rows: results of runs, with ``policy``, ``latencies_s`` and ``deadline_s``.
        path: image to write; the suffix gives the format.

    Raises:
        ConfigError: matplotlib is missing, or there is nothing to draw.
    """
    require_matplotlib()
    from matplotlib import pyplot as plt

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["policy"]), []).append(row)
    deadlines = _deadlines(rows)
    figure, axes = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    chosen = styles(list(groups))
    for policy in sorted(groups, key=lambda name: not _is_ours(name)):
        _draw_policy(axes, chosen[policy], policy, groups[policy], deadlines)
    _annotate(axes, rows, deadlines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def styles(policies: Sequence[str]) -> dict[str, int]:
    """Return which colour and dash each policy of one plot has.

    It is its own, or that of the policy it is a variant of (``paper a=0.2`` of ``paper``), or
    the first one left if another has that. No two of 49 look alike (:func:`look`).
    """
    owns = {name: STYLES.get(name, STYLES.get(name.partition(" ")[0], -1)) for name in policies}
    chosen: dict[str, int] = {}
    for policy in sorted(policies, key=lambda name: (name not in STYLES, owns[name] < 0)):
        free = (n for n in itertools.count() if n not in chosen.values())
        own = owns[policy]
        taken = own < 0 or own in chosen.values()
        chosen[policy] = next(free) if taken else own
    return chosen


def look(style: int) -> tuple[str, Any]:
    """Return colour and dash of a style; after seven the colours return with other dashes."""
    n = len(COLOURS)
    return COLOURS[style % n], DASHES[(style + style // n) % n]


def _is_ours(policy: str) -> bool:
    return policy.partition(" ")[0] == OURS


def _deadlines(rows: Sequence[Row]) -> list[float]:
    """Return where to evaluate: from where anything is on time past every run's P99, but not so
    far that a run that collapsed squeezes the others."""
    ended = [found for row in rows if (found := [v for v in row["latencies_s"] if v is not None])]
    if not ended:
        raise ConfigError("there is nothing to draw: no workflow finished.")
    tails = [percentile(found, 0.99) for found in ended]
    slowest = min(max(tails), SQUEEZE * min(tails))
    end = 1.05 * max(slowest, *(row["deadline_s"] for row in rows))
    begin = min(0.9 * min(percentile(found, _FIRST) for found in ended), 0.5 * end)
    if begin > 0 and end / begin > _WIDE:
        return [begin * (end / begin) ** (k / POINTS) for k in range(POINTS + 1)]
    return [begin + (end - begin) * k / POINTS for k in range(POINTS + 1)]


def _draw_policy(
    axes: Axes, style: int, policy: str, runs: Sequence[Row], deadlines: Sequence[float]
) -> None:
    (colour, dash), ours = look(style), _is_ours(policy)
    curves = [[100 * attainment(run["latencies_s"], d) for d in deadlines] for run in runs]
    if len(curves) > 1:
        for curve in curves:
            axes.plot(deadlines, curve, color=colour, linewidth=0.6, alpha=0.35)
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    axes.plot(
        deadlines, mean, color=colour, linestyle=dash, linewidth=3.4 if ours else 1.7,
        zorder=4 if ours else 3, label=policy, solid_capstyle="round",
    )  # fmt: skip


def title(rows: Sequence[Row]) -> str:
    """Return what is shown: of how many workflows, at which rate, and with which seeds."""
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows if row.get("seed") is not None})
    parts = [f"n = {first['workflows']} a run, {first['rate']:.3g}/s"]
    load = {row.get("load") for row in rows}
    if len(load) == 1 and None not in load:
        parts.append(f"load {load.pop():.3g}")
    if any(row.get("rates") == "true" for row in rows):
        parts.append("true rates")
    if seeds:
        named = len(seeds) <= _SEEDS_NAMED
        shown = ", ".join(map(str, seeds)) if named else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {shown}")
    return f"Workflows on time by deadline ({', '.join(parts)})"


def _annotate(axes: Axes, rows: Sequence[Row], deadlines: Sequence[float]) -> None:
    axes.axhline(95, color="0.55", linewidth=0.8, linestyle=":")
    for deadline in sorted({row["deadline_s"] for row in rows}):
        axes.axvline(deadline, color="0.55", linewidth=0.8, linestyle=":")
        label = axes.text(deadline, 50, f"deadline {deadline:.3g} s", color="0.35", fontsize=9)
        label.set(rotation=90, ha="center", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    axes.set_title(title(rows), loc="left", fontsize=11)
    if deadlines[0] > 0 and deadlines[-1] / deadlines[0] > _WIDE:
        axes.set_xscale("log")
        at = [v for v in _TICKS if deadlines[0] <= v <= deadlines[-1]]
        axes.set_xticks(at, [f"{v:g}" for v in at])
        axes.set_xticks([], minor=True)
    axes.set(
        xlabel="Deadline of a workflow (s)",
        ylabel="Workflows on time (%)",
        xlim=(deadlines[0], deadlines[-1]),
        ylim=(0, 101),
        yticks=(0, 20, 40, 60, 80, 95, 100),
    )
    axes.grid(visible=True, color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
