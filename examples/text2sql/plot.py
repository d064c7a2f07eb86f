"""A picture of a comparison: how many questions were on time, and how many answers were right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.report.plot import COLOURS, require_matplotlib

_SHARES: Final = {"on time": "on_time", "right": "execution_match"}
_WIDTH: Final = 0.38


def draw(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw two bars for each endpoint, in per cent of its questions.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (label, key) in enumerate(_SHARES.items()):
        at = [place + (number - 0.5) * _WIDTH for place in range(len(summaries))]
        shares = [100 * one[key] / one["questions"] for one in summaries]
        bars = axes.bar(at, shares, _WIDTH, label=label, color=COLOURS[number])
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(summaries)), [str(one["policy"]) for one in summaries])
    axes.set(ylim=(0, 110), ylabel="questions, %")
    deadline_s, rate = summaries[0]["deadline_s"], summaries[0]["rate"]
    axes.set_title(f"{rate:g} questions/s, deadline {deadline_s:g} s", fontsize=10)
    axes.legend(loc="lower right", ncols=2, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
