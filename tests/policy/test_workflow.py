"""Tails are the critical path, and the posterior moves with every round."""

from __future__ import annotations

import json
import random

import pytest

from hexgen_vllm.policy.calls import Tail
from hexgen_vllm.policy.workflow import NOTHING, SeenCall, Shapes, Window, Workflows, tails
from hexgen_vllm.types import Call, CallResult


def seen(stage: str, start: float, end: float, output: int, prompt: int = 0) -> SeenCall:
    call = SeenCall(stage, 0, start, prompt)
    call.ended_s, call.uncached_tokens, call.output_tokens = end, prompt, output
    return call


def test_tail_of_a_chain_is_what_follows() -> None:
    a, b, c = seen("a", 0, 1, 10), seen("b", 1, 2, 20, 500), seen("c", 2, 3, 30)
    assert tails([a, b, c]) == [Tail(2, 500, 50), Tail(1, 0, 30), NOTHING]


def test_parallel_siblings_count_once_by_the_heavier() -> None:
    first = seen("link", 0, 1, 5)
    short, long = seen("candidate", 1, 2, 100), seen("candidate", 1, 4, 300)
    last = seen("evaluate", 4, 5, 20)
    found = tails([first, short, long, last])
    assert found[0] == Tail(2, 0, 320)
    assert found[1] == found[2] == Tail(1, 0, 20)


def test_time_between_calls_is_the_clients_and_only_once() -> None:
    first = seen("plan", 0, 1, 5)
    short, long = seen("look", 3, 4, 10), seen("look", 3, 6, 300)
    last = seen("say", 6.5, 7, 20)
    found = tails([first, short, long, last])
    assert found[0] == Tail(2, 0, 320, think_s=2.0 + 0.5)
    assert found[1] == found[2] == Tail(1, 0, 20, think_s=0.5), "who waits for a sibling is at work"
    learned = Shapes()
    learned.restore([{"key": ["t"], "outputs": [], "tails": [[1, 0, 20], [1, 0, 20, 0.5]]}])
    assert [one["tails"] for one in learned.export()] == [[[1, 0, 20, 0.0], [1, 0, 20, 0.5]]]


def test_order_of_input_does_not_matter() -> None:
    calls = [seen(f"s{i}", i, i + 0.5, 10 * i) for i in range(8)]
    shuffled = calls[:]
    random.Random(1).shuffle(shuffled)
    by_stage = dict(zip((c.stage for c in shuffled), tails(shuffled), strict=True))
    assert [by_stage[c.stage] for c in calls] == tails(calls)


def run_workflow(flows: Workflows, name: str, rounds: int, now: float) -> float:
    """Play link, then ``rounds`` of revise with 100 tokens each, then a final evaluate of 20."""
    for i, stage in enumerate(["link", *["revise"] * rounds, "evaluate"]):
        final = stage == "evaluate"
        call = Call(f"{name}-{i}", name, now, 10, "t", stage, final=final)
        flows.arrived(call, now)
        now += 1
        tokens = {"link": 5, "revise": 100, "evaluate": 20}[stage]
        flows.ended(call, CallResult(ok=True, output_tokens=tokens), now)
    return now


def test_retry_posterior_conditions_on_rounds_done() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)
    now = 0.0
    # 3 of 4 workflows need one round; every fourth needs five.
    for i in range(80):
        now = run_workflow(flows, f"w{i}", 5 if i % 4 == 0 else 1, now)
    first = shapes.tail("t", "revise", 0, 0.5)
    second = shapes.tail("t", "revise", 1, 0.5)
    assert first == Tail(1, 10, 20), "most often the first round is the last"
    assert second == Tail(4, 40, 320), "who needs a second round needs three more after it"
    assert shapes.tail("t", "revise", 0, 0.9).output_tokens == 420


