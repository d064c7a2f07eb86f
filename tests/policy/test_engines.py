"""Engines on trial, engines that leave, starts that nobody sees, and calls with a priority."""

from __future__ import annotations

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.queue import HeldCalls
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Rejection,
    StepCost,
)

POLICIES = ("round_robin", "least_outstanding", "paper", "slack")
# 10 ms a step, 1000 prompt tokens/s
COST = StepCost(0.01, 0.0, 0.0, 0.0, 1e-3, 0.0)
DONE = CallResult(ok=True, output_tokens=10)


def coordinator(
    *names: str, policy: str = "slack", slots: int = 4, **options: object
) -> Coordinator:
    c = Coordinator(DispatchOptions(policy=policy, hold_depth=0, **options))  # type: ignore[arg-type]
    for name in names or ("e0",):
        spec = EngineSpec(name, frozenset({"m"}), EngineKind.HEXGEN, slots, 100_000)
        c.engine_joined(spec, 0.0)
        c.engine_reported(name, EngineReport(cost=COST))
    return c


def call(name: str, now: float = 0.0, **more: object) -> Call:
    more = {"model": "m", "deadline_s": now + 60.0, **more}
    return Call(name, f"w-{name}", now, more.pop("prompt_tokens", 100), **more)  # type: ignore[arg-type]


def places(decisions: list[Decision]) -> dict[str, str]:
    return {d.call_id: d.engine_id for d in decisions if isinstance(d, Placement)}


def refusals(decisions: list[Decision]) -> dict[str, str]:
    return {d.call_id: d.reason for d in decisions if isinstance(d, Rejection)}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_on_trial_gets_one_call_at_a_time(policy: str) -> None:
    c = coordinator("e0", "e1", policy=policy)
    c.engine_changed("e0", EngineState.DOWN, 1.0)
    c.engine_changed("e0", EngineState.TRIAL, 2.0)
    found: dict[str, str] = {}
    for i in range(4):
        found |= places(c.call_arrived(call(f"c{i}"), 2.0))
    assert sorted(found.values()) == ["e0", "e1", "e1", "e1"]
    (tried,) = [name for name, engine in found.items() if engine == "e0"]
    c.call_finished(tried, DONE, 3.0)
    assert not c.engines["e0"].in_flight
    c.engine_changed("e0", EngineState.READY, 3.0)
    for i in range(4, 7):
        found |= places(c.call_arrived(call(f"c{i}"), 3.0))
    assert list(found.values()).count("e0") >= 2


def test_a_trial_goes_on_when_an_answer_has_begun() -> None:
    """A long stream must not keep an engine that works at one call."""
    c = coordinator()
    c.engine_changed("e0", EngineState.TRIAL, 1.0)
    c.call_arrived(call("first"), 1.0)
    for name in ("second", "third"):
        assert c.call_arrived(call(name), 1.0) == []
    for before, name in (("first", "second"), ("second", "third")):
        c.call_started(before, 2.0)
        assert places(c.tick(2.0)) == {name: "e0"}
    c.call_finished("first", DONE, 3.0)
    assert c.call_arrived(call("fourth"), 3.0) == []
    decisions = c.call_bounced("third", 3.0)
    assert refusals(decisions) == {"third": "rejected-no-endpoints"}
    assert places(decisions) == {"fourth": "e0"}


def test_while_the_only_engine_is_tried_calls_wait() -> None:
    c = coordinator()
    c.engine_changed("e0", EngineState.TRIAL, 1.0)
    assert places(c.call_arrived(call("first"), 1.0)) == {"first": "e0"}
    assert c.call_arrived(call("second"), 1.0) == []
    assert c.held == 1
    assert places(c.call_finished("first", DONE, 2.0)) == {"second": "e0"}


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_a_policy_that_does_not_hold_refuses_nothing_for_a_trial(policy: str) -> None:
    """Nobody else can take the second call: a trial is no reason to turn it away."""
    c = coordinator(policy=policy)
    c.engine_changed("e0", EngineState.TRIAL, 1.0)
    c.call_arrived(call("first"), 1.0)
    assert places(c.call_arrived(call("second"), 1.0)) == {"second": "e0"}


def test_calls_that_wait_for_an_engine_that_leaves_are_refused() -> None:
    c = coordinator(slots=1)
    c.call_arrived(call("in"), 0.0)
    c.call_arrived(call("waits"), 0.0)
    assert refusals(c.engine_left("e0", 1.0)) == {"waits": "rejected-no-endpoints"}
    c.call_finished("in", DONE, 2.0)
    assert not c.engines


def test_a_call_on_an_engine_that_left_can_go_elsewhere() -> None:
    c = coordinator("e0", "e1")
    engine = places(c.call_arrived(call("a"), 0.0))["a"]
    c.engine_left(engine, 1.0)
    assert places(c.call_bounced("a", 1.0)) == {"a": ({"e0", "e1"} - {engine}).pop()}


