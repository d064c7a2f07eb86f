"""Keeps the engines of one DNS service: looks it up again and again."""

from __future__ import annotations

import asyncio
import logging

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.discovery.book import EMPTY, OK, PARTIAL, SourceBook
from hexgen_vllm.router.discovery.lookup import Lookup, Seen
from hexgen_vllm.router.discovery.members import Members
from hexgen_vllm.router.discovery.names import engine_name
from hexgen_vllm.router.discovery.options import DiscoveryOptions
from hexgen_vllm.router.discovery.resolver import NoAnswer
from hexgen_vllm.router.options import Worker

_LOG = logging.getLogger(__name__)


class DnsSource:
    """Looks one service up; :meth:`run` is its task.

    Args:
        lookup: of the service.
        members: get what it finds.
        book: counts look-ups.
        options: bounds of the time between them.
        clock: their time.
    """

    def __init__(
        self,
        lookup: Lookup,
        members: Members,
        book: SourceBook,
        options: DiscoveryOptions,
        clock: Clock,
    ) -> None:
        self._lookup, self._members, self._book = lookup, members, book
        self._options, self._clock = options, clock

    async def run(self) -> None:
        """Look up until cancelled."""
        while True:
            try:
                delay_s = await self.turn()
            except Exception:  # whatever it was, the service must not go unwatched
                _LOG.exception("look-up failed service=%s", self._lookup.service)
                delay_s = self._options.worker_dns_refresh_secs
            await asyncio.sleep(delay_s)

    async def turn(self) -> float:
        """Look up once; return the seconds until the next time."""
        try:
            seen = await self._lookup.now()
        except NoAnswer as why:
            self._note(why.reason)
            return self._options.worker_dns_least_refresh_secs
        service = self._lookup.service
        outcome = OK if seen.addresses else EMPTY
        self._note(PARTIAL if seen.missing else outcome, seen.missing)
        self._members.want(Worker(engine_name(service, a), a.url) for a in seen.addresses)
        return self._delay_s(seen)

    def _delay_s(self, seen: Seen) -> float:
        least_s = self._options.worker_dns_least_refresh_secs
        return min(max(seen.ttl_s, least_s), self._options.worker_dns_refresh_secs)

    def _note(self, outcome: str, missing: str = "") -> None:
        """Count a look-up; log it where it ended otherwise than the one before."""
        if not self._book.asked(outcome, self._clock.now()):
            return
        service, engines = self._lookup.service, self._book.wanted
        if outcome == OK:
            _LOG.info("DNS answers service=%s", service)
        elif outcome == EMPTY:
            _LOG.warning("DNS names no engines service=%s drained=%d", service, engines)
        elif outcome == PARTIAL:
            _LOG.warning("DNS gives a part of the answer service=%s reason=%s", service, missing)
        else:
            _LOG.warning(
                "DNS gives no answer service=%s reason=%s kept=%d", service, outcome, engines
            )