def test_backs_off_from_unseen_ordinal_to_stage_to_type() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)
    now = 0.0
    for i in range(20):
        now = run_workflow(flows, f"w{i}", 2, now)
    assert shapes.tail("t", "revise", 77, 0.5) in (Tail(1, 10, 20), Tail(2, 20, 120))
    assert shapes.tail("t", "never seen", 0, 0.5) != NOTHING
    assert shapes.tail("other type", "revise", 0, 0.5) == NOTHING


def test_client_word_that_nothing_follows_is_believed() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)
    now = 0.0
    for i in range(20):
        now = run_workflow(flows, f"w{i}", 2, now)
    assert shapes.tail("t", "link", 0, 0.5, stages_left=0) == NOTHING


def test_failed_calls_teach_nothing() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)
    call = Call("c", "w", 0.0, 10, "t", "revise", final=True)
    flows.arrived(call, 0.0)
    flows.ended(call, CallResult(ok=False, reason="abort"), 1.0)
    assert len(flows) == 0
    assert shapes.output_tokens("t", "revise", 0.5) is None


def test_siblings_of_a_stage_have_lengths_of_their_own_once_enough_are_known() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)

    def expected(ordinal: int | None, q: float = 0.5) -> int | None:
        return shapes.output_tokens("t", "draft", q, 0, ordinal)

    for number in range(40):
        for ordinal, tokens in enumerate((400, 100, 30)):
            call = Call(f"c{number}.{ordinal}", f"w{number}", 0.0, 10, "t", "draft")
            flows.arrived(call, 0.0)
            flows.ended(call, CallResult(ok=True, output_tokens=tokens), 1.0)
        if number == 5:
            assert expected(0) == expected(2) == expected(None) == 100, "too few to tell"
    assert [expected(ordinal) for ordinal in range(4)] == [400, 100, 30, 100]
    assert expected(None) == 100
    assert shapes.output_tokens("t", "draft", 0.5, 100, 1) == 400, "longer than any sibling"
    other = Shapes()
    other.restore(shapes.export())
    assert other.output_tokens("t", "draft", 0.5, 0, 2) == 30


def test_only_the_first_calls_of_a_stage_have_lengths_of_their_own() -> None:
    shapes = Shapes()
    for ordinal in range(1000):
        for _ in range(40):
            shapes.learn_output("t", "turn", ordinal, ordinal)
    assert shapes.output_tokens("t", "turn", 0.5, 0, 3) == 3
    newest = shapes.output_tokens("t", "turn", 0.5)
    assert shapes.output_tokens("t", "turn", 0.5, 0, 500) == newest
    assert len(shapes.export()) < 20


def test_output_length_grows_with_what_was_seen() -> None:
    shapes = Shapes()
    for n in [10] * 90 + [100] * 10:
        shapes.learn_output("t", "s", n)
    assert shapes.output_tokens("t", "s", 0.5) == 10
    assert shapes.output_tokens("t", "s", 0.5, seen=10) == 100
    longer = shapes.output_tokens("t", "s", 0.5, seen=100)
    assert longer is not None
    assert longer > 100


def test_silent_workflows_expire_and_busy_ones_do_not() -> None:
    flows = Workflows(Shapes(), idle_s=10.0)
    idle, busy = Call("a", "idle", 0.0, 1), Call("b", "busy", 0.0, 1)
    for call in (idle, busy):
        flows.arrived(call, 0.0)
    flows.ended(idle, CallResult(ok=True, output_tokens=1), 1.0)
    assert flows.expire(5.0) == []
    assert [r.workflow_id for r in flows.expire(20.0)] == ["idle"]
    assert len(flows) == 1


def test_open_workflows_are_bounded() -> None:
    flows = Workflows(Shapes(), max_open=10)
    for i in range(50):
        flows.arrived(Call(f"c{i}", f"w{i}", float(i), 1), float(i))
        flows.expire(float(i))
    assert len(flows) == 10


