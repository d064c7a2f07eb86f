"""The metrics of several processes as those of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_SAMPLE: Final = re.compile(r"^(?P<key>[a-zA-Z_:][\w:]*(?:\{.*\})?) (?P<value>\S+)$")
# Gauges that count what one process has; all others are the same in every process.
_SUMMED: Final = (
    "open_calls",
    "held_calls",
    "held_tokens",
    "slack_calls",
    "workflows_at_risk",
    "open_workflows",
    "engine_calls",
    "engine_tokens",
)


# Counters that every process reads from the engines.
_SEEN_BY_ALL: Final = "_engine_preemptions_total"


def merged(texts: Sequence[str]) -> str:
    """Return one exposition: counters and histograms summed, of most gauges the largest value.

    Args:
        texts: expositions in Prometheus's text format.
    """
    kinds: dict[str, str] = {}
    lines: list[str] = []
    values: dict[str, list[float]] = {}
    for text in texts:
        for line in text.splitlines():
            found = _SAMPLE.match(line)
            if line.startswith("# TYPE "):
                kinds[line.split()[2]] = line.split()[3]
            if found is None:
                if line not in values:
                    values[line] = []
                    lines.append(line)
            else:
                key = found["key"]
                if key not in values:
                    values[key] = []
                    lines.append(key)
                values[key].append(float(found["value"]))
    return "\n".join(_line(line, values[line], kinds) for line in _grouped(lines)) + "\n"


def _line(key: str, values: list[float], kinds: dict[str, str]) -> str:
    if not values:
        return key
    name = key.partition("{")[0]
    gauge = kinds.get(name) == "gauge"
    summed = name.endswith(_SUMMED) if gauge else not name.endswith(_SEEN_BY_ALL)
    if name.endswith("_created"):
        return f"{key} {min(values)!r}"
    return f"{key} {sum(values) if summed else max(values)!r}"


def _grouped(lines: list[str]) -> list[str]:
    """Return the lines with all samples of a metric behind its comments."""
    order: dict[str, list[str]] = {}
    family = ""
    for line in lines:
        if line.startswith("# "):
            family = line.split()[2]
        elif not _of(line, family):
            family = next((known for known in order if _of(line, known)), family)
        order.setdefault(family, []).append(line)
    return [line for found in order.values() for line in found]


def _of(line: str, family: str) -> bool:
    name = line.partition("{")[0].partition(" ")[0]
    return name == family or re.sub(r"_(bucket|sum|count|total|created)$", "", name) == family
