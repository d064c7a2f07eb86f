"""Tails are the critical path, and the posterior moves with every round."""

from __future__ import annotations

import json
import math
import random

import pytest

from hexgen_vllm.policy.calls import NOTHING, Tail, path_weight
from hexgen_vllm.policy.shapes import Shapes, Window, tails
from hexgen_vllm.policy.workflow import SeenCall, WorkflowRun
from hexgen_vllm.policy.workflows import Workflows
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
    assert len(shapes.export()) == 8 + 2, "by place in the workflow, of the stage, of the type"


def test_enough_lengths_are_thirty_two() -> None:
    shapes = Shapes()
    for tokens in (10, 500):
        for _ in range(31):
            shapes.learn_output("t", "turn", tokens, tokens // 500)
    assert shapes.output_tokens("t", "turn", 0.9, 0, 0) == 500, "those of the stage"
    shapes.learn_output("t", "turn", 10, 0)
    assert shapes.output_tokens("t", "turn", 0.9, 0, 0) == 10


def test_an_answer_without_a_token_is_a_length_too() -> None:
    shapes = Shapes()
    for tokens in (0, 0, 10):
        shapes.learn_output("t", "s", tokens)
    assert shapes.output_tokens("t", "s", 0.5) == 0
    assert shapes.output_tokens("t", "s", 0.5, seen=1) == 10


def test_output_length_grows_with_what_was_seen() -> None:
    shapes = Shapes()
    for n in [10] * 90 + [100] * 10:
        shapes.learn_output("t", "s", n)
    assert shapes.output_tokens("t", "s", 0.5) == 10
    assert shapes.output_tokens("t", "s", 0.5, seen=10) == 100
    longer = shapes.output_tokens("t", "s", 0.5, seen=100)
    assert longer is not None
    assert longer > 100


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


def test_the_newest_256_samples_are_kept() -> None:
    window: Window[int] = Window()
    for i in range(300):
        window.add(i)
    assert (len(window), window.quantile(0.0)) == (256, 44)


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


def shape(*key: object, outputs: object = (), tails: object = ()) -> dict[str, object]:
    """Return one exported entry; tuples become the lists that JSON has."""
    parts = {"key": key, "outputs": outputs, "tails": tails}
    return {name: list(one) if isinstance(one, tuple) else one for name, one in parts.items()}


@pytest.mark.parametrize(
    "broken",
    [
        {"key": ["b"]},
        5,
        None,
        shape("b", outputs=("x",)),
        shape("b", outputs=(-1,)),
        shape("b", outputs=(True,)),
        shape("b", outputs=(1.5,)),
        shape("b", outputs=(10**400,)),
        shape("b", outputs=5),
        shape("b", tails={}),
        shape(),
        shape("a", "b", "c", "d"),
        shape("a", 5),
        *(
            shape("b", tails=(path,))
            for path in (
                [1, 2], [1, 2, 3, 4, 5], (1, 2, 3), "123", [1, 0, -1], [1, 0, True],
                [1, 0, math.inf], [1, 0, math.nan], [1, 0, "2"], [1, 0, 10**400],
            )
        ),
    ],
)  # fmt: skip
def test_nothing_of_broken_shapes_is_taken_in(broken: object) -> None:
    shapes = Shapes()
    good = {"key": ["a", "s"], "outputs": [3], "tails": []}
    with pytest.raises(ValueError, match="not"):
        shapes.restore([good, broken])
    assert shapes.output_tokens("a", "s", 0.5) is None


def test_shapes_come_as_a_list_that_has_room() -> None:
    one, other = shape("a", "s", outputs=(3,)), shape("b", "s")
    for wrong in ((one,), {"a": one}, "text", None):
        with pytest.raises(ValueError, match="not"):
            Shapes().restore(wrong)
    full = Shapes(max_keys=2)
    full.restore([one, other])
    assert full.output_tokens("a", "s", 0.5) == 3
    with pytest.raises(ValueError, match="not"):
        full.restore([one, other, shape("c")])


def test_restored_paths_are_ordered_by_their_work() -> None:
    shapes = Shapes()
    shapes.restore([shape("t", "s", tails=([1, 0, 500], [3, 0, 5], [2, 0, 50]))])
    found = [shapes.tail("t", "s", 0, q).output_tokens for q in (0.0, 0.4, 0.9)]
    assert found == [5, 50, 500]


def test_no_more_is_exported_than_others_can_use() -> None:
    shapes = Shapes()
    for i in range(600):
        shapes.learn_output(f"t{i}", "s", 1)
    for i in range(100):
        shapes.learn_output("t0", "s", i)
    found = shapes.export()
    assert len(found) == 512
    assert max(len(one["outputs"]) for one in found) == 64


def step(start: float, end: float | None, output: int, uncached: int = 0) -> SeenCall:
    one = SeenCall("s", 0, start, uncached)
    one.ended_s, one.uncached_tokens, one.output_tokens = end, uncached, output
    return one


def learned(shapes: Shapes, stage: str, ordinal: int, *outputs: int, type_: str = "t") -> None:
    """Learn that a call of ``stage`` was followed by one of so many tokens, once for each."""
    for output in outputs:
        run = WorkflowRun("w", type_, 0.0)
        first, last = step(0.0, 1.0, 1), step(1.0, 2.0, output, 7)
        first.stage, first.ordinal, last.stage = stage, ordinal, "last"
        run.calls = {"a": first, "b": last}
        shapes.learn(run)


def test_work_is_weighed_in_output_tokens() -> None:
    assert step(0.0, 1.0, 30, 500).weight() == pytest.approx(2.0 + 30 + 5.0)
    assert path_weight(Tail(3.0, 500.0, 30.0)) == pytest.approx(3 * 2.0 + 30 + 5.0)


@pytest.mark.parametrize(
    ("light", "heavy"),
    [
        (step(1.0, 2.0, 100), step(1.0, 2.0, 101)),
        (step(1.0, 2.0, 100, 300), step(1.0, 2.0, 104)),
        (step(1.0, 2.0, 104), step(1.0, 2.0, 100, 600)),
    ],
)
def test_the_heavier_of_two_chains_counts(light: SeenCall, heavy: SeenCall) -> None:
    first = step(0.0, 1.0, 1)
    wanted = Tail(1, heavy.uncached_tokens, heavy.output_tokens)
    for calls in ([first, light, heavy], [heavy, first, light]):
        assert tails(calls)[calls.index(first)] == wanted


def test_two_calls_can_weigh_more_than_a_long_one() -> None:
    first, long = step(0.0, 1.0, 1), step(1.0, 9.0, 100)
    chain = [step(1.0, 2.0, 50), step(2.0, 3.0, 49)]
    assert tails([first, long, *chain])[0] == Tail(2, 0, 99)


def test_a_call_comes_after_another_that_had_ended_when_it_came() -> None:
    before, at_once, beside = step(0.0, 1.0, 1), step(1.0, 2.0, 5), step(0.999, 2.0, 90)
    assert tails([before, at_once, beside])[0] == Tail(1, 0, 5)
    assert tails([step(0.0, None, 1), step(5.0, 6.0, 5)])[0] == NOTHING, "it has not ended"


def test_lengths_are_those_of_the_stage_or_else_of_the_type() -> None:
    shapes = Shapes()
    for n in (10, 20, 30):
        shapes.learn_output("t", "s", n)
    shapes.learn_output("t", "other", 1000)
    assert shapes.output_tokens("t", "s", 0.5) == 20
    assert shapes.output_tokens("t", "unseen", 0.99) == 1000
    assert shapes.output_tokens("u", "s", 0.5) is None
    assert shapes.output_tokens("t", "s", 0.0, seen=30) == 45, "longer than any: half as much again"
    assert shapes.output_tokens("t", "other", 0.0, seen=1000) == 1500
    assert isinstance(shapes.output_tokens("t", "s", 0.0, seen=30), int)
    assert shapes.output_tokens("t", "s", 1.0) == 30
    assert shapes.output_tokens("t", "s", 1.0, seen=10) == 30
    short = Shapes()
    short.learn_output("t", "s", 1)
    assert short.output_tokens("t", "s", 0.5, seen=1) == 2
    assert shapes.known_stages() == {"t": {"s": 3, "other": 1}}
    assert Shapes().known_stages() == {}


def test_paths_back_off_while_evidence_is_thin() -> None:
    shapes = Shapes()
    learned(shapes, "s", 0, *[10] * 8)
    learned(shapes, "s", 1, *[20] * 7)
    learned(shapes, "z", 0, *[40] * 3)
    assert shapes.tail("t", "s", 0, 0.99) == Tail(1, 7, 10), "eight are enough"
    assert shapes.tail("t", "s", 1, 0.99) == Tail(1, 7, 20)
    assert shapes.tail("t", "s", 1, 0.0) == Tail(1, 7, 10), "seven are not: of the stage"
    assert shapes.tail("t", "z", 0, 0.99) == Tail(1, 7, 40)
    assert shapes.tail("t", "z", 0, 0.0) == NOTHING, "of the type, with the last calls"
    assert shapes.tail("t", "s", 0, 0.5, stages_left=0) == NOTHING
    assert shapes.tail("t", "s", 0, 0.5, stages_left=1) == Tail(1, 7, 10)
    few = Shapes()
    learned(few, "s", 0, 10)
    assert few.tail("t", "s", 0, 0.99) == Tail(1, 7, 10), "thin evidence is better than none"
    assert few.tail("u", "s", 0, 0.99) == NOTHING


def test_keys_are_bounded_and_the_longest_unused_goes_first() -> None:
    shapes = Shapes(max_keys=5)  # one for each stage, and the type's
    for stage in ("a", "b", "c", "d"):
        shapes.learn_output("t", stage, 1)
    shapes.learn_output("t", "a", 2)  # used again
    assert set(shapes.known_stages()["t"]) == {"a", "b", "c", "d"}
    shapes.learn_output("t", "e", 1)
    assert set(shapes.known_stages()["t"]) == {"a", "c", "d", "e"}
    shapes.learn_output("t", "f", 1)
    assert set(shapes.known_stages()["t"]) == {"a", "d", "e", "f"}


def test_paths_are_ordered_by_their_work_and_not_by_their_calls() -> None:
    shapes = Shapes()
    for ends in ([(1.0, 2.0, 10), (2.0, 3.0, 10), (3.0, 4.0, 10)], [(1.0, 2.0, 500)]) * 4:
        run = WorkflowRun("w", "t", 0.0)
        run.calls = {str(i): step(*one) for i, one in enumerate([(0.0, 1.0, 1), *ends])}
        for i, one in enumerate(run.calls.values()):
            one.ordinal = i
        shapes.learn(run)
    assert shapes.tail("t", "s", 0, 0.0) == Tail(3, 0, 30)
    assert shapes.tail("t", "s", 0, 1.0) == Tail(1, 0, 500)
