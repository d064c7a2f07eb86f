"""Engines by DNS: a service is looked up again and again, and its addresses are the engines.

Where DNS says nothing now, what it said last counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final, NamedTuple

import dns.asyncresolver
import dns.exception
import dns.message
import dns.rdata
import dns.resolver
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA
from dns.rdtypes.IN.SRV import SRV

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router.addresses import Address, DnsService, engine_name
from hexgen_vllm.router.engines.discovery.members import (
    EMPTY,
    OK,
    PARTIAL,
    Members,
    SourceBook,
)
from hexgen_vllm.router.options import RouterOptions, Worker

NXDOMAIN: Final = "nxdomain"
_PAYLOAD_BYTES: Final = 1232  # fits every path; longer answers come over TCP
_KINDS: Final = {"any": ("A", "AAAA"), "a": ("A",), "aaaa": ("AAAA",)}
_LONGEST_S: Final = 86400.0
_LOG = logging.getLogger(__name__)


class NoAnswer(HexgenError):  # noqa: N818 - an outcome, not a defect
    """DNS gave no answer; ``reason`` is one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"DNS gave no answer ({reason})")
        self.reason = reason


class Records(NamedTuple):
    """An answer, possibly empty.

    Attributes:
        values: IP addresses, or of SRV records hosts and ports.
        ttl_s: how long it may be kept, seconds.
        beside: IP addresses of hosts that came with it.
    """

    values: frozenset[str] | frozenset[Address]
    ttl_s: float
    beside: dict[str, frozenset[str]]


class Resolver:
    """Asks the servers of ``/etc/resolv.conf``, or one server.

    Args:
        server: the only one to ask.
        timeout_s: longest wait for an answer over all tries, seconds.

    Raises:
        ConfigError: no server is known.
    """

    def __init__(self, server: Address | None, timeout_s: float) -> None:
        try:
            self._resolver = dns.asyncresolver.Resolver(configure=server is None)
        except dns.resolver.NoResolverConfiguration:
            raise ConfigError(
                "worker_dns_server must be given where /etc/resolv.conf names no server."
            ) from None
        if server is not None:
            self._resolver.nameservers, self._resolver.port = [server.host], server.port
        self._resolver.use_edns(0, 0, _PAYLOAD_BYTES)
        self._resolver.timeout = min(self._resolver.timeout, timeout_s)
        self._timeout_s = timeout_s

    async def ask(self, name: str, kind: str, *, search: bool) -> Records:
        """Return the records of ``kind`` that ``name`` has.

        Args:
            name: to look up.
            kind: ``A``, ``AAAA`` or ``SRV``.
            search: whether the search domains of ``/etc/resolv.conf`` apply.

        Raises:
            NoAnswer: there is no such name, or nobody can say.
        """
        try:
            answer = await self._resolver.resolve(
                name, kind, search=search, raise_on_no_answer=False, lifetime=self._timeout_s
            )
        except dns.resolver.NXDOMAIN:
            raise NoAnswer(NXDOMAIN) from None
        except dns.exception.Timeout:
            raise NoAnswer("timeout") from None
        except dns.resolver.NoNameservers:
            raise NoAnswer("servfail") from None
        except (dns.exception.DNSException, OSError):
            raise NoAnswer("error") from None
        ttl_s = float(answer.chaining_result.minimum_ttl)
        values = frozenset(answer.rrset or ())
        if kind == "SRV":
            hosts = (Address(_host(v), v.port) for v in values if isinstance(v, SRV))
            named = frozenset(address for address in hosts if address.host)
            return Records(named, ttl_s, _beside(answer.response))
        return Records(frozenset(_texts(values)), ttl_s, {})


def _host(record: SRV) -> str:
    """Return the host of a record; ``.`` means that there is no service."""
    name: str = record.target.to_text(omit_final_dot=True)
    return name.lower().removesuffix(".")


def _texts(records: frozenset[dns.rdata.Rdata]) -> list[str]:
    return [record.address for record in records if isinstance(record, A | AAAA)]


def _beside(response: dns.message.Message) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for rrset in response.additional:
        name = rrset.name.to_text(omit_final_dot=True).lower()
        found[name] = found.get(name, frozenset()) | frozenset(_texts(frozenset(rrset)))
    return found


