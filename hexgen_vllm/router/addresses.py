"""Names of services, servers, labels and engines, and those that clients may call the router by.

Who may register an engine makes the router connect to it, so an admin key alone must not reach
every address that the router can. Names are compared as written: a pattern for a name trusts
whoever controls its DNS entry, and a network admits only addresses written as such.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hexgen_vllm.errors import ConfigError

_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_SERVICE: Final = re.compile(r"(?P<host>[^:]+)(?::(?P<port>[0-9]{1,5}))?")
_SELECTOR: Final = re.compile(
    r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
    r"=(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
)
_LONGEST_NAME: Final = 64
_LOCAL_USE: Final = (".localhost", ".local", ".internal", ".home.arpa")  # RFC 6761, 6762, 8375
_PORT: Final = re.compile(r":\d*$")
_MOST_KNOWN: Final = 256
LOOPBACK: Final = ("localhost", "127.0.0.0/8", "::1")
_HOST: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")


class DnsService(NamedTuple):
    """A name whose records are engines; without a port it is looked up as SRV."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> DnsService:
        """Return the service that ``text`` names.

        Raises:
            ConfigError: it names none.
        """
        match = _SERVICE.fullmatch(text)
        srv = text.startswith("_")
        port = None if match is None or match["port"] is None else int(match["port"])
        usable = match is not None and _HOST.fullmatch(match["host"]) is not None
        usable = usable and (port is None if srv else port is not None and 0 < port < 65536)
        if match is None or not usable or _is_address(match["host"]):
            raise ConfigError(
                "worker_dns must be like NAME:PORT, or like _http._tcp.NAME for SRV records, "
                f"not {text!r}."
            )
        return cls(match["host"].lower(), port)

    def __str__(self) -> str:
        """Return it as an option gives it."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def short(self) -> str:
        """The first label that names something."""
        return next((x for x in self.host.split(".") if not x.startswith("_")), "dns")


class Address(NamedTuple):
    """Where an engine listens: an IP address and a port."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The engine's URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def parse_server(text: str) -> Address:
    """Return the DNS server that ``text`` names; the port is 53 where it names none.

    Raises:
        ConfigError: it names none.
    """
    try:
        parts = urlsplit(f"//{text if text.count(':') < 2 or '[' in text else f'[{text}]'}")
        host, port = parts.hostname or "", 53 if parts.port is None else parts.port
        usable = _is_address(host) and port > 0 and not (parts.path or parts.username)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"worker_dns_server must be like 10.0.0.10:53, not {text!r}.")
    return Address(host, port)


def check_selector(labels: Iterable[str]) -> None:
    """Check labels of an option.

    Raises:
        ConfigError: one of them is none.
    """
    for label in labels:
        if _SELECTOR.fullmatch(label) is None:
            raise ConfigError(f"selector must be like KEY=VALUE, not {label!r}.")


def engine_name(service: DnsService, address: Address) -> str:
    """Return the name of an engine: the same in every process, and silent about its address."""
    return f"{service.short[: _LONGEST_NAME - 9]}-{_digest(address.url)}"


def short_name(text: str) -> str:
    """Return ``text`` if it is short enough for an engine's name, else its begin and a digest."""
    if len(text) <= _LONGEST_NAME:
        return text
    return f"{text[: _LONGEST_NAME - 9]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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


class ServedHosts:
    """Decides whether a router without keys, on this machine only, may be called by a name.

    A web page can have its own name lead to 127.0.0.1 (DNS rebinding): the browser then lets it
    call the router, and read the answers, as if they came from its own site. What it cannot change
    is the name that the browser sends. So names that anybody can register are refused unless they
    were allowed; addresses, names without a dot and those reserved for local use are nobody's site.

    Attributes:
        known: values of ``Host`` that were found to be good, a bounded number.

    Args:
        patterns: names that are allowed besides, with ``*`` and ``?``.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(pattern.lower().rstrip(".") for pattern in patterns)
        self.known: set[str] = set()

    def allow(self, value: str) -> bool:
        """Return whether ``value`` is a good ``Host``; a client without one is no browser."""
        good = self._is_good(value)
        if good and len(self.known) < _MOST_KNOWN:
            self.known.add(value)
        return good

    def _is_good(self, value: str) -> bool:
        name = _PORT.sub("", value.strip().lower()).rstrip(".")
        if _address(name.removeprefix("[").removesuffix("]")) is not None or "." not in name:
            return True
        if name.endswith(_LOCAL_USE):
            return True
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)


def is_loopback(host: str) -> bool:
    """Whether what listens on ``host`` can be reached from this machine only."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


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
