"""What DNS says of one service, and what it said last where it says nothing now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, NamedTuple

from hexgen_vllm.router.discovery.names import Address, DnsService
from hexgen_vllm.router.discovery.resolver import NXDOMAIN, NoAnswer, Records, Resolver

_KINDS: Final = {"any": ("A", "AAAA"), "a": ("A",), "aaaa": ("AAAA",)}
_LONGEST_S: Final = 86400.0


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
