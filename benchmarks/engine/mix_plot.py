"""The plot of ``bench mix``: on time against batch, a point for each policy and setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.report.plot import COLOURS, require_matplotlib

_MARKS: Final = {"fcfs": "s", "priority": "^", "plas": "v", "srpt": "D", "ours": "o"}
_TITLES: Final = {
    "A": "A: bursts beside a backlog",
    "A_live": "A live: a real engine, paced",
    "B": "B: 32 places",
    "steady": "steady interactive load",
}


def draw(scenarios: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a panel per scenario.

    Args:
        scenarios: by name, with ``policies`` and ``bound_pct`` as in the JSON file.
        path: image to write; the suffix gives the format.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import pyplot as plt

    columns = min(max(len(scenarios), 1), 2)
    rows = -(-max(len(scenarios), 1) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 4.4 * rows), layout="constrained", squeeze=False
    )
    known: list[str] = []
    for axes, (name, found) in zip(panels.flat, scenarios.items(), strict=False):
        for policy, point in found["policies"].items():
            kind, _, setting = policy.partition(", ")
            label = policy if kind == "ours" else kind
            if label not in known:
                known.append(label)
            style = {
                "marker": _MARKS.get(kind, "o"),
                "color": COLOURS[known.index(label) % len(COLOURS)],
                "s": 90 if kind == "ours" else 55,
                "zorder": 4 if kind == "ours" else 3,
                "facecolors": None if label in {"ours", "ours, KV to host"} else "none",
            }
            if style["facecolors"] is None:
                del style["facecolors"]
            else:
                style["edgecolors"] = style.pop("color")
            x, y = point["batch_pct"], point["interactive_pct"]
            axes.scatter(x, y, label=label, **style)
            if kind == "priority":
                axes.annotate(
                    setting.partition(" ")[0], (x, y), (5, 4), textcoords="offset points",
                    fontsize=8, color="0.3",
                )  # fmt: skip
        bound = found["bound_pct"]
        axes.axvline(bound, color="0.4", linestyle="--", linewidth=1.2)
        axes.annotate(
            "bound if all are served", (bound, 50), (-4, 0), textcoords="offset points",
            rotation=90, ha="right", va="center", fontsize=8, color="0.3",
        )  # fmt: skip
        axes.set(
            title=_TITLES.get(name, name),
            xlabel="Batch throughput (% of batch alone)",
            ylabel="Interactive on time (%)",
            xlim=(0, max(125, 1.03 * bound)),
            ylim=(-4, 106),
        )
        axes.grid(visible=True, color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels.flat)[len(scenarios) :]:
        axes.set_axis_off()
    found_labels: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found_labels.setdefault(label, handle)
    figure.legend(
        found_labels.values(), found_labels.keys(), loc="outside lower center", ncols=4,
        frameon=False, title="Numbers at priority: places in the batch (max-num-seqs)",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
