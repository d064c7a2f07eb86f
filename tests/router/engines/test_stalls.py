"""Engines that are at work and silent get no calls, and what waits there goes elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hexgen_vllm.router.engines.probe import Probe, Unreachable
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.options import Worker
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState

# 10 ms a step; 1000 prompt tokens a second
COST = {"c0": 0.01, "c1": 0.0, "c2": 0.0, "p0": 0.0, "p1": 0.001, "p2": 0.0}
LIMITS: dict[str, Any] = {
    "engine_stall_secs": 10.0, "engine_stall_steps": 100.0, "lost_stream_timeout_secs": 20.0,
}  # fmt: skip


def engines(n: int) -> tuple[FakeSettings, ...]:
    return tuple(FakeSettings(stats={"cost": COST, "max_num_seqs": 8}) for _ in range(n))


async def stream(stand: Stand) -> Any:
    """Return an answer that has begun."""
    answer = await stand.post(stream=True, max_tokens=50).__aenter__()
    await answer.content.readuntil(b"\n\n")
    return answer


def number(answer: Any) -> int:
    return int(answer.headers["x-hexgen-engine"].removeprefix("engine-"))


def pass_s(stand: Stand, clock: ManualClock, seconds: float) -> None:
    clock.advance(seconds)
    stand.context.tick()


async def known(stand: Stand) -> None:
    """Wait until the router knows the engines' step costs."""
    loads = stand.context.service.coordinator.engines
    await stand.until(lambda: all(load.report.cost is not None for load in loads.values()))


async def test_a_stream_that_stops_takes_its_engine_out() -> None:
    """10 s and 100 steps of 10 ms are 11 s; three times that, for it passes its health checks."""
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        await known(stand)
        for engine in stand.engines:
            engine.faults.append(Fault("hang", 2))
        held = await stream(stand)
        stuck = number(held)
        for engine in stand.engines:
            engine.faults.clear()
        for seconds, state in ((0.0, EngineState.READY), (32.9, EngineState.READY),
                               (0.3, EngineState.DOWN)):  # fmt: skip
            pass_s(stand, clock, seconds)
            assert stand.state(stuck) is state
        for _ in range(3):
            async with stand.post() as answer:
                assert number(answer) != stuck
        # The answer it owes is given up later, with an error event.
        pass_s(stand, clock, 21.0)
        last = (await held.content.read()).split(b"\n\n")[-2]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine-timeout"
        stand.assert_settled()


async def stuck_stand(stand: Stand) -> tuple[Any, int]:
    """Stop one engine in the middle of an answer; return the answer and the engine's number."""
    await known(stand)
    for engine in stand.engines:
        engine.faults.append(Fault("hang", 2))
    held = await stream(stand)
    for engine in stand.engines:
        engine.faults.clear()
    stand.engines[number(held)].fault = Fault("hang")
    return held, number(held)


async def waiting_on(stand: Stand, i: int) -> asyncio.Task[Any]:
    """Return a call that engine ``i`` got and does not answer."""
    fleet, got = stand.context.fleet, len(stand.engines[i].received)
    others = [name for name in fleet.engines if name != f"engine-{i}"]
    for name in others:
        fleet.drain(name)
    task = asyncio.ensure_future(stand.post(max_tokens=3).__aenter__())
    await stand.until(lambda: len(stand.engines[i].received) > got)
    for name in others:
        fleet.drain(name, False)
    return task


async def test_what_has_no_answer_yet_goes_elsewhere() -> None:
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        held, stuck = await stuck_stand(stand)
        waiting = await waiting_on(stand, stuck)
        pass_s(stand, clock, 0.0)
        pass_s(stand, clock, 40.0)
        answer = await waiting
        assert (answer.status, number(answer)) == (200, 1 - stuck)
        assert stand.context.ledger.retries == {"engine-lost": 1}
        held.close()
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()


PATIENT: dict[str, Any] = {"request_timeout_secs": 9e9, "stream_stall_timeout_secs": 9e9}


async def test_with_nowhere_to_go_calls_stay_where_they_are_and_new_ones_come() -> None:
    """The engine may go on; a call that was ended or refused here would be answered nowhere."""
    clock = ManualClock()
    async with open_stand(*engines(1), clock=clock, **PATIENT, **LIMITS) as stand:
        held, stuck = await stuck_stand(stand)
        waiting = await waiting_on(stand, stuck)
        for _ in range(20):
            pass_s(stand, clock, 60.0)
            assert stand.state(0) is EngineState.READY
        assert not waiting.done()
        stand.engines[0].fault = None
        async with stand.post() as answer:
            assert answer.status == 200
        waiting.cancel()
        held.close()
        await stand.until(lambda: stand.context.ledger.open == 0)
        stand.assert_settled()


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_engines_that_are_cold_are_waited_for(count: int) -> None:
    """All compile for minutes at their first call; nobody is told that anything failed."""
    clock = ManualClock()
    settings = [FakeSettings(policy="fcfs") for _ in range(count)]
    async with open_stand(*settings, clock=clock, policy="round_robin", **LIMITS) as stand:
        fleet = stand.context.fleet.engines
        await stand.until(lambda: all(e.steps.get(e.name) == 0 for e in fleet.values()))
        for engine in stand.engines:
            engine.fault = Fault("hang")
        calls = [asyncio.ensure_future(stand.post().__aenter__()) for _ in range(2 * count)]
        await stand.until(lambda: len(stand.received()) == len(calls))
        pass_s(stand, clock, 0.0)
        for _ in range(28):
            pass_s(stand, clock, 10.0)
            assert {stand.state(i) for i in range(count)} == {EngineState.READY}
        assert not any(call.done() for call in calls)
        assert not stand.context.ledger.retries
        for call in calls:
            call.cancel()
        await stand.until(lambda: stand.context.ledger.open == 0)


