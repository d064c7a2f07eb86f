"""The service drives the coordinator: who waits, who is woken, who is turned away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import Refused
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.router.service import Service
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.types import (
    NO_DEADLINE,
    Call,
    CallResult,
    EngineKind,
    EngineSpec,
    EngineState,
    Placement,
)

POLICIES = ("round_robin", "least_outstanding", "paper", "slack")
GONE = CallResult(ok=False, reason="abort")


def done(tokens: int = 5) -> CallResult:
    return CallResult(ok=True, prompt_tokens=10, output_tokens=tokens)


class Desk:
    """A service with a manual clock."""

    def __init__(
        self, policy: str = "slack", engines: int = 1, slots: int = 1, **more: Any
    ) -> None:
        self.clock, self.ledger = ManualClock(), Ledger()
        options = DispatchOptions(policy=policy, hold_depth=0, **more)
        self.service = Service(Coordinator(options), self.clock, self.ledger)
        for i in range(engines):
            self.service.engine_joined(
                EngineSpec(f"e{i}", kind=EngineKind.HEXGEN, max_num_seqs=slots)
            )

    def call(self, name: str, deadline_s: float = 60.0, **more: Any) -> Call:
        now = self.clock.now()
        due = now + deadline_s if deadline_s < NO_DEADLINE else NO_DEADLINE
        return Call(name, more.pop("workflow", f"w-{name}"), now, 10, deadline_s=due, **more)

    def place(self, name: str, deadline_s: float = 60.0, **more: Any) -> asyncio.Task[Placement]:
        return asyncio.create_task(self.service.place(self.call(name, deadline_s, **more)))

    def assert_empty(self) -> None:
        coordinator = self.service.coordinator
        assert coordinator.held == self.service.waiting == 0
        for load in coordinator.engines.values():
            assert not load.in_flight
            assert load.queued_prefill_tokens() == 0


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refusal(waiting: Coroutine[Any, Any, Placement] | asyncio.Task[Placement]) -> Refused:
    with pytest.raises(Refused) as caught:
        await waiting
    return caught.value


async def test_a_call_with_room_is_placed_at_once() -> None:
    desk = Desk()
    placement = await desk.service.place(desk.call("a"))
    assert placement.engine_id == "e0"
    assert desk.ledger.placements == {("e0", "marginal_cost"): 1}
    desk.service.finished("a", done())
    desk.assert_empty()


async def test_held_calls_are_woken_in_order_of_due_time() -> None:
    desk = Desk()
    await desk.service.place(desk.call("first"))
    order: list[str] = []
    for name, deadline in (("late", 90.0), ("soon", 10.0), ("mid", 50.0), ("never", NO_DEADLINE)):
        desk.place(name, deadline).add_done_callback(
            lambda task: order.append(task.result().call_id)
        )
    await settle()
    assert (order, desk.service.waiting) == ([], 4)
    for name in ("first", "soon", "mid", "never"):
        desk.service.finished(name, done())
        await settle()
    assert order == ["soon", "mid", "never", "late"], "without a deadline the default counts"
    desk.service.finished("late", done())
    desk.assert_empty()


async def test_a_full_queue_turns_away_who_comes_last() -> None:
    desk = Desk(max_held_calls=1)
    await desk.service.place(desk.call("in"))
    waiting = desk.place("waits")
    await settle()
    error = await refusal(desk.service.place(desk.call("too much")))
    assert (error.status, error.reason) == (429, "rejected-saturated")
    desk.service.finished("too much", GONE)
    desk.service.finished("in", done())
    assert (await waiting).call_id == "waits"
    desk.service.finished("waits", done())
    desk.assert_empty()


async def test_waiting_has_an_end() -> None:
    desk = Desk(held_timeout_s=30.0)
    await desk.service.place(desk.call("in"))
    old = desk.place("old")
    await settle()
    desk.clock.advance(20.0)
    young = desk.place("young")
    await settle()
    desk.clock.advance(11.0)
    desk.service.tick()
    error = await refusal(old)
    assert (error.status, error.reason) == (504, "rejected-ttl-expired")
    desk.service.finished("old", GONE)
    assert not young.done()
    desk.service.finished("in", done())
    assert (await young).call_id == "young"
    desk.service.finished("young", done())
    desk.assert_empty()


async def test_a_call_that_leaves_while_it_waits_leaves_nothing() -> None:
    desk = Desk()
    await desk.service.place(desk.call("in"))
    leaver, other = desk.place("leaver", 5.0), desk.place("other")
    await settle()
    leaver.cancel()
    await settle()
    desk.service.finished("leaver", GONE)
    desk.service.finished("in", done())
    assert (await other).call_id == "other"
    desk.service.finished("other", done())
    desk.assert_empty()


async def test_a_call_that_leaves_as_it_is_placed_frees_its_place() -> None:
    desk = Desk()
    await desk.service.place(desk.call("in"))
    leaver = desk.place("leaver")
    await settle()
    desk.service.finished("in", done())  # decides for the leaver, who is not awake yet
    leaver.cancel()
    await settle()
    desk.service.finished("leaver", GONE)
    desk.assert_empty()
    assert (await desk.service.place(desk.call("next"))).engine_id == "e0"


async def test_without_engines_calls_are_refused() -> None:
    desk = Desk(engines=0)
    error = await refusal(desk.service.place(desk.call("a")))
    assert (error.status, error.reason) == (503, "rejected-no-endpoints")
    desk.assert_empty()


async def test_when_the_last_engine_goes_down_held_calls_are_refused() -> None:
    desk = Desk()
    await desk.service.place(desk.call("in"))
    waiting = desk.place("waits")
    await settle()
    desk.service.engine_changed("e0", EngineState.DOWN)
    assert (await refusal(waiting)).reason == "rejected-no-endpoints"
    desk.service.finished("waits", GONE)
    desk.service.finished("in", GONE)
    desk.assert_empty()


async def test_a_bounced_call_goes_elsewhere_and_then_nowhere() -> None:
    desk = Desk(engines=2)
    first = await desk.service.place(desk.call("a"))
    second = await desk.service.replace("a")
    assert {first.engine_id, second.engine_id} == {"e0", "e1"}
    assert (await refusal(desk.service.replace("a"))).status == 503
    desk.service.finished("a", GONE)
    desk.assert_empty()


async def test_a_new_engine_takes_held_calls() -> None:
    desk = Desk()
    await desk.service.place(desk.call("in"))
    waiting = desk.place("waits")
    await settle()
    desk.service.engine_joined(EngineSpec("e9", max_num_seqs=1))
    assert (await waiting).engine_id == "e9"


async def test_workflows_end_by_word_and_by_silence() -> None:
    desk = Desk()
    workflows = desk.service.coordinator.workflows
    for name, final in (("a", True), ("b", False), ("c", False)):
        await desk.service.place(desk.call(name, final=final))
        desk.service.finished(name, done())
    assert len(workflows) == 2
    desk.service.workflow_finished("w-b")
    assert len(workflows) == 1
    desk.clock.advance(10_000.0)
    desk.service.tick()
    assert len(workflows) == 0


class Life:
    """Random calls that are placed, bounced, cancelled and ended while engines come and go."""

    def __init__(self, policy: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.desk = Desk(policy, engines=3, slots=2, max_held_calls=6, held_timeout_s=20.0)
        self.tasks: dict[str, asyncio.Task[Placement]] = {}
        self.asked = 0

    async def step(self) -> None:
        acts = (self.arrive, self.end, self.leave, self.bounce, self.change, self.wait)
        self.rng.choices(acts, weights=(8, 6, 1, 1, 1, 2))[0]()
        await settle()
        for name, task in list(self.tasks.items()):
            if task.done() and (task.cancelled() or task.exception() is not None):
                del self.tasks[name]
                self.desk.service.finished(name, GONE)

    def arrive(self) -> None:
        self.asked += 1
        name = f"c{self.asked}"
        flow, last = f"w{self.rng.randrange(6)}", self.rng.random() < 0.2
        self.tasks[name] = self.desk.place(name, self.rng.uniform(1, 90), workflow=flow, final=last)

    def placed(self) -> list[str]:
        return [name for name, task in self.tasks.items() if task.done()]

    def end(self) -> None:
        if names := self.placed():
            name = self.rng.choice(names)
            del self.tasks[name]
            self.desk.service.finished(name, self.rng.choice([done(), GONE]))

    def leave(self) -> None:
        if self.tasks:
            name = self.rng.choice(list(self.tasks))
            self.tasks.pop(name).cancel()
            self.desk.service.finished(name, GONE)

    def bounce(self) -> None:
        if names := self.placed():
            name = self.rng.choice(names)
            self.tasks[name] = asyncio.create_task(self.desk.service.replace(name))

    def change(self) -> None:
        state = self.rng.choice([EngineState.READY, EngineState.READY, EngineState.DOWN])
        self.desk.service.engine_changed(f"e{self.rng.randrange(3)}", state)

    def wait(self) -> None:
        self.desk.clock.advance(self.rng.uniform(0.0, 8.0))
        self.desk.service.tick()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
async def test_random_lives_leave_nothing_behind(policy: str, seed: int) -> None:
    life = Life(policy, seed)
    for _ in range(250):
        await life.step()
        waiting = sum(not task.done() for task in life.tasks.values())
        assert life.desk.service.waiting == waiting
    for i in range(3):
        life.desk.service.engine_changed(f"e{i}", EngineState.READY)
    while life.tasks:
        await settle()
        assert life.placed(), "with engines up and calls ending, everybody gets a turn"
        life.end()
    life.desk.assert_empty()
    workflows = life.desk.service.coordinator.workflows
    for i in range(6):
        run = workflows.get(f"w{i}")
        assert run is None or run.in_flight == 0
    life.desk.clock.advance(10_000.0)
    life.desk.service.tick()
    assert len(workflows) == 0
