"""Where a router looks for engines: the sources that its options name, and their metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.addresses import AllowedHosts, parse_server
from hexgen_vllm.router.engines.discovery.members import (
    ANSWERS,
    CHANGES,
    DNS,
    KUBERNETES,
    Members,
    SourceBook,
)
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.engines.health import Watchers
from hexgen_vllm.router.observe.families import counter, gauge
from hexgen_vllm.router.options import RouterOptions

if TYPE_CHECKING:
    from hexgen_vllm.router.engines.discovery.dns import DnsSource
    from hexgen_vllm.router.engines.discovery.kubernetes import PodApi, PodSource


_RETRY_S: Final = 1.0
_WATCH_S: Final = 60.0


class Discovery:
    """Looks for engines while the router runs.

    Attributes:
        books: what was done, one of each source.
        sources: where engines are looked for.

    Args:
        options: where to look.
        fleet: the engines there are.
        watchers: take engines in and let them leave.
        clock: time of the books.
    """

    def __init__(
        self, options: RouterOptions, fleet: Fleet, watchers: Watchers, clock: Clock
    ) -> None:
        self.books: list[SourceBook] = []
        self.sources: list[DnsSource | PodSource] = []
        self._options, self._fleet, self._watchers = options, fleet, watchers
        self._clock = clock
        patterns = options.worker_allowed_hosts
        self._hosts = AllowedHosts(patterns, ()) if patterns else None
        self._members: list[Members] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._pods: PodApi | None = None

    async def start(self) -> None:
        """Begin to look.

        Raises:
            ConfigError: it is not known where.
        """
        self.sources.extend(self._dns())
        if self._options.service_discovery:
            self.sources.append(await self._kubernetes())
        if self.sources:
            runs = [self._retry(), *(source.run() for source in self.sources)]
            self._tasks = [asyncio.create_task(run) for run in runs]

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Return the tasks under way; who stops the router cancels them."""
        return tuple(self._tasks)

    async def close(self) -> None:
        """Close connections, once the tasks have ended."""
        if self._pods is not None:
            await self._pods.close()

    def view(self) -> list[dict[str, Any]]:
        """Return what diagnostics show."""
        now = self._clock.now()
        return [book.view(now) for book in self.books]

    def ages_s(self) -> Iterable[tuple[SourceBook, float]]:
        """Return how long ago each source gave its last answer, seconds."""
        now = self._clock.now()
        return [(book, book.age_s(now)) for book in self.books]

    def _dns(self) -> list[DnsSource]:
        options = self._options
        if not options.worker_dns:
            return []
        # The package behind them is an extra.
        from hexgen_vllm.router.engines.discovery.dns import DnsSource, Lookup, Resolver

        text = options.worker_dns_server
        server = None if text is None else parse_server(text)
        resolver = Resolver(server, options.worker_dns_timeout_secs)
        found = []
        for service in options.dns_services():
            book, members = self._book(DNS, str(service))
            lookup = Lookup(resolver, service, options.worker_dns_records)
            found.append(DnsSource(lookup, members, book, options, self._clock))
        return found

    async def _kubernetes(self) -> PodSource:
        # The package behind them is an extra.
        from hexgen_vllm.router.engines.discovery.kubernetes import PodApi, PodSource

        self._pods = PodApi(self._options, _WATCH_S)
        await self._pods.open()
        book, members = self._book(KUBERNETES, ",".join(self._options.selector))
        return PodSource(self._pods, members, book, self._options, self._clock)

    def _book(self, kind: str, what: str) -> tuple[SourceBook, Members]:
        book = SourceBook(kind, what, self._clock.now())
        members = Members(self._fleet, self._watchers, book, self._hosts)
        self.books.append(book)
        self._members.append(members)
        return book, members

    async def _retry(self) -> None:
        """Take in what there was no place for: its predecessor may be gone by now."""
        while True:
            await asyncio.sleep(_RETRY_S)
            for members in self._members:
                members.retry()


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
