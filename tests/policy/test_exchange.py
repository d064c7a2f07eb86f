"""Coordinators that tell each other of their workflows know the same, whatever the order."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.engine_load import Elsewhere
from hexgen_vllm.policy.exchange import Exchange, WorkflowPart
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import MAX_CALLS, SeenCall, WorkflowRun
from hexgen_vllm.policy.workflows import Workflows
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult, EngineSpec, Placement, StepCost


def call(name: str, now: float, workflow: str = "w", **more: object) -> Call:
    return Call(name, workflow, now, 100, "kind", str(more.pop("stage", "s")), **more)  # type: ignore[arg-type]


def done(tokens: int = 50) -> CallResult:
    return CallResult(ok=True, prompt_tokens=100, output_tokens=tokens)


def sharing(**more: int) -> Workflows:
    found = Workflows(Shapes(), **more)
    found.share()
    return found


def tell(one: Workflows, other: Workflows, now: float, whose: str = "1") -> None:
    """Tell all that changed, with names of calls that no other coordinator has."""
    for part in one.changes(1000):
        other.heard(named(part, whose), now)


def named(part: WorkflowPart, whose: str) -> WorkflowPart:
    def name(own: str) -> str:
        return own if "/" in own else f"{whose}/{own}"

    calls = {name(n): seen.copied() for n, seen in part.calls.items()}
    return part._replace(calls=calls, gone=tuple(map(name, part.gone)))


def part(workflow: str = "w", **more: object) -> WorkflowPart:
    """Return what is told of a workflow that began at 1 and was seen at 2, in its first turn."""
    told = WorkflowPart(
        workflow, "kind", "kind", 1.0, 2.0, 1, False, -math.inf, NO_DEADLINE, NO_DEADLINE, False,
        "", (), 0, {}, (), False,
    )  # fmt: skip
    return told._replace(**more)


def seen(stage: str = "s", ended_s: float | None = None, output: int = 0) -> SeenCall:
    found = SeenCall(stage, 0, 1.5, 100)
    found.ended_s, found.output_tokens = ended_s, output
    return found


def heard(run: WorkflowRun | None, *parts: WorkflowPart, now: float = 9.0) -> Exchange:
    found = Exchange(Shapes(), 100)
    for one in parts:
        found.heard(one, run, now)
    return found


def test_all_that_is_known_of_a_workflow_is_told() -> None:
    run = WorkflowRun(
        "w", "kind", 1.0, 30.0, 25.0, 2.0, background=True, asked=True, learned_as="kind/2",
        asked_s=1.5, engine="e", prefix=(1, 2), chunk_tokens=256, turn=4,
    )  # fmt: skip
    run.calls["a"] = seen(ended_s=2.0, output=7)
    one = Exchange(Shapes(), 10)
    one.share([])
    one.changed(run, "a")
    one.changed(run, "failed")
    (told,) = one.changes({"w": run}, 10)
    assert told == WorkflowPart(
        "w", "kind", "kind/2", 1.0, 2.0, 4, True, 1.5, 30.0, 25.0, True, "e", (1, 2), 256,
        {"a": run.calls["a"]}, ("failed",), False,
    )  # fmt: skip
    one.ended(run)
    (told,) = one.changes({}, 10)
    assert told.over
    assert told.calls == {}


def test_no_more_is_returned_than_was_asked_for() -> None:
    one, runs = Exchange(Shapes(), 10), {n: WorkflowRun(n, "kind", 1.0) for n in "abcd"}
    one.share(runs.values())
    one.ended(runs["a"])
    one.ended(runs["b"])
    found = [[told.workflow_id for told in one.changes(runs, 1)] for _ in range(5)]
    assert found == [["a"], ["b"], ["c"], ["d"], []]


def test_of_endings_that_nobody_asks_for_the_newest_are_kept() -> None:
    one = Exchange(Shapes(), 10)
    one.share([])
    for i in range(5000):
        one.ended(WorkflowRun(f"w{i}", "kind", 1.0, last_seen_s=2.0))
    found = one.changes({}, 10_000)
    assert [told.workflow_id for told in found] == [f"w{i}" for i in range(5000 - 4096, 5000)]
    # Of as many it is known that they are over, too.
    for i in (5000 - 4096 - 1, 5000 - 4096, 4999):
        one.heard(part(f"w{i}"), None, 3.0)
    assert list(one.elsewhere) == [f"w{5000 - 4096 - 1}"]


def test_a_workflow_of_one_call_is_told_of_at_its_end() -> None:
    one, run = Exchange(Shapes(), 10), WorkflowRun("w", "kind", 1.0, lone=True)
    one.share([])
    run.calls["a"] = seen(ended_s=2.0, output=7)
    one.changed(run, "a")
    assert one.changes({"w": run}, 10) == []
    one.ended(run)
    assert [list(told.calls) for told in one.changes({}, 10)] == [["a"]]


def test_who_tells_nothing_may_yet_hear() -> None:
    one = Exchange(Shapes(), 10)
    one.left(WorkflowRun("w", "kind", 1.0))
    assert list(one.elsewhere) == ["w"]
    assert one.changes({}, 10) == []


def test_of_workflows_elsewhere_the_one_heard_of_first_goes() -> None:
    one = Exchange(Shapes(), 2)
    for name in ("a", "b", "a", "c"):
        one.heard(part(name), None, 3.0)
    assert list(one.elsewhere) == ["a", "c"]
    assert one.elsewhere["a"].workflow_type == "kind"
    one.expire(2.0)
    assert list(one.elsewhere) == ["a", "c"]
    one.heard(part("c", last_seen_s=3.0), None, 3.0)
    one.expire(2.5)
    assert list(one.elsewhere) == ["c"]
    one.heard(part("a"), None, 4.0)
    one.heard(part("a", over=True, last_seen_s=4.0), None, 4.0)
    one.heard(part("unknown", over=True), None, 4.0)
    assert list(one.elsewhere) == ["c"]


def test_messages_that_are_older_than_an_ending_begin_nothing() -> None:
    found = heard(None, part(last_seen_s=5.0, over=True), part(started_s=5.0))
    assert not found.elsewhere
    found.heard(part(started_s=5.5, last_seen_s=5.6), None, 9.0)  # the name is used again
    assert list(found.elsewhere) == ["w"]
    # Its clock is behind, and what is known to be over stays so.
    found.heard(part(started_s=5.5, last_seen_s=4.0, over=True), None, 9.0)
    found.heard(part(started_s=4.5), None, 9.0)
    assert not found.elsewhere


def test_a_later_call_elsewhere_takes_a_workflow_along() -> None:
    for turn, last_seen_s, goes in (
        (4, 2.0, False),
        (4, 2.5, True),
        (5, 1.0, True),
        (3, 9.0, False),
    ):
        run = WorkflowRun("w", "kind", 1.0, last_seen_s=2.0, turn=4)
        heard(run, part(turn=turn, last_seen_s=last_seen_s))
        assert run.left is goes


@pytest.mark.parametrize(
    ("asked_s", "deadlines"),
    [
        (1.0, (30.0, 25.0)),  # what was said before counts no more
        (2.0, (20.0, 15.0)),  # said at once: the earlier one
        (3.0, (20.0, 15.0)),
    ],
)
def test_the_deadline_that_was_said_last_counts(
    asked_s: float, deadlines: tuple[float, float]
) -> None:
    run = WorkflowRun("w", "kind", 1.0, 30.0, 25.0, asked_s=2.0)
    heard(run, part(asked_s=asked_s, deadline_s=20.0, ordered_by_s=15.0, asked=True))
    assert (run.deadline_s, run.ordered_by_s, run.asked) == (*deadlines, True)
    heard(run, part(asked_s=asked_s, deadline_s=40.0, ordered_by_s=35.0))
    assert run.asked
    if asked_s == 2.0:
        assert (run.deadline_s, run.ordered_by_s) == deadlines


@pytest.mark.parametrize(
    ("in_flight", "last_seen_s", "taken"), [(0, 3.0, True), (0, 2.0, False), (0, 1.0, False),
                                            (1, 3.0, False)]
)  # fmt: skip
def test_who_saw_it_last_says_whether_it_is_demoted(
    in_flight: int, last_seen_s: float, taken: bool
) -> None:
    run = WorkflowRun("w", "kind", 1.0, last_seen_s=2.0, in_flight=in_flight, engine="e")
    heard(run, part(last_seen_s=last_seen_s, background=True))
    assert (run.background, run.last_seen_s) == (taken, 3.0 if taken else 2.0)
    assert run.engine == "e"
    heard(run, part(engine="f", prefix=(7,), chunk_tokens=64))
    assert (run.engine, run.prefix, run.chunk_tokens) == ("f", (7,), 64)


def test_of_very_long_workflows_the_first_calls_are_known_and_how_they_ended() -> None:
    run = WorkflowRun("w", "kind", 1.0)
    own = {f"c{i}": seen() for i in range(MAX_CALLS - 1)}
    heard(run, part(calls={**own, "more": seen("t"), "too many": seen("t")}))
    assert len(run.calls) == MAX_CALLS
    assert run.stage_counts == {"s": MAX_CALLS - 1, "t": 1}
    heard(run, part(calls={"too many": seen("t"), "c3": seen(ended_s=2.0, output=5)}))
    assert run.calls["c3"].ended_s == 2.0
    assert run.attained == run.calls["c3"].weight()
    heard(run, part(gone=("more", "never known")))
    assert "more" not in run.calls
    assert len(run.calls) == MAX_CALLS - 1


def test_a_workflow_is_open_where_its_last_call_came() -> None:
    one, two = sharing(), sharing()
    moved: list[str] = []
    one.on_move = lambda run: moved.append(run.workflow_id)
    first = call("a", 1.0, deadline_s=30.0)
    one.arrived(first, 1.0)
    one.ended(first, done(), 2.0)
    tell(one, two, 2.0)
    assert list(two.elsewhere) == ["w"]
    assert len(two) == 0
    second = call("a", 3.0)  # the same name as at the other
    run, seen = two.arrived(second, 3.0)
    assert (run.deadline_s, run.started_s, seen.ordinal) == (30.0, 1.0, 1)
    assert run.attained > 0
    assert set(run.calls) == {"1/a", "a"}
    tell(two, one, 3.0, "2")
    assert moved == ["w"]
    assert (len(one), list(one.elsewhere), len(two)) == (0, ["w"], 1)


def test_one_with_calls_in_flight_stays_until_they_end() -> None:
    one, two = sharing(), sharing()
    first, second = call("a", 1.0), call("b", 2.0)
    one.arrived(first, 1.0)
    tell(one, two, 1.0)
    two.arrived(second, 2.0)
    tell(two, one, 2.0, "2")
    assert len(one) == len(two) == 1
    two.ended(second, done(), 3.0)
    two.finished("w")
    tell(two, one, 3.0, "2")
    assert len(one) == 1
    ends: list[object] = []
    one.on_end = ends.append
    one.ended(first, done(), 4.0)
    assert (len(one), ends) == (0, [])  # it was counted at the other


def test_what_ended_before_a_workflow_moved_is_told_yet() -> None:
    """A call ends here after the next one came elsewhere, and before that was heard here."""
    one, two = sharing(), sharing()
    first, second = call("a", 1.0), call("b", 1.1, stage="t")
    one.arrived(first, 1.0)
    tell(one, two, 1.0)
    two.arrived(second, 1.1)
    one.ended(first, done(77), 1.2)
    tell(two, one, 1.3, "2")
    assert len(one) == 0
    tell(one, two, 1.3)
    run = two.get("w")
    assert run is not None
    assert run.calls["1/a"].output_tokens == 77


def test_what_comes_after_the_end_begins_nothing() -> None:
    one, two = sharing(), sharing()
    first, second = call("a", 1.0), call("b", 2.0)
    one.arrived(first, 1.0)
    tell(one, two, 1.0)
    two.arrived(second, 2.0)
    two.ended(second, done(), 2.5)
    two.finished("w")
    one.ended(first, done(), 2.4)
    tell(one, two, 3.0)
    assert not two.elsewhere
    assert len(two) == 0
    again, _ = two.arrived(call("c", 5.0), 5.0)
    assert (again.started_s, len(again.calls)) == (5.0, 1)


def test_all_learn_the_same_from_a_workflow() -> None:
    one, two, alone = sharing(), sharing(), sharing()
    for i, at in enumerate((one, two, one, two)):
        for book, name in ((at, "a"), (alone, "a")):
            step = call(f"{name}{i}", float(i), stage=f"s{i}")
            book.arrived(step, float(i))
            book.ended(step, done(10 * i + 1), i + 0.5)
        tell(one, two, i + 0.6)
        tell(two, one, i + 0.6, "2")
    two.finished("w")
    alone.finished("w")
    tell(two, one, 9.0, "2")
    wanted = sorted(map(str, alone.shapes.export()))
    for book in (one, two):
        assert sorted(map(str, book.shapes.export())) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_order_repetition_and_gaps_that_are_filled_do_no_harm(seed: int) -> None:
    """A message may come twice, late, or be told anew after the store was away."""
    rng = random.Random(seed)
    one, now = sharing(), 0.0
    messages: list[WorkflowPart] = []
    for i in range(12):
        now += 1.0
        deadline_s = 100.0 + i if rng.random() < 0.3 else NO_DEADLINE
        step = call(f"c{i}", now, deadline_s=deadline_s, stage=f"s{i % 3}")
        run, _ = one.arrived(step, now)
        if deadline_s != NO_DEADLINE:
            run.asked_s = now  # as the coordinator notes it
        messages += one.changes(10)
        if rng.random() < 0.8:
            one.ended(step, done(i) if rng.random() < 0.8 else CallResult(ok=False), now + 0.5)
            messages += one.changes(10)
    messages = [m for m in messages if rng.random() < 0.7]
    one.share()  # all is told anew
    messages += one.changes(10)
    messages += rng.sample(messages, len(messages) // 2)
    last = messages[-1]
    rng.shuffle(messages)
    two = sharing()
    for part in (*messages, last):
        two.heard(named(part, "1"), now + 1.0)
    mine = one.get("w")
    theirs, _ = two.arrived(call("x", now + 2.0), now + 2.0)
    assert mine is not None
    told = {n.partition("/")[2]: c for n, c in theirs.calls.items() if "/" in n}
    assert {n: c.ended_s for n, c in mine.calls.items()}.items() <= {
        n: c.ended_s for n, c in told.items()
    }.items()
    assert all(told[n].ended_s is None for n in told.keys() - mine.calls.keys())  # those failed
    assert theirs.deadline_s == mine.deadline_s
    assert theirs.attained == pytest.approx(mine.attained)


def test_a_name_that_is_used_again_is_another_workflow() -> None:
    one, two = sharing(), sharing()
    first = call("a", 1.0)
    one.arrived(first, 1.0)
    one.ended(first, done(), 2.0)
    one.finished("w")
    again = call("a", 2.5)
    two.arrived(again, 2.5)
    tell(one, two, 3.0)
    run = two.get("w")
    assert run is not None
    assert (run.started_s, len(run.calls)) == (2.5, 1)
    two.ended(again, done(), 4.0)
    assert two.get("w") is run


def test_what_others_know_is_bounded_and_forgotten() -> None:
    one, two = sharing(), sharing(max_open=10)
    for i in range(30):
        one.arrived(call(f"c{i}", 1.0, f"w{i}"), 1.0)
    tell(one, two, 1.0)
    assert len(two.elsewhere) == 10
    two.expire(500.0)
    assert len(two.elsewhere) == 10
    two.expire(1000.0)
    assert not two.elsewhere


def test_nothing_is_kept_where_nobody_shares() -> None:
    alone = Workflows(Shapes())
    for i in range(100):
        step = call(f"c{i}", 1.0, f"w{i}")
        alone.arrived(step, 1.0)
        alone.ended(step, done(), 2.0)
        alone.finished(f"w{i}")
    assert alone.changes(1000) == []


def test_room_elsewhere_is_no_room_here() -> None:
    """A call waits while others fill the engine, and goes when they have told that they left."""
    one = Coordinator(DispatchOptions(policy="slack", hold_depth=0))
    one.engine_joined(EngineSpec("e", max_num_seqs=2), 0.0)
    assert one.placed_elsewhere("others", {"e": Elsewhere(2, 10, 200, 50)}, 0.0) == []
    assert one.call_arrived(call("a", 1.0), 1.0) == []
    assert one.placed_elsewhere("processes", {}, 1.5) == []  # another source says nothing of those
    (placed,) = one.placed_elsewhere("others", {}, 2.0)
    assert isinstance(placed, Placement)


def test_an_engine_that_joins_later_has_what_was_told_of_it() -> None:
    one = Coordinator(DispatchOptions(policy="slack", hold_depth=0))
    one.placed_elsewhere("others", {"e": Elsewhere(2, 10, 200, 50)}, 0.0)
    one.engine_joined(EngineSpec("e", max_num_seqs=2), 0.0)
    assert one.engines["e"].elsewhere.calls == 2


def test_calls_of_others_take_time_as_own_ones_do() -> None:
    """An engine full of other routers' calls is no better than one full of own ones."""
    cost = StepCost(0.1, 0.0, 0.0, 0.0, 0.001, 0.0)
    options = DispatchOptions(policy="slack", hold_depth=8)
    mine, theirs = Coordinator(options), Coordinator(options)
    for one in (mine, theirs):
        one.engine_joined(EngineSpec("e", max_num_seqs=4), 0.0)
        one.engines["e"].told(cost, 0.0)
    for i in range(4):
        step = call(f"c{i}", 0.0, f"w{i}", expected_output_tokens=100)
        assert mine.call_arrived(step, 0.0)
        mine.call_started(step.call_id, 0.0)
        mine.call_progressed(step.call_id, 20 * i, 0.0)
    full = mine.engines["e"]
    theirs.placed_elsewhere("others", {"e": full.own()}, 0.0)
    told = theirs.engines["e"]
    new = theirs._estimates.demand(call("x", 0.0, "x"), WorkflowRun("x", "kind", 0.0), 0)
    own, other = full.forecast(new, cost), told.forecast(new, cost)
    assert own.wait_s > 1.0
    assert other.wait_s == pytest.approx(own.wait_s, rel=0.5)
    assert other.delay_others_s == pytest.approx(own.delay_others_s, rel=0.01)
    theirs.placed_elsewhere("others", {"e": Elsewhere(1, 0, 100, 90)}, 1.0)
    assert told.forecast(new, cost).wait_s == 0.0


def test_rates_of_others_hold_until_there_are_own_ones() -> None:
    one = Coordinator(DispatchOptions(policy="slack"))
    one.engine_joined(EngineSpec("e", max_num_seqs=8), 0.0)
    load, told = one.engines["e"], StepCost(0.01, 0.0, 0.0, 0.0, 0.001, 0.0)
    load.told(told, 0.01)
    assert load.cost() == told
    assert load.learned() is None  # not to be told as one's own
    now = 0.0
    for i in range(40):
        step = replace(call(f"c{i}", now, f"w{i}"), prompt_tokens=100 + 37 * (i % 5))
        (placed,) = one.call_arrived(step, now)
        assert isinstance(placed, Placement)
        tokens = 20 + i % 7
        now += 0.1 * tokens + 0.001 * step.prompt_tokens
        one.call_finished(
            step.call_id,
            CallResult(ok=True, prompt_tokens=step.prompt_tokens, output_tokens=tokens),
            now,
        )
    own = load.cost()
    assert own is not None
    assert own.step_s(1, 100) == pytest.approx(0.1, rel=0.2)
    assert load.learned() is not None
    load.restarted(EngineSpec("e", max_num_seqs=8), load.state)
    assert load.cost() is None
