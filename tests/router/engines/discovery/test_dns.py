"""Engines found in DNS: a real server on 127.0.0.1, asked over UDP and TCP."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState
from tests.router.engines.discovery.dns_server import DnsServer

NAME, SRV = "engines.svc.test", "_http._tcp.engines.svc.test"


def found_by(dns: DnsServer, *services: str, **more: Any) -> AbstractAsyncContextManager[Stand]:
    """Open a router that knows no engines but those in DNS."""
    options = {
        "worker_urls": (),
        "worker_dns": services,
        "worker_dns_server": dns.address,
        "worker_dns_refresh_secs": 0.05,
        "worker_dns_least_refresh_secs": 0.05,
        "worker_dns_timeout_secs": 0.2,
        **more,
    }
    return open_stand(wait=False, **options)


def urls(stand: Stand) -> set[str]:
    return {engine.worker.url for engine in stand.context.fleet.ready()}


def outcomes(stand: Stand) -> dict[str, int]:
    return dict(stand.context.discovery.books[0].lookups)


async def more_lookups(stand: Stand, outcome: str, times: int = 2) -> None:
    """Wait until the source was asked some more times with this outcome."""
    before = outcomes(stand).get(outcome, 0)
    await stand.until(lambda: outcomes(stand).get(outcome, 0) >= before + times)


async def test_addresses_are_engines_that_join_and_are_drained(dns: DnsServer) -> None:
    async with FakeServer() as one, FakeServer() as two:
        services = tuple(f"{name}.svc.test:{e.port}" for name, e in (("a", one), ("b", two)))
        dns.set("a.svc.test", "A", "127.0.0.1")
        dns.set("b.svc.test", "A")
        async with found_by(dns, *services) as stand:
            await stand.until(lambda: urls(stand) == {one.url})
            dns.set("b.svc.test", "A", "127.0.0.1")
            await stand.until(lambda: urls(stand) == {one.url, two.url})
            async with stand.post() as answer:
                name = answer.headers["x-hexgen-engine"]
            assert name.startswith(("a-", "b-"))
            assert "127" not in name
            dns.set("a.svc.test", "A")
            await stand.until(lambda: urls(stand) == {two.url})
            assert len(stand.context.fleet.engines) == 1
            stand.assert_settled()


async def test_an_open_stream_on_an_address_that_vanished_is_not_cut(dns: DnsServer) -> None:
    slow = FakeSettings(step_s=0.02)
    async with FakeServer(slow) as one, FakeServer(slow) as two:
        dns.set(SRV, "SRV", f"0 0 {one.port} x.svc.test.", f"0 0 {two.port} x.svc.test.")
        dns.set("x.svc.test", "A", "127.0.0.1")
        async with found_by(dns, SRV, policy="round_robin") as stand:
            await stand.until(lambda: urls(stand) == {one.url, two.url})
            fleet = stand.context.fleet.engines
            async with stand.post(stream=True, max_tokens=40, ignore_eos=True) as answer:
                await answer.content.readline()
                name = answer.headers["x-hexgen-engine"]
                stays = two if fleet[name].worker.url == one.url else one
                dns.set(SRV, "SRV", f"0 0 {stays.port} x.svc.test.")
                await stand.until(lambda: fleet[name].state is EngineState.DRAINING)
                assert fleet[name].why == "no longer named by dns"
                for _ in range(3):
                    async with stand.post(max_tokens=1) as other:
                        assert other.headers["x-hexgen-engine"] != name
                text = (await answer.read()).decode()
            assert "t39" in text
            assert text.endswith("data: [DONE]\n\n")
            await stand.until(lambda: name not in fleet)
            stand.assert_settled()


async def test_an_address_that_comes_back_while_it_drains_gets_calls_again(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        async with found_by(dns, f"{NAME}:{one.port}") as stand:
            await stand.until(lambda: urls(stand) == {one.url})
            one.faults.append(Fault("hang", 2))
            async with stand.post(stream=True) as answer:
                await answer.content.readline()
                dns.set(NAME, "A")
                await stand.until(lambda: not urls(stand))
                dns.set(NAME, "A", "127.0.0.1")
                await stand.until(lambda: urls(stand) == {one.url})
            await stand.until(lambda: stand.context.ledger.open == 0)
            stand.context.tick()
            assert urls(stand) == {one.url}
            assert stand.context.discovery.books[0].changes == {
                "joined": 1, "drained": 1, "returned": 1,
            }  # fmt: skip


@pytest.mark.parametrize(
    ("trouble", "outcome"),
    [
        ({"gone": True}, "nxdomain"),
        ({"rcode": "SERVFAIL"}, "servfail"),
        ({"rcode": "REFUSED"}, "servfail"),
        ({"silent": {"A", "AAAA"}}, "timeout"),
        ({"delay_s": 1.0}, "timeout"),
        ({"silent": {"AAAA"}}, "partial"),
    ],
    ids=["nxdomain", "servfail", "refused", "silent", "too-slow", "no-aaaa"],
)
async def test_without_an_answer_the_last_one_stays(
    dns: DnsServer,
    trouble: dict[str, Any],
    outcome: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        async with found_by(dns, f"{NAME}:{one.port}") as stand:
            await stand.until(lambda: urls(stand) == {one.url})
            if trouble.get("gone"):
                dns.forget(NAME)
            for name in trouble.keys() - {"gone"}:
                setattr(dns, name, trouble[name])
            await more_lookups(stand, outcome)
            assert urls(stand) == {one.url}
            said = [r for r in caplog.records if r.levelname == "WARNING" and NAME in r.message]
            assert len(said) == 1, "once, not each time"
            dns.rcode, dns.silent, dns.delay_s = None, set(), 0.0
            dns.set(NAME, "A")
            await stand.until(lambda: not stand.context.fleet.engines)


async def test_a_slow_answer_counts(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        dns.delay_s = 0.3
        async with found_by(dns, f"{NAME}:{one.port}", worker_dns_timeout_secs=5.0) as stand:
            await stand.until(lambda: urls(stand) == {one.url})
            assert outcomes(stand).keys() == {"ok"}


@pytest.mark.parametrize("beside", [False, True], ids=["looked-up", "sent-along"])
async def test_srv_records_bring_ports_and_aaaa_records_count(dns: DnsServer, beside: bool) -> None:
    async with FakeServer() as one:
        dns.set(SRV, "SRV", f"0 50 {one.port} pod-0.svc.test.", f"5 50 {one.port} pod-1.svc.test.")
        where = dns.beside if beside else dns.records
        where["pod-0.svc.test", "A"] = ["127.0.0.1"]
        where["pod-1.svc.test", "AAAA"] = ["::1"]
        async with found_by(dns, SRV) as stand:
            fleet = stand.context.fleet.engines
            wanted = {one.url, f"http://[::1]:{one.port}"}
            await stand.until(lambda: {e.worker.url for e in fleet.values()} == wanted)
            # A target whose own name is gone stays while the service names it.
            where.clear()
            dns.set(SRV, "SRV", f"0 50 {one.port} pod-0.svc.test.")
            await stand.until(lambda: {e.worker.url for e in fleet.values()} == {one.url})
            dns.set(SRV, "SRV", "0 0 0 .")
            await stand.until(lambda: not fleet)


@pytest.mark.parametrize(
    ("records", "hosts"),
    [("any", {"127.0.0.1", "[::1]"}), ("a", {"127.0.0.1"}), ("aaaa", {"[::1]"})],
)
async def test_of_two_kinds_of_addresses_one_may_be_chosen(
    dns: DnsServer, records: str, hosts: set[str]
) -> None:
    dns.set(NAME, "A", "127.0.0.1")
    dns.set(NAME, "AAAA", "::1")
    async with found_by(dns, f"{NAME}:9", worker_dns_records=records) as stand:
        fleet = stand.context.fleet.engines
        await stand.until(lambda: fleet)
        await more_lookups(stand, "ok")
        assert {e.worker.url for e in fleet.values()} == {f"http://{host}:9" for host in hosts}


async def test_an_answer_that_fits_no_datagram_comes_over_tcp(dns: DnsServer) -> None:
    dns.set(NAME, "A", *(f"127.0.1.{i}" for i in range(200)))
    async with found_by(dns, f"{NAME}:9") as stand:
        await stand.until(lambda: len(stand.context.fleet.engines) == 200)
    assert dns.asked["tcp"] >= 1


async def test_the_ttl_counts_within_bounds(dns: DnsServer) -> None:
    async def delay_s(ttl_s: int) -> float:
        dns.ttl_s = ttl_s
        bounds = {"worker_dns_refresh_secs": 60.0, "worker_dns_least_refresh_secs": 3.0}
        async with found_by(dns, f"{NAME}:9", worker_dns_timeout_secs=60.0, **bounds) as stand:
            (source,) = stand.context.discovery.sources
            return float(await source.turn())

    dns.set(NAME, "A", "127.0.0.1")
    assert [await delay_s(ttl) for ttl in (0, 20, 3600)] == [3.0, 20.0, 60.0]


async def test_a_router_starts_without_any_answer_and_says_so(
    dns: DnsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeServer() as one, found_by(dns, f"{NAME}:{one.port}") as stand:
        await more_lookups(stand, "nxdomain")
        assert f"no answer service={NAME}:{one.port} reason=nxdomain kept=0" in caplog.text
        async with stand.get("/readiness") as ready, stand.get("/liveness") as live:
            assert (ready.status, live.status) == (503, 200)
        async with stand.post() as answer:
            assert answer.status == 503
        dns.set(NAME, "A")
        await more_lookups(stand, "empty")
        assert f"names no engines service={NAME}:{one.port}" in caplog.text
        dns.set(NAME, "A", "127.0.0.1")
        await stand.until(lambda: urls(stand) == {one.url})
        async with stand.get("/readiness") as ready:
            assert ready.status == 200


async def test_metrics_and_diagnostics_show_what_was_found(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        service = f"{NAME}:{one.port}"
        async with found_by(dns, service) as stand:
            await stand.until(lambda: urls(stand))
            async with stand.get("/metrics") as answer:
                text = await answer.text()
            assert 'hexgen_router_discovery_engines{source="dns"} 1.0' in text
            assert 'discovery_lookups_total{outcome="ok",source="dns"}' in text
            assert 'discovery_changes_total{source="dns",what="joined"} 1.0' in text
            async with stand.get("/scheduling/diagnostics") as answer:
                (shown,) = (await answer.json())["discovery"]
            assert (shown["source"], shown["what"], shown["engines"]) == ("dns", service, 1)
            assert shown["last"] == "ok"
            assert "127.0.0.1" not in str(shown)


async def test_an_engine_that_is_given_and_found_is_one(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        async with found_by(dns, f"{NAME}:{one.port}", worker_urls=(one.url,)) as stand:
            await more_lookups(stand, "ok")
            assert list(stand.context.fleet.engines) == ["engine-0"]
            dns.set(NAME, "A")
            await more_lookups(stand, "empty")
            assert list(stand.context.fleet.engines) == ["engine-0"]


async def test_what_an_operator_did_stays_done(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        admin = {"allow_unauthenticated_admin": True}
        async with found_by(dns, f"{NAME}:{one.port}", **admin) as stand:
            await stand.until(lambda: urls(stand))
            (name,) = stand.context.fleet.engines
            async with stand.client.delete(f"{stand.router.url}/workers/{name}") as answer:
                assert answer.status == 200
            await more_lookups(stand, "ok")
            assert not stand.context.fleet.engines
            dns.set(NAME, "A")
            await more_lookups(stand, "empty")
            dns.set(NAME, "A", "127.0.0.1")
            await stand.until(lambda: urls(stand) == {one.url})


async def test_what_an_operator_removed_gets_calls_when_it_was_gone_and_came_back(
    dns: DnsServer,
) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        admin = {"allow_unauthenticated_admin": True}
        async with found_by(dns, f"{NAME}:{one.port}", **admin) as stand:
            await stand.until(lambda: urls(stand))
            (name,) = stand.context.fleet.engines
            one.faults.append(Fault("hang", 2))
            async with stand.post(stream=True) as answer:
                await answer.content.readline()
                async with stand.client.delete(f"{stand.router.url}/workers/{name}") as removed:
                    assert removed.status == 202
                await more_lookups(stand, "ok")
                assert not urls(stand)
                dns.set(NAME, "A")
                await more_lookups(stand, "empty")
                dns.set(NAME, "A", "127.0.0.1")
                await stand.until(lambda: urls(stand) == {one.url})


async def test_engines_on_other_hosts_than_are_allowed_are_left_out(
    dns: DnsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1", "127.9.9.9")
        allowed = {"worker_allowed_hosts": ("127.0.0.0/16",)}
        async with found_by(dns, f"{NAME}:{one.port}", **allowed) as stand:
            await stand.until(lambda: urls(stand) == {one.url})
            await more_lookups(stand, "ok")
            assert len(stand.context.fleet.engines) == 1
            said = [r.message for r in caplog.records if "left out" in r.message]
            assert len(said) == 1, "once, not each time"
            assert "--worker-allowed-hosts" in said[0]
            assert f"http://127.9.9.9:{one.port}" in said[0]


async def test_what_an_operator_drained_comes_back_drained(dns: DnsServer) -> None:
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        async with found_by(dns, f"{NAME}:{one.port}") as stand:
            await stand.until(lambda: urls(stand))
            (engine,) = stand.context.fleet.engines.values()
            one.faults.append(Fault("hang", 2))
            async with stand.post(stream=True) as answer:
                await answer.content.readline()
                stand.context.fleet.drain(engine.name)
                dns.set(NAME, "A")
                await stand.until(lambda: engine.leaving)
                dns.set(NAME, "A", "127.0.0.1")
                await stand.until(lambda: not engine.leaving)
                assert engine.state is EngineState.DRAINING


async def test_counts_of_engines_that_left_are_kept_together(dns: DnsServer) -> None:
    """Or names of pods would make metrics grow for ever."""
    async with FakeServer() as one:
        dns.set(NAME, "A", "127.0.0.1")
        async with found_by(dns, f"{NAME}:{one.port}") as stand:
            await stand.until(lambda: urls(stand))
            for _ in range(3):
                async with stand.post() as answer:
                    await answer.read()
            dns.set(NAME, "A")
            await stand.until(lambda: not stand.context.fleet.engines)
            placed = stand.context.ledger.placements
            assert ({engine for engine, _ in placed}, placed.total()) == ({"gone"}, 3)


async def test_stopping_ends_looking(dns: DnsServer) -> None:
    dns.silent = {"A", "AAAA"}
    async with found_by(dns, f"{NAME}:9", worker_dns_timeout_secs=60.0) as stand:
        await stand.until(lambda: dns.asked)
    await asyncio.sleep(0)
    assert all(task.done() for task in stand.context.discovery.tasks())
