"""Hosts that engines may be registered on.

Who may register an engine makes the router connect to it, so an admin key alone must not reach
every address that the router can. Names are compared as written: a pattern for a name trusts
whoever controls its DNS entry, and a network admits only addresses written as such.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import urlsplit

from hexgen_vllm.errors import ConfigError

LOOPBACK: Final = ("localhost", "127.0.0.0/8", "::1")

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AllowedHosts:
    """Decides whether an engine may be registered at a URL.

    Args:
        patterns: names with ``*`` and ``?``, addresses, or networks such as ``10.0.0.0/8``.
        urls: of engines that are known from the start.

    With no patterns the hosts of ``urls`` and this machine are allowed.
    """

    def __init__(self, patterns: Iterable[str], urls: Iterable[str]) -> None:
        known = tuple(host_of(url) for url in urls)
        wanted = tuple(patterns) or (*known, *LOOPBACK)
        self._networks = [n for p in wanted if (n := _network(p)) is not None]
        self._names = [p.lower() for p in wanted if _network(p) is None]

    def allow(self, url: str) -> bool:
        """Return whether the host of ``url`` is allowed."""
        host = host_of(url)
        address = _address(host)
        if address is not None:
            return any(address in network for network in self._networks)
        return any(fnmatchcase(host, name) for name in self._names)


def host_of(url: str) -> str:
    """Return the host in ``url``, in lower case and without a final dot; ``""`` if it has none."""
    return (urlsplit(url).hostname or "").lower().rstrip(".")


def check_patterns(patterns: Iterable[str]) -> None:
    """Check patterns of an option.

    Raises:
        ConfigError: one of them is a URL, has a port or is no network.
    """
    for pattern in patterns:
        wrong = not pattern or ("/" in pattern and _network(pattern) is None)
        if wrong or (":" in pattern and _network(pattern) is None):
            raise ConfigError(
                f"worker_allowed_hosts must be hosts or networks without a port, not {pattern!r}."
            )


def _network(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _address(host: str) -> _Address | None:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
