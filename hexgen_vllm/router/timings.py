"""Histograms of times, cheap to add to: a call adds to three of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hexgen_vllm.router.families import PREFIX

BOUNDS_S: Final = [
    0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
]  # fmt: skip
"""Upper bounds of the buckets, seconds; one more bucket holds the rest."""


class Timings(Collector):
    """One histogram for each value of a label, or one without a label.

    Args:
        name: of the metric, without prefix.
        text: what it says.
        label: name of the label, ``None`` for none.
    """

    def __init__(self, name: str, text: str, label: str | None = None) -> None:
        self._name, self._text, self._label = PREFIX + name, text, label
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if label is None:
            self._begin("")

    def _begin(self, value: str) -> list[int]:
        counts = self._counts[value] = [0] * (len(BOUNDS_S) + 1)
        self._sums[value] = 0.0
        return counts

    def observe(self, seconds: float, value: str = "") -> None:
        """Add a time under a value of the label."""
        counts = self._counts.get(value) or self._begin(value)
        counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sums[value] += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the histograms."""
        labels = () if self._label is None else (self._label,)
        family = HistogramMetricFamily(self._name, self._text, labels=labels)
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        for value, counts in self._counts.items():
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric([value] if labels else [], buckets, self._sums[value])
        yield family
