"""Engines that fail calls are taken out and brought back one call at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hexgen_vllm.router.engines.breaker import Breaker, BreakerState
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState

BROKEN = Fault("status", status=500)


def breaker(**options: Any) -> Breaker:
    return Breaker(RouterOptions(**options))


def test_failures_in_a_row_are_too_many() -> None:
    one = breaker(cb_failure_threshold=3)
    assert [one.failed(0.0) for _ in range(3)] == [False, False, True]


def test_a_success_breaks_the_row() -> None:
    one = breaker(cb_failure_threshold=3, cb_least_calls=1000)
    for _ in range(50):
        assert not one.failed(0.0)
        assert not one.failed(0.0)
        one.succeeded()


def test_a_share_of_failures_is_too_many_once_there_are_enough_calls() -> None:
    one = breaker(cb_failure_threshold=100, cb_error_ratio=0.5, cb_least_calls=10)
    found = []
    for _ in range(6):
        found.append(one.failed(0.0))
        one.succeeded()
    assert found == [False] * 5 + [True]


def test_old_calls_are_forgotten() -> None:
    one = breaker(
        cb_failure_threshold=100, cb_error_ratio=0.5, cb_least_calls=10, cb_window_duration_secs=60
    )
    for _ in range(9):
        assert not one.failed(0.0)
    for now in (0.0, 30.0, 60.0, 90.0):
        one.tick(now)
    assert not one.failed(91.0)


def test_the_way_back_is_a_trial() -> None:
    one = breaker(cb_timeout_duration_secs=10, cb_success_threshold=2)
    one.open(100.0)
    one.tick(109.9)
    assert one.state is BreakerState.OPEN
    one.tick(110.0)
    assert one.state is BreakerState.TRIAL
    assert one.failed(111.0), "one is too many now"
    one.open(111.0)
    one.tick(121.0)
    one.succeeded()
    assert one.state is BreakerState.TRIAL
    one.succeeded()
    assert one.state is BreakerState.CLOSED


def test_it_can_be_switched_off() -> None:
    one = breaker(disable_circuit_breaker=True)
    assert not any(one.failed(0.0) for _ in range(1000))


async def ask(stand: Stand) -> str:
    async with stand.post() as answer:
        assert answer.status == 200
        return str(answer.headers["x-hexgen-engine"])


async def test_an_engine_that_fails_calls_is_left_out_though_its_health_is_good() -> None:
    clock = ManualClock()
    async with open_stand(
        FakeSettings(), FakeSettings(), policy="round_robin", clock=clock,
        cb_failure_threshold=3, cb_timeout_duration_secs=10.0, retry_budget_ratio=1.0,
    ) as stand:  # fmt: skip
        bad, good = stand.engines
        bad.fault = BROKEN
        for _ in range(8):
            assert await ask(stand) == "engine-1"
        assert stand.state(0) is EngineState.DOWN
        assert len(bad.received) == 3
        async with stand.get("/workers") as answer:
            first = (await answer.json())["workers"][0]
        assert (first["is_healthy"], first["reason"]) == (False, "too many of its calls failed")
        # Tried once, and out again.
        clock.advance(11.0)
        stand.context.tick()
        assert stand.state(0) is EngineState.TRIAL
        for _ in range(4):
            await ask(stand)
        assert len(bad.received) == 4
        # Cured: two calls, one at a time, and it is back.
        bad.fault = None
        clock.advance(11.0)
        stand.context.tick()
        while stand.state(0) is not EngineState.READY:
            await ask(stand)
        assert len(bad.received) == 6
        assert good.received
        stand.assert_settled()


async def test_on_trial_an_engine_has_one_call_at_a_time() -> None:
    async with open_stand(
        FakeSettings(), FakeSettings(step_s=0.002), policy="round_robin"
    ) as stand:
        stand.context.fleet.engines["engine-1"].breaker.half_open()
        stand.context.tick()
        most = 0

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, stand.engines[1].running)
                await asyncio.sleep(0)

        looking = asyncio.ensure_future(look())
        trial = stand.context.fleet.engines["engine-1"]
        trial.breaker.succeeded = lambda: None  # type: ignore[method-assign]
        await asyncio.gather(*(ask(stand) for _ in range(20)))
        looking.cancel()
        assert most == 1
        stand.assert_settled()


@pytest.mark.parametrize("engines", [2, 3])
async def test_calls_that_fail_everywhere_take_no_engine_out(engines: int) -> None:
    """A client sends what no engine can do until there is nothing left to retry with."""
    async with open_stand(
        *[FakeSettings()] * engines, policy="round_robin", cb_failure_threshold=3
    ) as stand:
        for engine in stand.engines:
            engine.fault = BROKEN
        for _ in range(30):
            async with stand.post() as answer:
                assert answer.status == 502
        assert {stand.state(i) for i in range(engines)} == {EngineState.READY}
        # One that goes on to fail when the others work is taken out all the same.
        for engine in stand.engines[1:]:
            engine.fault = None
        while stand.state(0) is EngineState.READY:
            async with stand.post() as answer:
                await answer.read()
        assert stand.state(0) is EngineState.DOWN
        stand.assert_settled()


@pytest.mark.parametrize("fault", [Fault("status", status=429), Fault("status", status=503)])
async def test_an_engine_that_is_busy_is_not_broken(fault: Fault) -> None:
    async with open_stand(
        FakeSettings(), FakeSettings(), cb_failure_threshold=1, disable_retries=True
    ) as stand:
        for engine in stand.engines:
            engine.fault = fault
        for _ in range(5):
            async with stand.post() as answer:
                assert answer.status in (429, 503)
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2


async def test_a_client_that_leaves_says_nothing_about_the_engine() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), cb_failure_threshold=1) as stand:
        for engine in stand.engines:
            engine.fault = Fault("hang", 2)
        for _ in range(4):
            (await stand.post(stream=True).__aenter__()).close()
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2


async def test_an_engine_that_was_down_comes_back_on_trial() -> None:
    async with open_stand(FakeSettings(), FakeSettings()) as stand:
        await stand.engines[0].stop()
        await stand.until(lambda: stand.state(0) is EngineState.DOWN)
        await stand.engines[0].start()
        await stand.until(lambda: stand.state(0) is EngineState.TRIAL)
        async with stand.get("/metrics") as answer:
            text = await answer.text()
        assert 'hexgen_router_engine_up{engine="engine-0",kind="fcfs"} 1.0' in text
        while stand.state(0) is EngineState.TRIAL:
            await ask(stand)
        assert stand.state(0) is EngineState.READY
        stand.assert_settled()


async def test_with_the_breaker_off_it_comes_back_at_once() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), disable_circuit_breaker=True) as stand:
        await stand.engines[0].stop()
        await stand.until(lambda: stand.state(0) is EngineState.DOWN)
        await stand.engines[0].start()
        await stand.until(lambda: stand.state(0) is EngineState.READY)
