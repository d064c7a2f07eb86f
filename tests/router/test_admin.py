"""Engines are registered, drained and removed while the router runs; by whom, and from where."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from hexgen_vllm.router.addresses import AllowedHosts, check_patterns
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState

OPEN: dict[str, Any] = {"allow_unauthenticated_admin": True}
ADMIN = [
    ("POST", "/workers"), ("POST", "/workers/engine-0/drain"), ("DELETE", "/workers/engine-0"),
    ("POST", "/workers/engine-0/undrain"), ("POST", "/add_worker?url=http://127.0.0.1:1"),
    ("POST", "/remove_worker?url=x"), ("GET", "/list_workers"),
]  # fmt: skip


async def asked(
    stand: Stand, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    """Return status and content of the router's answer."""
    url = stand.router.url + path
    async with stand.client.request(method, url, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    status, content = answer
    assert set(content["error"]) == {"message", "type", "param", "code"}
    return status, content["error"]["code"]


async def test_a_registered_engine_gets_calls_and_health_checks() -> None:
    async with FakeServer(FakeSettings(models=("other",))) as new, open_stand(**OPEN) as stand:
        status, shown = await asked(stand, "POST", "/workers", {"url": new.url, "name": "new"})
        assert (status, shown["name"], shown["state"]) == (201, "new", "ready")
        assert shown["models"] == ["other"]
        assert str(new.port) not in str(shown)
        async with stand.post(model="other") as answer:
            assert answer.headers["x-hexgen-engine"] == "new"
        new.healthy = False
        engine = stand.context.fleet.engines["new"]
        await stand.until(lambda: engine.state is EngineState.DOWN)
        _, listed = await asked(stand, "GET", "/workers")
        assert {w["name"]: w["state"] for w in listed["workers"]} == {
            "engine-0": "ready", "new": "down",
        }  # fmt: skip


async def test_names_are_given_and_not_given_twice() -> None:
    async with FakeServer() as one, FakeServer() as two, open_stand(**OPEN) as stand:
        for engine, name in ((one, "engine-1"), (two, "engine-2")):
            status, shown = await asked(stand, "POST", "/workers", {"url": engine.url})
            assert (status, shown["name"]) == (201, name)
        await asked(stand, "DELETE", "/workers/engine-1")
        status, shown = await asked(stand, "POST", "/workers", {"url": one.url})
        assert (status, shown["name"]) == (201, "engine-3")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"url": "{known}"}, (409, "worker_exists")),
        ({"url": "{known}/"}, (409, "worker_exists")),
        ({"url": "{new}", "name": "engine-0"}, (409, "worker_exists")),
        ({}, (400, "invalid_worker")),
        ({"url": "file:///etc/passwd"}, (400, "invalid_worker")),
        ({"url": "gopher://127.0.0.1"}, (400, "invalid_worker")),
        ({"url": "http://127.0.0.1:99999"}, (400, "invalid_worker")),
        ({"url": "{new}", "name": "a b"}, (400, "invalid_worker")),
        ({"url": "{new}\r\nHost: x"}, (400, "invalid_worker")),
        ({"url": "http://169.254.169.254/latest"}, (403, "host_not_allowed")),
        ({"url": "http://127.0.0.1@10.0.0.1/"}, (403, "host_not_allowed")),
        ({"url": "http://user:pass@127.0.0.1/"}, (403, "host_not_allowed")),
        ({"url": "http://[::ffff:10.0.0.1]/"}, (403, "host_not_allowed")),
        ({"url": "http://0x7f000001/"}, (403, "host_not_allowed")),
        ({"url": "http://engine.example"}, (403, "host_not_allowed")),
        ({"url": "http://127.0.0.1:9"}, (400, "worker_unreachable")),
        ({"url": "{new}", "model": "nobody's"}, (400, None)),
        ({"url": "{new}", "weight": 2}, (400, None)),
        ({"url": 7}, (400, None)),
        ([], (400, "invalid_json")),
    ],
)
async def test_what_is_not_taken_in(body: Any, expected: tuple[int, str | None]) -> None:
    async with FakeServer() as new, open_stand(**OPEN) as stand:
        known = stand.engines[0].url
        if "url" in body and isinstance(body["url"], str):
            url = body["url"].replace("{known}", known).replace("{new}", new.url)
            body = {**body, "url": url}
        assert code(await asked(stand, "POST", "/workers", body)) == expected
        assert list(stand.context.fleet.engines) == ["engine-0"]