class Seen(NamedTuple):
    """Addresses of a service.

    Attributes:
        addresses: where its engines are.
        ttl_s: how long that may be kept, seconds.
        missing: why a part of it is what was seen before, ``""`` if none is.
    """

    addresses: frozenset[Address]
    ttl_s: float
    missing: str


class Lookup:
    """Looks one service up.

    Args:
        resolver: asks DNS.
        service: to look up.
        records: address records that count: ``any``, ``a`` or ``aaaa``.
    """

    def __init__(self, resolver: Resolver, service: DnsService, records: str) -> None:
        self.service = service
        self._resolver, self._kinds = resolver, _KINDS[records]
        self._last: dict[tuple[str, str], frozenset[str]] = {}

    async def now(self) -> Seen:
        """Look the service up.

        Raises:
            NoAnswer: DNS says that there is no such name, or nothing.
        """
        host, port = self.service
        if port is None:
            return await self._by_srv(host)
        found = await self._hosts(host, search=True)
        return Seen(frozenset(Address(h, port) for h in found.hosts), found.ttl_s, found.missing)

    async def _by_srv(self, name: str) -> Seen:
        records = await self._resolver.ask(name, "SRV", search=True)
        targets = [value for value in records.values if isinstance(value, Address)]
        names = {target.host for target in targets}
        self._last = {key: hosts for key, hosts in self._last.items() if key[0] in names}
        order = sorted(names)
        asked = await asyncio.gather(*(self._target(name, records) for name in order))
        known = dict(zip(order, asked, strict=True))
        addresses = (Address(h, t.port) for t in targets for h in known[t.host].hosts)
        ttls = [records.ttl_s, *(one.ttl_s for one in asked)]
        missing = next((one.missing for one in asked if one.missing), "")
        return Seen(frozenset(addresses), min(ttls), missing)

    async def _target(self, name: str, records: Records) -> _Hosts:
        """Return where an SRV record leads; its target may be gone already."""
        came = self._wanted(records.beside.get(name, frozenset()))
        if came:
            self._last |= {(name, kind): _of_kind(came, kind) for kind in self._kinds}
            return _Hosts(came, _LONGEST_S, "")
        try:
            return await self._hosts(name, search=False)
        except NoAnswer as why:
            return _Hosts(self._remembered(name), 0.0, why.reason)

    async def _hosts(self, name: str, *, search: bool) -> _Hosts:
        asked = await asyncio.gather(*(self._ask(name, kind, search) for kind in self._kinds))
        answers = [one for one in asked if isinstance(one, Records)]
        if not answers:
            reasons = [one.reason for one in asked if isinstance(one, NoAnswer)]
            raise NoAnswer(next((r for r in reasons if r != NXDOMAIN), NXDOMAIN))
        missing = ""
        for kind, one in zip(self._kinds, asked, strict=True):
            if isinstance(one, Records):
                self._last[name, kind] = frozenset(v for v in one.values if isinstance(v, str))
            elif one.reason == NXDOMAIN:  # some servers say so of a kind that a name lacks
                self._last[name, kind] = frozenset()
            else:
                missing = one.reason
        ttl_s = min(one.ttl_s for one in answers)
        return _Hosts(self._remembered(name), ttl_s, missing)

    async def _ask(self, name: str, kind: str, search: bool) -> Records | NoAnswer:
        try:
            return await self._resolver.ask(name, kind, search=search)
        except NoAnswer as why:
            return why

    def _remembered(self, name: str) -> frozenset[str]:
        known = (self._last.get((name, kind), frozenset()) for kind in self._kinds)
        return frozenset().union(*known)

    def _wanted(self, hosts: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(_of_kind(hosts, kind) for kind in self._kinds))


class _Hosts(NamedTuple):
    """IP addresses of a name, as :class:`Seen`."""

    hosts: frozenset[str]
    ttl_s: float
    missing: str


def _of_kind(hosts: Iterable[str], kind: str) -> frozenset[str]:
    return frozenset(host for host in hosts if (":" in host) == (kind == "AAAA"))


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
        options: RouterOptions,
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
