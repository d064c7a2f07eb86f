"""Routers that share engines tell each other of their calls and workflows through a real Redis."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from benchmarks.router.redis_server import HINT, PASSWORD, RedisServer, program
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import _QUICK, Stand, open_stand

pytestmark = pytest.mark.skipif(program() is None and "CI" not in os.environ, reason=HINT)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@asynccontextmanager
async def open_pair(
    redis: RedisServer, *settings: FakeSettings, **options: Any
) -> AsyncIterator[tuple[Stand, Stand]]:
    """Two routers in front of the same engines."""
    shared = {"replicas": redis.url, "replicas_stale_secs": 10.0, **options}
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(open_stand(*settings, **shared))
        urls = tuple(engine.url for engine in one.engines)
        router = Router(
            RouterOptions(**{**_QUICK, "worker_urls": urls, **shared}),
            DispatchOptions(policy="slack"),
        )
        await stack.enter_async_context(router)
        two = Stand(router, one.engines, one.client)
        await two.all_ready()
        await two.until(lambda: joined(one) and joined(two))
        yield one, two


def joined(stand: Stand) -> bool:
    replicas = stand.context.replicas
    assert replicas is not None
    return replicas.problem is None and replicas.others > 0


def load(stand: Stand, i: int) -> EngineLoad:
    return stand.context.service.coordinator.engines[f"engine-{i}"]


def run_of(stand: Stand, name: str) -> WorkflowRun | None:
    return stand.context.service.coordinator.workflows.get(name)


def elsewhere(stand: Stand, name: str) -> bool:
    return name in stand.context.service.coordinator.workflows.elsewhere


def said(name: str, deadline_ms: int | None = None, **more: str) -> dict[str, str]:
    deadline = {} if deadline_ms is None else {"x-hexgen-workflow-deadline-ms": str(deadline_ms)}
    return {"x-hexgen-workflow-id": name, **deadline, **more}


SLOW = FakeSettings(slots=1, step_s=0.05, default_tokens=400)


async def test_what_another_router_has_on_an_engine_counts(redis: RedisServer) -> None:
    """With one slot per engine, the second call has to take the engine that is free."""
    async with open_pair(redis, SLOW, SLOW) as (one, two):
        async with one.post(stream=True) as first:
            taken = first.headers["x-hexgen-engine"]
            other = int(taken != "engine-1")
            await two.until(lambda: load(two, 1 - other).elsewhere.calls == 1)
            assert load(two, other).elsewhere.calls == 0
            assert load(one, 1 - other).elsewhere.calls == 0  # its own are not elsewhere
            async with two.post(stream=True) as second:
                assert second.headers["x-hexgen-engine"] == f"engine-{other}"
        await two.until(lambda: load(two, 1 - other).elsewhere.calls == 0)


async def test_a_workflow_goes_on_at_another_router(redis: RedisServer) -> None:
    """It keeps its deadline, its calls count, and its engine is known to have its prompt."""
    async with open_pair(redis, FakeSettings(), FakeSettings()) as (one, two):
        prompt = [{"role": "user", "content": "x" * 5000}]
        async with one.post(headers=said("w", 300_000), messages=prompt) as first:
            engine = first.headers["x-hexgen-engine"]
            await first.read()
        mine = run_of(one, "w")
        assert mine is not None
        left_s = mine.deadline_s - one.context.clock.now()
        await two.until(lambda: elsewhere(two, "w"))
        async with two.post(headers=said("w"), messages=prompt) as second:
            assert second.headers["x-hexgen-engine"] == engine
            await second.read()
        run = run_of(two, "w")
        assert run is not None
        assert run.deadline_s - two.context.clock.now() == pytest.approx(left_s, abs=5.0)
        assert run.deadline_s - two.context.clock.now() < left_s + 0.1  # it went on running
        assert len(run.calls) == 2
        assert run.attained > 0
        placement = two.context.service.coordinator.log[-1][1]
        assert placement.uncached_tokens < 300  # type: ignore[union-attr]
        await one.until(lambda: run_of(one, "w") is None)  # it is open in one place
        assert not one.context.metrics.outcomes.ended


async def test_all_learn_from_a_workflow_and_one_counts_it(redis: RedisServer) -> None:
    async with open_pair(redis, FakeSettings()) as (one, two):
        kind = {"x-hexgen-workflow-type": "report", "x-hexgen-stage": "draft"}
        async with one.post(headers=said("w", **kind)) as answer:
            await answer.read()
        await two.until(lambda: elsewhere(two, "w"))
        async with two.post(headers=said("w", **{**kind, "x-hexgen-workflow-final": "1"})) as last:
            await last.read()
        for stand in (one, two):
            shapes = stand.context.service.coordinator.workflows.shapes
            await stand.until(lambda s=shapes: s.known_stages().get("report") == {"draft": 2})
            await stand.until(lambda s=shapes: s.tail("report", "draft", 0, 0.5).calls == 1.0)
            assert run_of(stand, "w") is None
            assert not elsewhere(stand, "w")
        assert not one.context.metrics.outcomes.ended
        assert two.context.metrics.outcomes.ended.total() == 1


async def test_a_router_that_starts_knows_what_others_know(redis: RedisServer) -> None:
    shared = {"replicas": redis.url}
    async with open_stand(FakeSettings(), **shared) as one:
        async with one.post(headers=said("w", 300_000)) as answer:
            await answer.read()
        replicas = one.context.replicas
        assert replicas is not None
        await one.until(lambda: replicas.problem is None)
        urls = tuple(engine.url for engine in one.engines)
        options = RouterOptions(**{**_QUICK, "worker_urls": urls, **shared})
        async with Router(options, DispatchOptions(policy="slack")) as router:
            two = Stand(router, one.engines, one.client)
            await two.all_ready()
            await two.until(lambda: elsewhere(two, "w"))


async def test_without_the_store_each_works_alone_and_catches_up(redis: RedisServer) -> None:
    """What others had is unknown after a while, calls are answered, and all is told afterwards."""
    settings = FakeSettings(step_s=0.05, default_tokens=400)
    pair = open_pair(redis, settings, settings, replicas_stale_secs=1.0)
    async with pair as (one, two), one.post(headers=said("long"), stream=True) as first:
        at = int(first.headers["x-hexgen-engine"][-1])
        await two.until(lambda: load(two, at).elsewhere.calls == 1)
        redis.kill()
        await two.until(lambda: load(two, at).elsewhere.calls == 0)
        assert not joined(two)
        async with two.post(headers=said("apart"), max_tokens=2) as answer:
            assert answer.status == 200
            await answer.read()
        redis.start()
        await two.until(lambda: joined(one) and joined(two))
        await two.until(lambda: load(two, at).elsewhere.calls == 1)
        await one.until(lambda: elsewhere(one, "apart"))


async def test_a_stalled_store_holds_no_call_up(redis: RedisServer) -> None:
    async with open_pair(redis, FakeSettings()) as (one, two):
        redis.stall()
        try:
            await one.until(lambda: not joined(one))
            for stand in (one, two):
                async with stand.post(headers=said("w")) as answer:
                    assert answer.status == 200
        finally:
            redis.go_on()
        await one.until(lambda: joined(one) and joined(two))


async def test_what_is_no_message_does_no_harm(redis: RedisServer) -> None:
    async with open_pair(redis, FakeSettings()) as (one, two):
        replicas = one.context.replicas
        assert replicas is not None
        async with one.post(headers=said("w")) as answer:
            await answer.read()
        await two.until(lambda: elsewhere(two, "w"))
        store = Redis.from_url(redis.url)
        try:
            bad = [[1, "g", 0.0, False, {"engine-0": [-1, 0, 0, 0]}, {}, []], [1], [2], {}, "x"]
            for one_bad in (b"", b"junk", *(b"01234567" + msgspec.msgpack.encode(b) for b in bad)):
                await store.publish("hexgen:default:live", one_bad)
            await store.hset("hexgen:default:w:junk", mapping={"": "junk", "x": "y"})
            await store.set("hexgen:default:learned", "junk")
            await one.until(lambda: replicas.unreadable >= 6)
            redis_kinds = {await store.type(key) for key in await store.keys("*")}
            assert redis_kinds <= {b"hash", b"string"}
            for key in await store.keys("hexgen:default:w:w"):
                assert await store.ttl(key) > 0
        finally:
            await store.aclose()
        urls = tuple(engine.url for engine in one.engines)
        options = RouterOptions(**{**_QUICK, "worker_urls": urls, "replicas": redis.url})
        async with Router(options, DispatchOptions(policy="slack")) as router:
            three = Stand(router, one.engines, one.client)
            await three.all_ready()
            await three.until(lambda: joined(three) and elsewhere(three, "w"))
        assert load(one, 0).elsewhere.calls == 0


async def test_the_password_is_in_no_log(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = redis.url.replace(PASSWORD, "not-that-one")
    async with open_stand(FakeSettings(), replicas=wrong) as stand:
        await stand.until(lambda: "store lost" in caplog.text)
        async with stand.get("/scheduling/diagnostics") as answer:
            seen = await answer.text()
        async with stand.post() as call:
            assert call.status == 200
    assert "not-that-one" not in caplog.text + seen
    assert f"127.0.0.1:{redis.port}" in caplog.text


@pytest.mark.parametrize(
    "url",
    ["http://u:s3cret@h", "redis://", "redis://u:s3cret@h:99999", "redis://u:s3cret@h/0?no=1",
     "redis://[u:s3cret@h", "unix://"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^replicas ") as caught:
        RouterOptions(replicas=url)
    assert PASSWORD not in str(caught.value)


def test_fleets_have_names_that_no_key_is_confused_by() -> None:
    for name in ("", "a:b", "a*", "ü", "x" * 65):
        with pytest.raises(ConfigError, match="replicas_fleet"):
            RouterOptions(replicas_fleet=name)


async def test_a_router_that_leaves_is_forgotten_at_once(redis: RedisServer) -> None:
    async with open_pair(redis, FakeSettings(), replicas_stale_secs=3600.0) as (one, two):
        await two.router.stop()
        await one.until(
            lambda: one.context.replicas is not None and not one.context.replicas.others
        )