async def test_an_engine_that_redirects_is_not_followed() -> None:
    """Or a host that may register could make the router fetch from any other."""
    visited: list[str] = []

    async def elsewhere(request: web.BaseRequest) -> web.StreamResponse:
        visited.append(request.path)
        if request.url.port == inner_port:
            return web.Response()
        raise web.HTTPFound(f"http://127.0.0.1:{inner_port}/secret")

    runner = web.ServerRunner(web.Server(elsewhere))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    (_, inner_port), (_, port) = runner.addresses
    try:
        async with open_stand(**OPEN) as stand:
            answer = await asked(stand, "POST", "/workers", {"url": f"http://127.0.0.1:{port}"})
            assert code(answer) == (400, "worker_unreachable")
            assert visited == ["/health"]
    finally:
        await runner.cleanup()


async def test_two_registrations_of_one_engine_at_once_are_one() -> None:
    async with FakeServer() as new, open_stand(**OPEN) as stand:
        body = {"url": new.url}
        both = await asyncio.gather(*(asked(stand, "POST", "/workers", body) for _ in range(2)))
        assert sorted(status for status, _ in both) == [201, 409]


async def test_a_drained_engine_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), policy="round_robin", **OPEN) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("hang", 2))
        async with stand.post(stream=True) as held:
            name = held.headers["x-hexgen-engine"]
            status, shown = await asked(stand, "POST", f"/workers/{name}/drain")
            assert (status, shown["state"], shown["load"]) == (200, "draining", 1)
            other = ({"engine-0", "engine-1"} - {name}).pop()
            for engine in stand.engines:
                engine.faults.clear()
            for _ in range(4):
                async with stand.post() as answer:
                    assert answer.headers["x-hexgen-engine"] == other
            assert b"data: " in await held.content.readline()
        status, shown = await asked(stand, "POST", f"/workers/{name}/undrain")
        assert shown["state"] == "ready"
        seen = set()
        for _ in range(4):
            async with stand.post() as answer:
                seen.add(answer.headers["x-hexgen-engine"])
        assert seen == {name, other}
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()


async def test_a_drained_engine_stays_drained_when_it_comes_back() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), **OPEN) as stand:
        await asked(stand, "POST", "/workers/engine-0/drain")
        await stand.engines[0].stop()
        await stand.until(lambda: stand.state(0) is EngineState.DOWN)
        await stand.engines[0].start()
        await stand.until(lambda: stand.state(0) is EngineState.DRAINING)
        load = stand.context.service.coordinator.engines["engine-0"]
        assert load.state is EngineState.DRAINING


async def test_with_everything_drained_calls_are_refused() -> None:
    async with open_stand(**OPEN) as stand:
        await asked(stand, "POST", "/workers/engine-0/drain")
        async with stand.post() as answer:
            assert answer.status == 503
            assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        async with stand.get("/readiness") as answer:
            assert answer.status == 503
        stand.assert_settled()


async def test_an_idle_engine_is_removed_at_once_and_a_busy_one_when_it_is_idle() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), **OPEN) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("hang", 2))
        async with stand.post(stream=True) as held:
            busy = held.headers["x-hexgen-engine"]
            idle = ({"engine-0", "engine-1"} - {busy}).pop()
            status, shown = await asked(stand, "DELETE", f"/workers/{idle}")
            assert (status, shown["removed"]) == (200, True)
            status, shown = await asked(stand, "DELETE", f"/workers/{busy}")
            assert (status, shown["removed"], shown["state"]) == (202, False, "draining")
            assert list(stand.context.fleet.engines) == [busy]
        await stand.until(lambda: not stand.context.fleet.engines)
        assert not stand.context.service.coordinator.engines
        assert code(await asked(stand, "DELETE", f"/workers/{busy}")) == (404, "worker_not_found")
        stand.assert_settled()