def test_a_huge_workflow_teaches_a_bounded_part() -> None:
    flows = Workflows(Shapes())
    now = 0.0
    for i in range(2000):
        call = Call(f"c{i}", "w", now, 1, final=i == 1999)
        run, _ = flows.arrived(call, now)
        now += 1
        flows.ended(call, CallResult(ok=True, output_tokens=1), now)
        assert len(run.calls) <= 256
    assert len(flows) == 0


@pytest.mark.parametrize("size", [5, 50])
@pytest.mark.parametrize("unread", [1, 4, 40])
def test_window_quantiles_match_a_sorted_list(size: int, unread: int) -> None:
    rng = random.Random(3)
    window: Window[int] = Window(size)
    kept: list[int] = []
    for _ in range(300):
        for _ in range(rng.randint(1, unread)):
            value = rng.randint(0, 30)
            window.add(value)
            kept = [*kept, value][-size:]
        assert len(window) == len(kept)
        q = rng.random()
        assert window.quantile(q) == sorted(kept)[min(int(q * len(kept)), len(kept) - 1)]
        floor = rng.randint(0, 30)
        above = sorted(v for v in kept if v > floor)
        want = above[min(int(q * len(above)), len(above) - 1)] if above else None
        assert window.above(floor, q) == want


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


def test_who_makes_types_up_takes_no_place_of_another_tenant() -> None:
    shapes = Shapes(max_keys=32)
    shapes.learn_output("sql of a", "draft", 40)
    for i in range(500):
        shapes.learn_output(f"junk-{i} of b", "draft", 1)
    assert shapes.output_tokens("sql of a", "draft", 0.5) == 40
    assert shapes.output_tokens("junk-499 of b", "draft", 0.5) == 1
    assert sum(map(len, shapes.known_stages().values())) <= 32


def test_what_is_taught_by_one_tenant_is_learned_of_that_tenant() -> None:
    shapes = Shapes()
    flows = Workflows(shapes)
    for tenant, tokens in (("a", 10), ("b", 900), ("", 55)):
        for i in range(8):
            one = Call(f"{tenant}{i}", f"w{tenant}{i}", 0.0, 5, "sql", "draft", taught_by=tenant)
            two = Call(f"{tenant}{i}.", f"w{tenant}{i}", 2.0, 5, "sql", "check", taught_by=tenant)
            for call, now in ((one, 1.0), (two, 3.0)):
                flows.arrived(call, call.arrived_s)
                flows.ended(call, CallResult(True, 5, 0, tokens), now)
            flows.finished(f"w{tenant}{i}")
    for kind, tokens in (("sql of a", 10), ("sql of b", 900), ("sql", 55)):
        assert shapes.output_tokens(kind, "draft", 0.5) == tokens
        assert shapes.tail(kind, "draft", 0, 0.5).output_tokens == tokens


def test_learned_shapes_are_exported_within_bounds_and_restored() -> None:
    shapes = Shapes()
    for i in range(300):
        shapes.learn_output(f"type{i}", "stage", i)
        shapes.learn_output("often", "stage", i)
    exported = json.loads(json.dumps(shapes.export(most_keys=100, most_samples=20)))
    assert len(exported) == 100
    assert ["often", "stage"] in [one["key"] for one in exported]
    assert max(len(one["outputs"]) for one in exported) <= 20
    other = Shapes()
    other.restore(json.loads(json.dumps(shapes.export())))
    for q in (0.0, 0.5, 0.99):
        assert other.output_tokens("type250", "stage", q) == 250
        found = other.output_tokens("type250", "other", q)
        assert found == shapes.output_tokens("type250", "other", q)


@pytest.mark.parametrize(
    "broken", [{"key": ["b"]}, 5, None, {"key": ["b"], "outputs": ["x"], "tails": []}]
)
def test_nothing_of_broken_shapes_is_taken_in(broken: object) -> None:
    shapes = Shapes()
    good = {"key": ["a", "s"], "outputs": [3], "tails": []}
    with pytest.raises(ValueError, match="not"):
        shapes.restore([good, broken])
    assert shapes.output_tokens("a", "s", 0.5) is None
