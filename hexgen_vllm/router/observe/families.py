"""Metrics made at the time of asking."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX: Final = "hexgen_router_"

Values = Iterable[tuple[tuple[str, ...], float]]
"""Label values and the number that goes with them."""


def counter(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    """Return a counter; its samples are called ``hexgen_router_<name>_total``."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def gauge(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    """Return a gauge."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for label, value in values:
        family.add_metric(label, float(value))
    return family
