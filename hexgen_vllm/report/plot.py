"""Attainment: the share of workflows on time against the deadline, one line per policy."""

from __future__ import annotations

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
    "paper": 0,
    "round_robin+fcfs": 1,
    "least_outstanding+fcfs": 2,
    "least_outstanding+edf": 3,
    "slack": 4,
    "slack protect": 5,
    "oracle": 5,  # the evaluation draws it up to full load, and protection beyond
    "vllm_router_program": 5,
    "vllm_router": 6,
}
"""Which colour and dash a policy has in every plot."""
POINTS: Final = 400
SQUEEZE: Final = 8.0  # the slowest run's P99 is drawn up to this many times the fastest's


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
    """Draw one thick line per policy, the mean of its runs, and a thin one for every run.

    Workflows that did not finish are late at every deadline.

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
    for policy, runs in groups.items():
        _draw_policy(axes, chosen[policy], policy, runs, deadlines)
    _annotate(axes, rows, deadlines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def styles(policies: Sequence[str]) -> dict[str, int]:
    """Return which colour and dash each policy of one plot has.

    It is its own, or that of the policy it is a variant of (``paper a=0.2`` of ``paper``), or
    the first one left if another has that. Beyond seven policies some look alike.
    """
    chosen: dict[str, int] = {}
    for policy in sorted(policies, key=lambda name: name not in STYLES):
        free = [n for n in range(len(COLOURS)) if n not in chosen.values()]
        own = STYLES.get(policy, STYLES.get(policy.partition(" ")[0], -1))
        chosen[policy] = own if own in free else free[0] if free else len(chosen) % len(COLOURS)
    return chosen


def _deadlines(rows: Sequence[Row]) -> list[float]:
    """Return where to evaluate: from 0 past every run's P99, but not so far that a run that
    collapsed squeezes the others."""
    tails = [
        percentile([v for v in row["latencies_s"] if v is not None], 0.99)
        for row in rows
        if any(v is not None for v in row["latencies_s"])
    ]
    if not tails:
        raise ConfigError("there is nothing to draw: no workflow finished.")
    slowest = min(max(tails), SQUEEZE * min(tails))
    end = 1.05 * max(slowest, *(row["deadline_s"] for row in rows))
    return [end * k / POINTS for k in range(POINTS + 1)]


def _draw_policy(
    axes: Axes, style: int, policy: str, runs: Sequence[Row], deadlines: Sequence[float]
) -> None:
    colour, dash = COLOURS[style], DASHES[style]
    curves = [[100 * attainment(run["latencies_s"], d) for d in deadlines] for run in runs]
    if len(curves) > 1:
        for curve in curves:
            axes.plot(deadlines, curve, color=colour, linewidth=0.7, alpha=0.45)
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    axes.plot(deadlines, mean, color=colour, linestyle=dash, linewidth=2.2, label=policy)


def _annotate(axes: Axes, rows: Sequence[Row], deadlines: Sequence[float]) -> None:
    axes.axhline(95, color="0.55", linewidth=0.8, linestyle=":")
    for deadline in sorted({row["deadline_s"] for row in rows}):
        axes.axvline(deadline, color="0.55", linewidth=0.8, linestyle=":")
        label = axes.text(deadline, 50, f"deadline {deadline:.3g} s", color="0.35", fontsize=9)
        label.set(rotation=90, ha="center", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    runs = max(sum(1 for r in rows if r["policy"] == row["policy"]) for row in rows)
    first = rows[0]
    note = f"{first['workflows']} workflows at {first['rate']:.3g}/s"
    if any(row.get("rates") == "true" for row in rows):
        note += ", true rates"
    axes.set_title(f"{note}, {runs} runs each" if runs > 1 else note, loc="left", fontsize=11)
    axes.set(
        xlabel="Deadline of a workflow (s)",
        ylabel="Workflows on time (%)",
        xlim=(0, deadlines[-1]),
        ylim=(0, 101),
        yticks=(0, 20, 40, 60, 80, 95, 100),
    )
    axes.grid(visible=True, color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