async def test_a_cold_engine_that_never_comes_is_left() -> None:
    clock = ManualClock()
    settings = [FakeSettings(policy="fcfs") for _ in range(2)]
    async with open_stand(*settings, clock=clock, policy="round_robin", **LIMITS) as stand:
        fleet = stand.context.fleet.engines
        await stand.until(lambda: all(e.steps.get(e.name) == 0 for e in fleet.values()))
        waiting = await waiting_on_hang(stand)
        pass_s(stand, clock, 0.0)
        pass_s(stand, clock, 301.0)
        answer = await waiting
        assert (answer.status, number(answer)) == (200, 1)
        assert stand.state(0) is EngineState.DOWN


class Deaf(Probe):
    """Health checks that are not answered in time."""

    async def healthy(self, worker: Worker) -> None:
        if worker.name == "engine-0":
            raise Unreachable("it does not answer in time", silent=True)
        await super().healthy(worker)


def deafen(stand: Stand) -> None:
    """Let the health checks of engine 0 time out."""
    watcher = stand.context.watchers._watchers["engine-0"]
    watcher._probe = Deaf(stand.context.pool, stand.context.options)


async def failing(stand: Stand) -> None:
    engine = stand.context.fleet.engines["engine-0"]
    await stand.until(lambda: engine.failing_since_s is not None)


async def test_a_stopped_process_is_found_sooner() -> None:
    """It answers no health check either, as after SIGSTOP."""
    clock = ManualClock()
    async with open_stand(
        *engines(2), clock=clock, health_failure_threshold=10**6, **LIMITS
    ) as stand:
        await known(stand)
        for engine in stand.engines:
            engine.faults.append(Fault("hang", 2))
        fleet = stand.context.fleet
        fleet.drain("engine-1")
        held = await stream(stand)
        fleet.drain("engine-1", False)
        deafen(stand)
        pass_s(stand, clock, 0.0)
        clock.advance(1.0)
        await failing(stand)
        pass_s(stand, clock, 9.8)
        assert stand.state(0) is EngineState.READY
        pass_s(stand, clock, 0.4)
        assert stand.state(0) is EngineState.DOWN
        held.close()


async def test_slow_health_checks_take_no_engine_out_that_works() -> None:
    """Probes wait behind a load on a busy CPU."""
    clock = ManualClock()
    async with open_stand(FakeSettings(step_s=0.02), *engines(1), clock=clock, **LIMITS) as stand:
        fleet, got = stand.context.fleet, stand.engines[0]
        fleet.drain("engine-1")
        answer = await stand.post(stream=True, max_tokens=10**6, ignore_eos=True).__aenter__()
        fleet.drain("engine-1", False)
        deafen(stand)
        for _ in range(20):
            steps = got.steps
            clock.advance(5.0)
            await stand.until(lambda n=steps: got.steps > n + 2)
            stand.context.tick()
            assert stand.state(0) is EngineState.READY
        answer.close()


async def test_the_only_engine_is_not_down_for_being_slow_to_answer() -> None:
    clock = ManualClock()
    async with open_stand(*engines(1), clock=clock, **PATIENT, **LIMITS) as stand:
        deafen(stand)
        clock.advance(1.0)
        await failing(stand)
        for _ in range(28):
            clock.advance(10.0)
            stand.context.tick()
            await asyncio.sleep(0.01)
            assert stand.state(0) is EngineState.READY
        async with stand.post() as answer:
            assert answer.status == 200
        while stand.state(0) is not EngineState.DOWN:  # one that was stopped is found in the end
            clock.advance(100.0)
            await asyncio.sleep(0.06)
        assert clock.now() > 600.0


