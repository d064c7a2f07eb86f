"""Runs on real engines on the evaluation's page, beside the same load in the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from benchmarks.evaluation.evaluation import OURS
from hexgen_vllm.report.table import markdown, seconds

Row = Mapping[str, Any]

KEY: Final = "live_vs_worst_margin"
_PROGRAM: Final = "vllm_router_program"
_FIGURE: Final = "min_deadline_95_s"


def ratio(rows: Sequence[Row], peer: str = _PROGRAM) -> float | None:
    """Return the mean over seeds of the deadline of ``peer`` over ours.

    ``None`` when a seed lacks one of the two, or 95 % of its workflows never finished.
    """
    ours, theirs = _by_seed(rows, OURS), _by_seed(rows, peer)
    ratios = []
    for seed in ours.keys() | theirs.keys():
        a, b = theirs.get(seed), ours.get(seed)
        if a is None or not b:
            return None
        ratios.append(a / b)
    return fmean(ratios) if ratios else None


def least_margin(rows: Sequence[Row]) -> float | None:
    """Return the least of the ratios of rivals, ``None`` when there is none."""
    rivals = {row["policy"] for row in rows} - {OURS}
    found = [value for name in rivals if (value := ratio(rows, name)) is not None]
    return min(found, default=None)


def section(rows: Sequence[Row], simulated: Sequence[Row] = ()) -> str:
    """Return the part of the page about live runs.

    Args:
        rows: of the demo.
        simulated: the same load in the simulator. Of a policy that was played with several
            values of a knob, as ``paper a=0.4``, the best counts.
    """
    seeds = sorted({row["seed"] for row in rows})
    heads = ("policy", *(f"seed {seed}" for seed in seeds), "mean", "simulated")
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        found = _by_seed(rows, policy)
        values = [found.get(seed) for seed in seeds]
        mean = None if None in values else fmean(v for v in values if v is not None)
        shown = [seconds(v) for v in (*values, mean, _simulated(simulated, policy))]
        lines.append((policy, *shown))
    first = rows[0]
    text = (
        f"Two real vLLM engines that emulate devices of 3 to 1 in speed, {first['workflows']} "
        f"text-to-SQL workflows a run at {first['rate']:g}/s, deadline {first['deadline_s']:g} s. "
        "Min deadline @95 %, seconds:"
    )
    ratios = [
        f"{name} needs {value:.2f}× the deadline of {OURS}"
        for name in dict.fromkeys(row["policy"] for row in rows)
        if name != OURS and (value := ratio(rows, name)) is not None
    ]
    said = f"{'; '.join(ratios)} (mean over seeds).\n" if ratios else ""
    return f"## Live\n\n{text}\n\n{markdown(heads, lines)}\n{said}"


def _by_seed(rows: Sequence[Row], policy: str) -> dict[int, float | None]:
    return {row["seed"]: row[_FIGURE] for row in rows if row["policy"] == policy}


def _simulated(rows: Sequence[Row], policy: str) -> float | None:
    """Return the mean over seeds, of the best among variants of the policy."""
    groups: dict[str, list[float | None]] = {}
    for row in rows:
        if row["policy"] == policy or row["policy"].startswith(f"{policy} "):
            groups.setdefault(row["policy"], []).append(row[_FIGURE])
    whole = [fmean(v for v in g if v is not None) for g in groups.values() if None not in g]
    return min(whole, default=None)
