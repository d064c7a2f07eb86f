"""What is kept of open workflows: counts, bounds, and when they end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hexgen_vllm.policy.calls import NOTHING, Tail
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflows import Workflows
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult


def call(name: str, workflow: str = "w", now: float = 0.0, **more: Any) -> Call:
    return Call(name, workflow, now, **{"prompt_tokens": 300, "workflow_type": "t", "stage": "s",
                                        **more})  # fmt: skip


def done(output: int | None = 100, **more: Any) -> CallResult:
    return CallResult(ok=True, output_tokens=output, **more)


def test_a_workflow_begins_with_its_first_call() -> None:
    flows = Workflows(Shapes())
    run, first = flows.arrived(call("a", now=4.5, deadline_s=60.0), 5.0)
    assert (run.workflow_id, run.workflow_type, run.started_s) == ("w", "t", 5.0)
    assert (run.deadline_s, run.last_seen_s, run.in_flight) == (60.0, 5.0, 1)
    assert (first.stage, first.ordinal, first.arrived_s, first.prompt_tokens) == ("s", 0, 4.5, 300)
    assert (first.ended_s, first.uncached_tokens, first.output_tokens) == (None, 0, 0)
    again, second = flows.arrived(call("b"), 7.0)
    assert again is run
    assert flows.get("w") is run
    assert flows.get("x") is None
    assert (second.ordinal, run.last_seen_s, run.in_flight) == (1, 7.0, 2)
    assert run.deadline_s == 60.0, "a call that says none changes none"
    assert flows.arrived(call("c", stage="z", deadline_s=70.0), 8.0)[1].ordinal == 0
    assert run.deadline_s == 70.0
    assert run.stage_counts == {"s": 2, "z": 1}
    assert len(flows) == 1
    assert flows.arrived(call("d", "other"), 8.0)[0].deadline_s == NO_DEADLINE


def test_an_answer_is_booked_with_what_it_took() -> None:
    flows = Workflows(shapes := Shapes())
    run, first = flows.arrived(call("a"), 0.0)
    _, second = flows.arrived(call("b"), 0.0)
    flows.ended(call("a"), done(100, prompt_tokens=400, cached_tokens=250), 3.0)
    assert (first.ended_s, first.uncached_tokens, first.output_tokens) == (3.0, 150, 100)
    assert run.attained == pytest.approx(2 + 100 + 1.5)
    flows.ended(call("b"), done(50), 4.0)
    assert (second.uncached_tokens, second.output_tokens) == (300, 50)
    assert run.attained == pytest.approx(2 + 100 + 1.5 + 2 + 50 + 3.0)
    assert (run.in_flight, run.last_seen_s, run.failed) == (0, 4.0, False)
    _, third = flows.arrived(call("c"), 5.0)
    flows.ended(call("c"), done(1, prompt_tokens=10, cached_tokens=99), 6.0)
    assert third.uncached_tokens == 0
    assert shapes.known_stages() == {"t": {"s": 3}}
    flows.ended(call("x", "not there"), done(), 7.0)
    assert shapes.known_stages() == {"t": {"s": 3}}


def test_what_failed_or_has_no_length_leaves_no_trace() -> None:
    flows = Workflows(shapes := Shapes())
    for name, result in (("a", CallResult(ok=False, output_tokens=5)), ("b", done(None))):
        run, _ = flows.arrived(call(name), 0.0)
        flows.ended(call(name), result, 1.0)
        assert run.failed is not result.ok
        assert (run.calls, run.attained, run.in_flight) == ({}, 0.0, 0)
    assert shapes.known_stages() == {}


def test_a_workflow_ends_with_its_last_open_call_once_it_is_said_to_be_final() -> None:
    flows = Workflows(Shapes())
    flows.arrived(call("a"), 0.0)
    flows.arrived(call("b", final=True), 0.0)
    flows.ended(call("b", final=True), done(), 1.0)
    assert len(flows) == 1, "one is open"
    flows.ended(call("a"), done(), 2.0)
    assert len(flows) == 0
    assert flows.finished("w") is None


def test_so_many_workflows_are_taken_in() -> None:
    flows = Workflows(Shapes())
    runs = [flows.arrived(call(name, name), 0.0)[0] for name in "abc"]
    assert [flows.admit(run, 2) for run in runs] == [True, True, False]
    assert [flows.admit(run, 2) for run in runs] == [True, True, False], "who is in stays in"
    assert flows.finished("c") is runs[2]
    assert not flows.admit(flows.arrived(call("d", "d"), 0.0)[0], 2), "it was not one of them"
    assert flows.finished("a") is runs[0]
    assert flows.admit(flows.arrived(call("e", "e"), 0.0)[0], 2)
    assert flows.admit(flows.arrived(call("f", "f"), 0.0)[0], 0), "no limit"
    assert not flows.admit(flows.arrived(call("g", "g"), 0.0)[0], 1)


def test_silence_ends_workflows_the_longest_silent_first() -> None:
    flows = Workflows(Shapes(), idle_s=10.0)
    for i, name in enumerate("abc"):
        flows.arrived(call(name, name), float(i))
        flows.ended(call(name, name), done(), float(i))
    flows.arrived(call("a2", "a"), 3.0)
    flows.ended(call("a2", "a"), done(), 3.0)
    assert flows.expire(11.0) == [], "ten seconds are not more than ten"
    assert [run.workflow_id for run in flows.expire(11.5)] == ["b"]
    assert [run.workflow_id for run in flows.expire(13.5)] == ["c", "a"]
    assert len(flows) == 0
    assert len(Workflows(Shapes())) == 0
    default = Workflows(Shapes())
    default.arrived(call("a"), 0.0)
    default.ended(call("a"), done(), 0.0)
    assert default.expire(600.0) == []
    assert len(default.expire(600.5)) == 1


def test_too_many_workflows_end_though_they_are_not_silent() -> None:
    flows = Workflows(Shapes(), max_open=2)
    for i, name in enumerate("abc"):
        flows.arrived(call(name, name), float(i))
    assert [run.workflow_id for run in flows.expire(2.0)] == ["a"]
    assert flows.expire(2.0) == []


def test_a_workflow_teaches_with_its_first_256_calls() -> None:
    flows = Workflows(shapes := Shapes())
    for i in range(257):
        run, _ = flows.arrived(call(f"c{i}", now=float(i)), float(i))
        flows.ended(call(f"c{i}"), done(1), i + 0.5)
    assert len(run.calls) == 256
    assert run.stage_counts == {"s": 257}
    flows.finished("w")
    assert shapes.tail("t", "s", 0, 0.0) == NOTHING
    assert shapes.tail("t", "s", 0, 0.999) == Tail(255, 255 * 300, 255, 255 * 0.5)


def test_a_workflow_at_work_keeps_no_silent_one_open() -> None:
    flows = Workflows(Shapes(), idle_s=10.0)
    flows.arrived(call("long", "at-work"), 0.0)
    flows.arrived(call("a", "silent"), 1.0)
    flows.ended(call("a", "silent"), done(), 2.0)
    assert [run.workflow_id for run in flows.expire(12.0)] == []
    assert [run.workflow_id for run in flows.expire(13.0)] == ["silent"]
    flows.ended(call("long", "at-work"), done(), 20.0)
    assert [run.workflow_id for run in flows.expire(29.0)] == []
    assert [run.workflow_id for run in flows.expire(31.0)] == ["at-work"]
    assert len(flows) == 0


def test_where_all_are_at_work_the_one_heard_of_first_gives_way() -> None:
    flows = Workflows(Shapes(), max_open=1)
    for at_s, name in enumerate(("one", "two", "one")):
        flows.arrived(call(f"{name}{at_s}", name), float(at_s))
    assert [run.workflow_id for run in flows.expire(3.0)] == ["two"]


def test_lengths_are_learned_under_the_name_by_which_they_are_asked_for() -> None:
    flows = Workflows(shapes := Shapes())
    first, other = call("a"), replace(call("b"), workflow_type="other")
    for one in (first, other):
        flows.arrived(one, 0.0)
        flows.ended(one, done(7), 1.0)
    assert shapes.output_tokens("other", other.stage, 0.5) == 7


def test_every_ending_is_told() -> None:
    """With whether the last call was answered, and when it ended."""
    workflows = Workflows(Shapes(), idle_s=10.0)
    told: list[tuple[str, bool, float]] = []
    workflows.on_end = lambda run: told.append((run.workflow_id, run.failed, run.last_seen_s))
    for name, final, ok in (("a", True, True), ("b", True, False), ("c", False, True)):
        call = Call(name, name, arrived_s=0.0, prompt_tokens=1, final=final)
        workflows.arrived(call, 0.0)
        workflows.ended(call, CallResult(ok=ok, output_tokens=1 if ok else None), 2.0)
    assert told == [("a", False, 2.0), ("b", True, 2.0)]
    workflows.expire(13.0)
    assert told[2:] == [("c", False, 2.0)]