async def test_a_sign_of_life_brings_an_engine_back_on_trial() -> None:
    """As after SIGCONT: steps are counted again long before the breaker's time is over."""
    clock = ManualClock()
    stats: dict[str, Any] = {"cost": COST, "max_num_seqs": 8, "steps": 100}
    settings = (FakeSettings(stats=stats), *engines(1))
    async with open_stand(*settings, clock=clock, **LIMITS) as stand:
        engine = stand.context.fleet.engines["engine-0"]
        await stand.until(lambda: engine.steps.get("engine-0") == 100)
        waiting = await waiting_on_hang(stand)
        pass_s(stand, clock, 0.0)
        pass_s(stand, clock, 40.0)
        assert stand.state(0) is EngineState.DOWN
        assert (await waiting).status == 200, "moved"
        stats["steps"] = 101
        await stand.until(lambda: engine.steps.get("engine-0") == 101)
        pass_s(stand, clock, 0.5)
        assert stand.state(0) is EngineState.TRIAL


async def waiting_on_hang(stand: Stand) -> asyncio.Task[Any]:
    stand.engines[0].faults.append(Fault("hang"))
    return await waiting_on(stand, 0)


async def test_an_engine_that_counts_steps_may_be_silent_for_long() -> None:
    """A long answer that is no stream: nothing is heard of it but that the engine works."""
    clock = ManualClock()
    stats: dict[str, Any] = {"cost": COST, "max_num_seqs": 8, "steps": 0}
    async with open_stand(FakeSettings(stats=stats), *engines(1), clock=clock, **LIMITS) as stand:
        engine = stand.context.fleet.engines["engine-0"]
        await stand.until(lambda: engine.steps.get("engine-0") == 0)
        waiting = await waiting_on_hang(stand)
        for steps in range(1, 20):
            stats["steps"] = steps
            clock.advance(10.0)
            await stand.until(lambda n=steps: engine.steps.get("engine-0") == n)
            stand.context.tick()
            assert stand.state(0) is EngineState.READY
        waiting.cancel()


async def test_of_what_nothing_is_known_nothing_is_concluded() -> None:
    """No step count, no answer that has begun: only the limit of a call itself counts."""
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, request_timeout_secs=9e9, **LIMITS) as stand:
        await known(stand)
        waiting = await waiting_on_hang(stand)
        for _ in range(20):
            pass_s(stand, clock, 60.0)
        assert stand.state(0) is EngineState.READY
        assert not waiting.done()
        waiting.cancel()


async def test_a_long_prompt_is_given_the_time_that_it_needs() -> None:
    """30,000 tokens take 30 s; others on the engine wait for them, and that is no stall."""
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        held, stuck = await stuck_stand(stand)
        fleet = stand.context.fleet
        fleet.drain(f"engine-{1 - stuck}")
        body = {"prompt": [1] * 30_000, "stream": True}
        long = asyncio.ensure_future(stand.post("/v1/completions", **body).__aenter__())
        await stand.until(lambda: len(stand.engines[stuck].received) == 2)
        fleet.drain(f"engine-{1 - stuck}", False)
        pass_s(stand, clock, 0.0)
        pass_s(stand, clock, 200.0)
        assert stand.state(stuck) is EngineState.READY
        pass_s(stand, clock, 20.0)
        assert stand.state(stuck) is EngineState.DOWN
        long.cancel()
        held.close()
        await stand.until(lambda: stand.context.ledger.open == 0)


async def test_a_client_that_does_not_read_takes_no_engine_out() -> None:
    """All has been sent to it that it takes; the engine may have done its work long ago."""
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        await known(stand)
        answer = await stand.post(stream=True, max_tokens=10**6, ignore_eos=True).__aenter__()
        (attempt,) = stand.context.guard.attempts
        await stand.until(attempt.client_is_slow)
        progress = -1
        while progress != attempt.progress:  # until no buffer takes any more
            progress = attempt.progress
            await asyncio.sleep(0.05)
        for _ in range(10):
            pass_s(stand, clock, 10.0)
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
        answer.close()
        await stand.until(lambda: stand.context.ledger.open == 0)


async def test_an_engine_taken_out_for_errors_may_finish_what_it_has() -> None:
    """A long answer that is no stream is silent until its end, and that is no sign of anything."""
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        await known(stand)
        waiting = await waiting_on_hang(stand)
        fleet = stand.context.fleet
        for _ in range(5):
            fleet.tried(fleet.engines["engine-0"], "engine-0", Outcome.ERROR)
        assert stand.state(0) is EngineState.DOWN
        for _ in range(5):
            pass_s(stand, clock, 30.0)
        assert not waiting.done()
        waiting.cancel()
        await stand.until(lambda: stand.context.ledger.open == 0)


async def test_idle_engines_do_not_stall() -> None:
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **LIMITS) as stand:
        for _ in range(5):
            pass_s(stand, clock, 1000.0)
        answer = await stream(stand)
        pass_s(stand, clock, 1.0)
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
        await answer.read()


@pytest.mark.parametrize("limit", [{"engine_stall_secs": 0.0}])
async def test_it_can_be_switched_off(limit: dict[str, Any]) -> None:
    clock = ManualClock()
    async with open_stand(*engines(2), clock=clock, **{**LIMITS, **limit}) as stand:
        held, stuck = await stuck_stand(stand)
        for _ in range(5):
            pass_s(stand, clock, 50.0)
        assert stand.state(stuck) is EngineState.READY
        held.close()
