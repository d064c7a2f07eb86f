"""Results of simulations as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from hexgen_vllm.bench.table import aligned, seconds
from hexgen_vllm.metrics.summary import percentile
from hexgen_vllm.sim.limits import Limits

Row = Mapping[str, Any]

_FIGURES: Final[tuple[tuple[str, str, Callable[[float | None], str]], ...]] = (
    ("min deadline @95%", "min_deadline_95_s", seconds),
    ("x base", "min_deadline_95_x", seconds),
    ("@99%", "min_deadline_99_s", seconds),
    ("P50", "p50_s", seconds),
    ("P95", "p95_s", seconds),
    ("x horizon", "p95_over_horizon", seconds),
    ("TTFT P95", "ttft_p95_s", seconds),
    ("cached", "cached_share", lambda v: "-" if v is None else f"{v:.0%}"),
    ("preempted", "preemptions", lambda v: "-" if v is None else f"{v:.0f}"),
)
TRUE_RATES: Final = "true rates: policies know what steps cost, which live they must learn"
"""Title of results that were played so."""
_LEGEND: Final = "times in seconds; range of on time over seeds in brackets; - is no value"


def render(rows: Sequence[Row]) -> str:
    """Return one line per policy and load, means over seeds."""
    groups: dict[tuple[float, str], list[Row]] = {}
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
    return f"{TRUE_RATES}\n\n{text}" if any(r["rates"] == "true" for r in rows) else text


def describe(bounds: Limits, deadline_s: float, base_s: float) -> str:
    """Return the limits as text."""
    horizons = bounds.horizons_s
    return (
        f"limits: capacity λ* {bounds.rate_per_s:.3f} workflows/s "
        f"({bounds.cold_rate_per_s:.3f} without prefix cache), standalone horizon "
        f"P50 {percentile(horizons, 0.5):.1f} s, P95 {percentile(horizons, 0.95):.1f} s\n"
        f"base SLO {base_s:.1f} s, deadline {deadline_s:.1f} s"
    )


def _mean(runs: Sequence[Row], key: str) -> float | None:
    values = [run[key] for run in runs]
    return None if any(v is None for v in values) else fmean(values)


def _on_time(runs: Sequence[Row]) -> str:
    shares = [run["on_time"] / run["workflows"] for run in runs]
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{fmean(shares):.1%} [{min(shares):.1%}, {max(shares):.1%}]"