async def test_who_changes_his_mind_keeps_the_engine() -> None:
    async with open_stand(**OPEN) as stand:
        stand.engines[0].faults.append(Fault("hang", 2))
        async with stand.post(stream=True):
            assert (await asked(stand, "DELETE", "/workers/engine-0"))[0] == 202
            assert (await asked(stand, "POST", "/workers/engine-0/undrain"))[0] == 200
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.context.tick()
        assert stand.state(0) is EngineState.READY


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_removal_moves_what_has_no_answer_yet(stream: bool) -> None:
    async with open_stand(FakeSettings(), FakeSettings(), **OPEN) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("hang"))
        waiting = asyncio.ensure_future(stand.post(stream=stream, max_tokens=3).__aenter__())
        await stand.until(stand.received)
        name = next(f"engine-{i}" for i, e in enumerate(stand.engines) if e.received)
        for engine in stand.engines:
            engine.faults.clear()
        status, shown = await asked(stand, "DELETE", f"/workers/{name}?force=true")
        assert (status, shown["removed"]) == (200, True)
        answer = await waiting
        assert answer.status == 200
        assert answer.headers["x-hexgen-engine"] != name
        assert "t2" in await answer.text()
        stand.assert_settled()


async def test_the_ways_of_vllm_router_work_too() -> None:
    async with FakeServer() as new, open_stand(**OPEN) as stand:
        status, shown = await asked(stand, "POST", f"/add_worker?url={new.url}")
        assert (status, shown["state"]) == (200, "ready")
        urls = [stand.engines[0].url, new.url]
        assert await asked(stand, "GET", "/list_workers") == (200, {"urls": urls})
        status, shown = await asked(stand, "POST", f"/remove_worker?url={new.url}/")
        assert (status, shown["removed"]) == (200, True)
        assert (await asked(stand, "POST", f"/remove_worker?url={new.url}"))[0] == 404


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_without_a_key_of_its_own_admin_is_closed(method: str, path: str) -> None:
    async with open_stand(api_key=("client",)) as stand:
        for headers in ({}, {"Authorization": "Bearer client"}):
            assert code(await asked(stand, method, path, **headers)) == (403, "admin_disabled")


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_admin_asks_for_the_admin_key(method: str, path: str) -> None:
    async with open_stand(api_key=("client",), admin_api_key=("admin",)) as stand:
        for key in (None, "client", "adminx", "admi", "é"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert code(await asked(stand, method, path, **headers)) == (401, "invalid_api_key")
        status, _ = await asked(stand, method, path, Authorization="Bearer admin")
        assert status not in (401, 403)


async def test_the_admin_key_opens_what_client_keys_do() -> None:
    async with open_stand(api_key=("client",), admin_api_key=("admin",)) as stand:
        for key, status in (("admin", 200), ("client", 200), ("x", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await asked(stand, "GET", "/workers", **headers))[0] == status


async def test_web_pages_may_not_use_an_open_admin() -> None:
    async with open_stand(**OPEN) as stand:
        answer = await asked(stand, "POST", "/workers/engine-0/drain", Origin="http://evil.example")
        assert code(answer) == (403, "origin_not_allowed")


async def test_a_router_may_start_with_nothing_and_wait_for_engines() -> None:
    async with FakeServer() as new, open_stand(worker_urls=(), wait=False, **OPEN) as stand:
        async with stand.post() as answer:
            assert answer.status == 503
        assert (await asked(stand, "POST", "/workers", {"url": new.url}))[0] == 201
        async with stand.post() as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("patterns", "url", "allowed"),
    [
        ((), "http://localhost:1", True),
        ((), "http://127.8.9.1:1", True),
        ((), "http://[::1]:1", True),
        ((), "https://known.example.:8443/base", True),
        ((), "http://KNOWN.example", True),
        ((), "http://10.0.0.1", False),
        ((), "http://evil.example", False),
        (("10.0.0.0/8",), "http://10.200.0.1", True),
        (("10.0.0.0/8",), "http://[::ffff:10.1.1.1]", True),
        (("10.0.0.0/8",), "http://localhost", False),
        (("10.0.0.0/8",), "http://10.0.0.1.evil.example", False),
        (("*.gpu.example", "fd00::/8"), "http://a.gpu.example", True),
        (("*.gpu.example", "fd00::/8"), "http://gpu.example", False),
        (("*.gpu.example", "fd00::/8"), "http://[fd00::7]", True),
        (("*",), "http://anything.example", True),
        (("*",), "http://10.0.0.1", False),
    ],
)
def test_hosts_are_names_or_networks(patterns: tuple[str, ...], url: str, allowed: bool) -> None:
    assert AllowedHosts(patterns, ["http://known.example:8000"]).allow(url) is allowed


@pytest.mark.parametrize("pattern", ["http://a", "10.0.0.0/99", "a:80", ""])
def test_patterns_that_can_match_nothing_are_errors(pattern: str) -> None:
    with pytest.raises(ValueError, match="worker_allowed_hosts"):
        check_patterns([pattern])
