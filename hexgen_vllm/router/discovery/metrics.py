"""Metrics of discovery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.router.discovery.book import ANSWERS, CHANGES
from hexgen_vllm.router.discovery.discovery import Discovery
from hexgen_vllm.router.families import counter, gauge


class DiscoveryMetrics(Collector):
    """Reads the books of a discovery; services of one kind are counted together."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of discovery."""
        lookups: Counter[tuple[str, ...]] = Counter()
        changes: Counter[tuple[str, ...]] = Counter()
        wanted: Counter[tuple[str, ...]] = Counter()
        ages: dict[tuple[str, ...], float] = {}
        for book, age_s in self._discovery.ages_s():
            # Counters begin at 0, or Prometheus would not see their first increase.
            lookups.update(dict.fromkeys(((book.kind, what) for what in ANSWERS), 0))
            changes.update(dict.fromkeys(((book.kind, what) for what in CHANGES), 0))
            lookups.update({(book.kind, outcome): n for outcome, n in book.lookups.items()})
            changes.update({(book.kind, what): n for what, n in book.changes.items()})
            wanted[(book.kind,)] += book.wanted
            ages[(book.kind,)] = max(age_s, ages.get((book.kind,), 0.0))
        yield counter("discovery_lookups", "Times that a source of engines was asked",
                      ("source", "outcome"), lookups.items())  # fmt: skip
        yield counter("discovery_changes", "Engines that discovery let join, drained, took back",
                      ("source", "what"), changes.items())  # fmt: skip
        yield gauge("discovery_engines", "Engines that sources name now",
                    ("source",), wanted.items())  # fmt: skip
        yield gauge("discovery_age_seconds", "Time since the last answer of a source, the oldest",
                    ("source",), ages.items())  # fmt: skip
