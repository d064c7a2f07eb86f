"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from hexgen_vllm.report.summary import spread

Row = Mapping[str, Any]

_COLUMNS: Final[tuple[tuple[str, Callable[[Row], str]], ...]] = (
    ("policy", lambda r: str(r["policy"])),
    ("seed", lambda r: str(r["seed"])),
    ("rate/s", lambda r: f"{r['rate']:g}"),
    ("workflows", lambda r: str(r["workflows"])),
    ("on time", lambda r: f"{r['on_time']} ({r['on_time'] / r['workflows']:.1%})"),
    ("min deadline @95%", lambda r: seconds(r["min_deadline_95_s"])),
    ("@99%", lambda r: seconds(r["min_deadline_99_s"])),
    ("P50", lambda r: seconds(r["p50_s"])),
    ("P95", lambda r: seconds(r["p95_s"])),
    ("P99", lambda r: seconds(r["p99_s"])),
    ("TTFT P50", lambda r: seconds(r["ttft_p50_s"])),
    ("TTFT P95", lambda r: seconds(r["ttft_p95_s"])),
    ("errors", lambda r: str(r["errors"])),
    ("lost", lambda r: str(r["lost"])),
)
_FIGURES: Final = (
    ("min deadline @95%", "min_deadline_95_s"),
    ("@99%", "min_deadline_99_s"),
    ("P50", "p50_s"),
    ("P95", "p95_s"),
    ("TTFT P95", "ttft_p95_s"),
)
_LEGEND: Final = "times in seconds; - is no value, or a deadline that too few meet at any length"


def render(rows: Sequence[Row]) -> str:
    """Return one line for each run and, where a policy ran more than once, one for its mean."""
    heads = [name for name, _ in _COLUMNS]
    parts = [aligned(heads, [[cell(row) for _, cell in _COLUMNS] for row in rows])]
    if len({(row["policy"], row["rate"]) for row in rows}) < len(rows):
        parts.append(_means(rows))
    return "\n\n".join([*parts, _LEGEND])


def seconds(value: float | None) -> str:
    """Return seconds with about three digits, ``-`` for ``None``."""
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def aligned(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rule = ["-" * width for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = [f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)]
        return "  ".join([f"{cells[0]:<{widths[0]}}", *padded[1:]])

    return "\n".join(map(line, [heads, rule, *lines]))


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _means(rows: Sequence[Row]) -> str:
    """Return one line per policy and rate: mean and range over its runs."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["rate"]), []).append(row)
    heads = ["mean [least, most]", "rate/s", "runs", "on time", *(name for name, _ in _FIGURES)]
    lines = [
        [
            policy,
            f"{rate:g}",
            str(len(runs)),
            _range([run["on_time"] / run["workflows"] for run in runs], lambda v: f"{v:.1%}"),
            *(_range([run[key] for run in runs], seconds) for _, key in _FIGURES),
        ]
        for (policy, rate), runs in groups.items()
    ]
    return aligned(heads, lines)


def _range(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    found = spread(known)
    return f"{shown(found.mean)} [{shown(found.least)}, {shown(found.most)}]"
