"""Questions to DNS: search domains, aliases, and servers that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from dns.resolver import BaseResolver
from dns.resolver import Resolver as Settings

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.addresses import Address, parse_server
from hexgen_vllm.router.engines.discovery.dns import NoAnswer, Resolver
from tests.router.engines.discovery.dns_server import DnsServer


def in_a_pod(server: DnsServer, folder: Path) -> Resolver:
    """Return a resolver with search domains as Kubernetes gives them to pods."""
    path = folder / "resolv.conf"
    path.write_text("search llm.svc.test svc.test\nnameserver 127.0.0.1\noptions ndots:5\n")
    resolver, settings = Resolver(parse_server(server.address), 0.5), Settings(str(path))
    resolver._resolver.search, resolver._resolver.ndots = settings.search, settings.ndots
    return resolver


async def test_short_names_are_completed_as_in_pods(dns: DnsServer, tmp_path: Path) -> None:
    resolver = in_a_pod(dns, tmp_path)
    dns.set("engines.llm.svc.test", "A", "10.0.0.1")
    dns.set("engines.svc.test", "A", "10.0.0.2")
    dns.set("other.svc.test", "A", "10.0.0.3")
    for name, host in (("engines", "10.0.0.1"), ("other", "10.0.0.3")):
        assert (await resolver.ask(name, "A", search=True)).values == {host}
    with pytest.raises(NoAnswer, match="nxdomain"):
        await resolver.ask("engines", "A", search=False)


async def test_aliases_are_followed_and_the_least_ttl_counts(dns: DnsServer) -> None:
    dns.ttl_s = 7
    dns.set("engines.test", "CNAME", "real.test.")
    dns.set("real.test", "A", "10.0.0.1", "10.0.0.2")
    found = await Resolver(parse_server(dns.address), 0.5).ask("engines.test", "A", search=False)
    assert (found.values, found.ttl_s) == ({"10.0.0.1", "10.0.0.2"}, 7.0)


async def test_a_server_that_is_not_there_is_a_timeout() -> None:
    with pytest.raises(NoAnswer, match=r"timeout|servfail|error"):
        await Resolver(Address("127.0.0.1", 9), 0.2).ask("engines.test", "A", search=False)


def test_without_any_server_the_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: BaseResolver, path: str) -> None:
        original(self, str(tmp_path / "none"))

    original = BaseResolver.read_resolv_conf
    monkeypatch.setattr(BaseResolver, "read_resolv_conf", read)
    with pytest.raises(ConfigError, match="worker_dns_server must be given where"):
        Resolver(None, 1.0)