def test_an_engine_that_restarts_while_it_drains_gets_nothing() -> None:
    c = coordinator("e0", "e1")
    c.engine_joined(EngineSpec("e0", frozenset({"m"})), 1.0, EngineState.DRAINING)
    for i in range(3):
        assert places(c.call_arrived(call(f"c{i}"), 1.0)) == {f"c{i}": "e1"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_start_that_nobody_sees_is_presumed_when_it_is_due(policy: str) -> None:
    """2000 prompt tokens at 1000 tokens/s: two seconds."""
    c = coordinator(policy=policy)
    load = c.engines["e0"]
    c.call_arrived(call("a", prompt_tokens=2000, streamed=False), 10.0)
    for now, queued in ((10.0, 2000), (11.9, 2000), (12.1, 0), (20.0, 0)):
        c.tick(now)
        assert load.queued_prefill_tokens() == queued
    c.call_finished("a", DONE, 21.0)
    assert load.queued_prefill_tokens() == 0


def test_a_start_that_will_be_seen_is_not_presumed() -> None:
    c = coordinator()
    c.call_arrived(call("a", prompt_tokens=2000), 10.0)
    c.tick(1000.0)
    assert c.engines["e0"].queued_prefill_tokens() == 2000
    c.call_started("a", 1000.0)
    assert c.engines["e0"].queued_prefill_tokens() == 0


def test_presumed_starts_make_the_engine_look_free_again() -> None:
    """A long prompt sent whole keeps others away while it is computed, and not for its decode."""
    c = coordinator("e0", "e1")
    first = places(c.call_arrived(call("a", prompt_tokens=9000, streamed=False), 0.0))["a"]
    other = places(c.call_arrived(call("b"), 0.0))["b"]
    assert other != first
    c.call_arrived(call("c"), 0.0)
    c.tick(10.0)
    found = places(c.call_arrived(call("d", 10.0), 10.0))
    assert found["d"] == first, "one call is there, and two at the other"


@pytest.mark.parametrize("when", [0.5, 5.0])
def test_calls_may_end_before_and_after_their_presumed_start(when: float) -> None:
    c = coordinator("e0", "e1")
    c.call_arrived(call("a", prompt_tokens=1000, streamed=False), 0.0)
    c.tick(when)
    c.call_bounced("a", when)
    c.tick(when + 5.0)
    c.call_finished("a", DONE, when + 6.0)
    c.tick(1000.0)
    assert all(e.queued_prefill_tokens() == 0 for e in c.engines.values())


def drained(c: Coordinator, first: str) -> list[str]:
    order, running = [], [first]
    while running:
        found = list(places(c.call_finished(running.pop(0), DONE, 5.0)))
        order += found
        running += found
    return order


def test_priority_outranks_due_time() -> None:
    c = coordinator(slots=1)
    c.call_arrived(call("in"), 0.0)
    for name, priority, deadline_s in (
        ("bulk-soon", -1, 1.0), ("normal-late", 0, 90.0), ("normal-soon", 0, 10.0),
        ("urgent-late", 5, 80.0), ("urgent-soon", 5, 20.0),
    ):  # fmt: skip
        c.call_arrived(call(name, priority=priority, deadline_s=deadline_s), 0.0)
    order = ["urgent-soon", "urgent-late", "normal-soon", "normal-late", "bulk-soon"]
    assert drained(c, "in") == order


def test_without_a_deadline_priority_orders_and_then_arrival() -> None:
    c = coordinator(slots=1)
    c.call_arrived(call("in"), 0.0)
    for i, priority in enumerate((0, 2, 0, 2)):
        lone = {"deadline_s": float("inf"), "priority": priority}
        c.call_arrived(call(f"c{i}", float(i), **lone), float(i))
    assert drained(c, "in") == ["c1", "c3", "c0", "c2"]


def test_a_full_queue_gives_up_the_least_important_first() -> None:
    c = coordinator(slots=1, max_held_calls=2)
    c.call_arrived(call("in"), 0.0)
    c.call_arrived(call("bulk", priority=-1, deadline_s=1.0), 0.0)
    c.call_arrived(call("normal", deadline_s=90.0), 0.0)
    decisions = c.call_arrived(call("urgent", priority=3, deadline_s=95.0), 0.0)
    assert refusals(decisions) == {"bulk": "rejected-saturated"}


def test_a_demoted_call_has_no_priority_left() -> None:
    held = HeldCalls()
    held.add("long", 9.0, 0.0, priority=7, background=True)
    held.add("short", 1.0, 0.0, background=True)
    held.add("important", 1.0, 0.0, priority=9)
    held.demote("important", 5.0)
    assert held.first(3) == ["short", "important", "long"]
