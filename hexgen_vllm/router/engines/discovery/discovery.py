"""All sources of one router: made from its options, run, shown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.discovery.book import DNS, KUBERNETES, SourceBook
from hexgen_vllm.router.discovery.members import Members
from hexgen_vllm.router.discovery.names import parse_server
from hexgen_vllm.router.discovery.options import DiscoveryOptions
from hexgen_vllm.router.fleet import Fleet
from hexgen_vllm.router.hosts import AllowedHosts
from hexgen_vllm.router.watchers import Watchers

if TYPE_CHECKING:
    from hexgen_vllm.router.discovery.dns_source import DnsSource
    from hexgen_vllm.router.discovery.pod_api import PodApi
    from hexgen_vllm.router.discovery.pod_source import PodSource

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
        self, options: DiscoveryOptions, fleet: Fleet, watchers: Watchers, clock: Clock
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
        from hexgen_vllm.router.discovery.dns_source import DnsSource
        from hexgen_vllm.router.discovery.lookup import Lookup
        from hexgen_vllm.router.discovery.resolver import Resolver

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
        from hexgen_vllm.router.discovery.pod_api import PodApi
        from hexgen_vllm.router.discovery.pod_source import PodSource

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
