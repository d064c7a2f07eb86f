"""Options of discovery: what they name, and one sentence for what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import pytest

from hexgen_vllm import option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router import options as discovery_options
from hexgen_vllm.router.addresses import (
    Address,
    DnsService,
    engine_name,
    parse_server,
    short_name,
)
from hexgen_vllm.router.main import add_arguments, run
from hexgen_vllm.router.options import RouterOptions, parse_worker


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("engines:8000", DnsService("engines", 8000)),
        ("Engines.llm.svc.cluster.local.:80", DnsService("engines.llm.svc.cluster.local.", 80)),
        ("_http._tcp.engines.llm", DnsService("_http._tcp.engines.llm", None)),
    ],
)
def test_services_are_names_with_ports_or_srv_names(text: str, service: DnsService) -> None:
    assert RouterOptions(worker_dns=(text,)).dns_services() == (service,)
    assert str(service) == text.lower()


@pytest.mark.parametrize(
    "text",
    ["", "engines", "engines:", "engines:0", "engines:65536", ":80", "a b:80", "a..b:80", "-a:80",
     "10.0.0.1:80", "[::1]:80", "http://engines:80", "_http._tcp.engines:80", "é:80", "a:８０",
     f"{'a' * 64}:80", f"{'a.' * 130}a:80"],
)  # fmt: skip
def test_what_is_no_service_is_one_sentence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([f"--worker-dns={text}"]) == 2
    error = capsys.readouterr().err
    assert "worker_dns must be like NAME:PORT" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"worker_dns": ("a:1", "A:1")}, "worker_dns must have different services, not two a:1."),
        ({"worker_dns_server": "dns.example:53"}, "worker_dns_server must be like 10.0.0.10:53"),
        ({"worker_dns_server": "10.0.0.1:99999"}, "worker_dns_server must be like"),
        ({"worker_dns_refresh_secs": 0.5}, "worker_dns_least_refresh_secs must be at most"),
        ({"worker_dns_timeout_secs": 0.0}, "worker_dns_timeout_secs must be at least"),
        ({"worker_dns_records": "mx"}, "worker_dns_records must be one of any, a, aaaa"),
        ({"service_discovery": True}, "service_discovery and selector must be given together."),
        ({"selector": ("app=x",)}, "service_discovery and selector must be given together."),
        ({"service_discovery": True, "selector": ("app",)}, "selector must be like KEY=VALUE"),
        ({"service_discovery": True, "selector": ("a=b,c=d",)}, "selector must be like KEY=VALUE"),
        ({"service_discovery_port": 0}, "service_discovery_port must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RouterOptions(**options)
    assert str(raised.value).startswith(sentence)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"worker_dns": ("a:1",)},
            "worker_dns needs another package: pip install 'hexgen-vllm[dns]'.",
        ),
        (
            {"service_discovery": True, "selector": ("a=b",)},
            "service_discovery needs another package: pip install 'hexgen-vllm[k8s]'.",
        ),
    ],
)  # fmt: skip
def test_without_the_extra_the_sentence_says_what_to_install(
    options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        return None if name in ("dns", "kubernetes_asyncio") else importlib.util.find_spec(name)

    monkeypatch.setattr(discovery_options, "find_spec", find)
    with pytest.raises(ConfigError) as raised:
        RouterOptions(**options)
    assert str(raised.value) == sentence


def test_the_flags_may_be_repeated_and_are_those_of_vllm_router() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = """--worker-dns a:1 --worker-dns b:2 c:3 --service-discovery --selector app=x
        --selector tier=gpu --service-discovery-port 80 --service-discovery-namespace llm"""
    options = option.from_mapping(
        RouterOptions, option.given(parser.parse_args(line.split()), RouterOptions)
    )
    assert options.worker_dns == ("a:1", "b:2", "c:3")
    assert options.selector == ("app=x", "tier=gpu")
    assert (options.service_discovery_port, options.service_discovery_namespace) == (80, "llm")


def test_a_server_may_be_of_either_kind() -> None:
    assert parse_server("10.0.0.10") == Address("10.0.0.10", 53)
    assert parse_server("[fd00::a]:5353") == Address("fd00::a", 5353)
    assert parse_server("fd00::a") == Address("fd00::a", 53)


def test_names_of_engines_are_short_and_say_no_address() -> None:
    address = Address("10.20.30.40", 8000)
    for host in ("engines.llm.svc", "_http._tcp.engines.llm", f"{'x' * 63}.svc"):
        name = engine_name(DnsService(host, 8000), address)
        assert parse_worker(f"{name}={address.url}", "").name == name
        assert "10.20" not in name
        assert "10-20" not in name
    assert short_name("engine-0") == "engine-0"
    long = {short_name("a" * 200), short_name("a" * 201)}
    assert {len(name) for name in long} == {64}
