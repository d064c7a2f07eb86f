"""Names of services, servers, labels and engines."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from hexgen_vllm.errors import ConfigError

_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_SERVICE: Final = re.compile(r"(?P<host>[^:]+)(?::(?P<port>[0-9]{1,5}))?")
_SELECTOR: Final = re.compile(
    r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
    r"=(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
)
_LONGEST_NAME: Final = 64


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
