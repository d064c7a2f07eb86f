"""Asks DNS servers for records of one kind."""

from __future__ import annotations

from typing import Final, NamedTuple

import dns.asyncresolver
import dns.exception
import dns.message
import dns.rdata
import dns.resolver
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA
from dns.rdtypes.IN.SRV import SRV

from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router.discovery.names import Address

NXDOMAIN: Final = "nxdomain"
_PAYLOAD_BYTES: Final = 1232  # fits every path; longer answers come over TCP


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
