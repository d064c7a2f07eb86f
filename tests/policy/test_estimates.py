"""Estimates of a call, term by term: what it needs, what follows, when it is hopeless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import InFlight
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.estimates import Estimates
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import SeenCall, WorkflowRun
from hexgen_vllm.types import (
    NO_DEADLINE,
    Call,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    StepCost,
)

COST = StepCost(c0=0.01, c1=1e-3, c2=1e-6, p0=2e-3, p1=1e-4, p2=1e-8)
STEP = COST.step_s(1)  # alone
THINK_S = 0.5  # of the workflows below, between two calls
LENGTHS = tuple(range(100, 1_100, 100))


def engine(
    name: str = "e",
    factor: float | None = 1.0,
    *,
    slots: int = 8,
    models: tuple[str, ...] = (),
    calls: int = 0,
    error: float | None = None,
    state: EngineState = EngineState.READY,
) -> EngineLoad:
    load = EngineLoad(EngineSpec(name, frozenset(models), max_num_seqs=slots))
    if factor is not None:
        load.reported(EngineReport(cost=COST.scaled(factor), fit_error=error))
    load.state = state
    for i in range(calls):
        call = Call(f"{name}{i}", "x", 0.0, 0)
        flight = InFlight(call, Placement(call.call_id, name, "", uncached_tokens=1), 0.0)
        load.placed(flight)
        flight.first_token_s = 0.0
        load.started(flight)
    return load


def shapes(lengths: tuple[int, ...] = LENGTHS, calls: int = 3) -> Shapes:
    """Workflows of ``calls`` calls, one after the other, all as long as their number says."""
    made = Shapes()
    for length in lengths:
        run = WorkflowRun(f"w{length}", "t", 0.0)
        for i in range(calls):
            run.calls[f"{i}"] = seen = SeenCall("s", i, float(i), 50)
            seen.ended_s, seen.output_tokens, seen.uncached_tokens = i + 0.5, length, 50
            made.learn_output("t", "s", length)
        made.learn(run)
    return made


def estimates(*engines: EngineLoad, learned: Shapes | None = None, **options: Any) -> Estimates:
    by_name: Mapping[str, EngineLoad] = {one.engine_id: one for one in engines}
    return Estimates(DispatchOptions(**options), learned or Shapes(), by_name)


def call(**more: Any) -> Call:
    return Call("c", "w", **{"arrived_s": 5.0, "prompt_tokens": 400, "workflow_type": "t",
                             "stage": "s", **more})  # fmt: skip


def run(**more: Any) -> WorkflowRun:
    return WorkflowRun("w", "t", 3.0, **{"deadline_s": 60.0, "ordered_by_s": 50.0, **more})


def path_s(tail_tokens: float, prefill_tokens: float, *factors: float, batch: int = 1) -> float:
    """Return the seconds of a path at the harmonic mean of engines, ``factors`` times slower."""
    n = len(factors)
    decode = sum(1 / (f * COST.step_s(batch)) for f in factors)
    prefill = sum(1 / (f * COST.p1) for f in factors)
    return tail_tokens * n / decode + prefill_tokens * n / prefill


def test_what_is_said_of_the_next_call_goes_into_what_follows() -> None:
    one = estimates(engine(calls=2), learned=shapes(), slack_quantile=0.5)
    usual = one.demand(call(), run(), 0)
    later = one.demand(call(resume_s=20.0), run(), 0)
    assert later.tail_s == pytest.approx(usual.tail_s - 2 * THINK_S + 20.0)
    assert later.due_s == pytest.approx(50.0 - later.tail_s)
    sooner = one.demand(call(resume_s=0.1), run(), 0)
    assert sooner.tail_s == usual.tail_s, "all of what was learned lies before the end"
    assert one.demand(call(resume_s=0.0), run(), 0).tail_s == 0.0, "nothing is to come"
    alone = one.demand(call(resume_s=20.0, stages_left=0), run(), 0)
    assert alone.tail_s == 0.0, "the deadline is of this call"
    unknown = estimates(engine()).demand(call(resume_s=20.0), run(), 0)
    assert unknown.tail_s == 20.0


# What a call needs


def test_the_length_is_the_hint_or_learned_or_the_default() -> None:
    known = estimates(engine(), learned=shapes(), length_quantile=0.5, default_output_tokens=77)
    assert known.output_tokens(call()) == 600
    assert known.output_tokens(call(), q=0.1) == 200
    assert known.output_tokens(call(), seen=850) == 1000, "of those that were as long"
    assert known.output_tokens(call(), seen=1000) == 1500, "longer than any before"
    assert known.output_tokens(call(expected_output_tokens=33)) == 33
    assert known.output_tokens(call(expected_output_tokens=33), seen=32) == 33
    assert known.output_tokens(call(expected_output_tokens=33), seen=33) == 600, "outrun"
    assert known.output_tokens(call(max_output_tokens=64)) == 64
    assert known.output_tokens(call(max_output_tokens=0)) == 1
    assert known.output_tokens(call(max_output_tokens=9999)) == 600
    unknown = estimates(engine(), default_output_tokens=77)
    assert unknown.output_tokens(call()) == 77
    assert unknown.output_tokens(call(), seen=76) == 77
    assert unknown.output_tokens(call(), seen=77) == 78
    unknown.retuned(DispatchOptions(default_output_tokens=5))
    assert unknown.output_tokens(call()) == 5


def test_a_demand_is_due_when_what_follows_still_fits() -> None:
    one = estimates(engine(calls=2), engine("b", 3.0), learned=shapes(), slack_quantile=0.5)
    found = one.demand(call(), run(), 0)
    tail_s = 1200 * 2 / (1 / COST.step_s(3) + 1 / (3 * STEP)) + path_s(0, 100, 1.0, 3.0)
    tail_s += 2 * THINK_S
    assert found.tail_s == pytest.approx(tail_s)
    assert found.due_s == pytest.approx(50.0 - tail_s)
    assert (found.call, found.output_tokens) == (call(), 600)
    assert (found.deadline_s, found.started_s) == (60.0, 3.0)
    assert found.tokens == 1000
    assert one.demand(call(), run(), 1).tail_s == pytest.approx(
        600 * 2 / (1 / COST.step_s(3) + 1 / (3 * STEP)) + path_s(0, 50, 1.0, 3.0) + THINK_S
    )
    assert one.demand(call(final=True), run(), 0).tail_s == 0.0
    assert one.demand(call(), run(background=True), 0).due_s == NO_DEADLINE
    assert one.demand(call(arrived_s=49.9), run(), 0).due_s == 49.9, "never before it came"


def test_a_hint_of_stages_counts_where_nothing_was_learned() -> None:
    one = estimates(engine(), default_output_tokens=200)
    assert one.demand(call(), run(), 0).tail_s == 0.0
    found = one.demand(call(stages_left=3), run(), 0)
    assert found.tail_s == pytest.approx(path_s(3 * 200, 3 * 400, 1.0))
    assert estimates().demand(call(stages_left=3), run(), 0).tail_s == 0.0, "no engine, no pace"


def test_what_follows_runs_where_the_model_is() -> None:
    one = estimates(
        engine("a", models=("m",)),
        engine("b", 9.0, models=("other",)),
        engine("c", 0.1, models=("m",), state=EngineState.DOWN),
        engine("d", 2.0, models=("m",), state=EngineState.TRIAL),
    )
    found = one.demand(call(model="m", stages_left=1, expected_output_tokens=100), run(), 0)
    assert found.tail_s == pytest.approx(path_s(100, 400, 1.0, 2.0))


def test_the_pace_counts_the_calls_there_up_to_the_slots() -> None:
    one = estimates(engine(slots=4, calls=9))
    demand = one.demand(call(final=True, expected_output_tokens=100), run(), 0)
    own_s = path_s(100, 0, 1.0, batch=4)
    assert one.own_s(demand) == pytest.approx(own_s)
    assert one.work_s(demand) == pytest.approx(own_s)
    demand = one.demand(call(stages_left=1, expected_output_tokens=100), run(), 0)
    assert one.work_s(demand) == pytest.approx(own_s + demand.tail_s)
    unmeasured = estimates(engine(factor=None))
    assert unmeasured.own_s(demand) == pytest.approx(100 * UNMEASURED.step_s(1))


# The least that it takes


def test_a_call_that_must_go_to_a_slow_engine_says_nothing_of_the_others() -> None:
    one = estimates(engine("slow", 9.0), engine("fast", 0.5))
    bound = call(final=True, engine="slow")
    assert one.least_s(bound, 0, 0.0) == pytest.approx(9.0 * STEP)
    assert one.least_s(call(final=True), 0, 0.0) == pytest.approx(0.5 * STEP)
    assert one.least_s(bound, 0, 0.1) == pytest.approx(9.0 * STEP)


def test_the_least_time_is_of_low_quantiles_on_the_fastest_engine() -> None:
    one = estimates(engine(), engine("b", 0.5, calls=3), learned=shapes())
    fastest = 0.5 * STEP
    assert one.least_s(call(), 0, 0.0) == pytest.approx(fastest * (200 + 400))
    assert one.least_s(call(), 1, 0.0) == pytest.approx(fastest * (200 + 200))
    assert one.least_s(call(final=True), 0, 0.0) == pytest.approx(fastest * 200)
    assert one.least_s(call(final=True, max_output_tokens=50), 0, 0.0) == pytest.approx(
        fastest * 50
    )
    hinted = call(final=True, expected_output_tokens=20)
    assert one.least_s(hinted, 0, 0.0) == pytest.approx(fastest * 20)
    hinted = call(final=True, expected_output_tokens=900)
    assert one.least_s(hinted, 0, 0.0) == pytest.approx(fastest * 200), "a hint makes it no longer"
    assert one.least_s(call(final=True, max_output_tokens=0), 0, 0.0) == pytest.approx(fastest)
    assert estimates(engine()).least_s(call(final=True), 0, 0.0) == pytest.approx(STEP)
    assert estimates().least_s(call(), 0, 0.0) == 0.0


def test_the_fastest_step_is_looked_up_once_a_second_for_each_model() -> None:
    load = engine(models=("m", "n"))
    one = estimates(load)
    final = call(model="m", final=True)
    assert one.least_s(final, 0, 10.0) == pytest.approx(STEP)
    load.reported(EngineReport(cost=COST.scaled(2.0)))
    assert one.least_s(final, 0, 10.0) == pytest.approx(STEP)
    assert one.least_s(final, 0, 10.999) == pytest.approx(STEP)
    assert one.least_s(call(model="n", final=True), 0, 10.5) == pytest.approx(2 * STEP)
    assert one.least_s(final, 0, 11.0) == pytest.approx(2 * STEP)
    load.reported(EngineReport(cost=COST.scaled(3.0)))
    assert one.least_s(final, 0, 9.0) == pytest.approx(3 * STEP), "time before it says nothing"
    elsewhere = estimates(engine(models=("other",)), engine("b", 4.0, models=("m",)))
    assert elsewhere.least_s(final, 0, 0.0) == pytest.approx(4 * STEP)
    unmeasured = estimates(engine(factor=None), engine("b", 1000.0))
    assert unmeasured.least_s(final, 0, 0.0) == pytest.approx(UNMEASURED.step_s(1))


def test_a_workflow_is_given_up_when_the_best_engine_will_not_save_it() -> None:
    slow, fast = engine("a", 4.0), engine("b", 1.0, calls=5)
    one = estimates(slow, fast, learned=shapes(), hopeless_pace=1.0)
    step = fast.token_s(COST)
    assert STEP < step < 4.0 * STEP
    likely = COST.p1 * (400 + 100) + step * (200 + 400)
    assert one.hopeless_after_s(call(), 60.0, 0, 0.1) == pytest.approx(60.0 - likely)
    half = estimates(slow, fast, learned=shapes(), hopeless_pace=0.5)
    assert half.hopeless_after_s(call(), 60.0, 0, 0.1) == pytest.approx(60.0 - likely / 2)
    assert one.hopeless_after_s(call(), 60.0, 1, 0.1) == pytest.approx(
        60.0 - COST.p1 * (400 + 50) - step * (200 + 200)
    )
    assert one.hopeless_after_s(call(), 60.0, 0, 0.5) == pytest.approx(
        60.0 - COST.p1 * (400 + 100) - step * (600 + 1200)
    )
    cached = call(final=True, prefix=(1, 2), prefix_chunk_tokens=150)
    slow.prefixes.add(cached)
    times = [4 * (COST.p1 * 100 + STEP * 200), COST.p1 * 400 + step * 200]
    assert one.hopeless_after_s(cached, 60.0, 0, 0.1) == pytest.approx(60.0 - min(times))
    for i in range(5):
        fast.removed(f"b{i}")
    idle = 60.0 - COST.p1 * 400 - STEP * 200
    assert one.hopeless_after_s(cached, 60.0, 0, 0.1) == pytest.approx(idle), "idle, it is faster"
    fast.prefixes.add(call(prefix=(1, 2, 3), prefix_chunk_tokens=200))
    whole = call(final=True, prefix=(1, 2, 3), prefix_chunk_tokens=200)
    assert one.hopeless_after_s(whole, 60.0, 0, 0.1) == pytest.approx(60.0 - COST.p1 - STEP * 200)


def test_what_nobody_knows_makes_nothing_hopeless() -> None:
    options = {"hopeless_pace": 1.0, "default_output_tokens": 10_000}
    one = estimates(engine(), **options)
    assert one.hopeless_after_s(call(), 60.0, 0, 0.5) == pytest.approx(60.0 - COST.p1 * 400 - STEP)
    hinted = call(expected_output_tokens=300)
    assert one.hopeless_after_s(hinted, 60.0, 0, 0.5) == pytest.approx(
        60.0 - COST.p1 * 400 - STEP * 300
    )
    assert estimates(engine(), engine("b", None)).hopeless_after_s(hinted, 60.0, 0, 0.5) == 60.0
    assert estimates().hopeless_after_s(hinted, 60.0, 0, 0.5) == 60.0
    others = estimates(engine(models=("m",)), engine("b", 2.0, models=("n",)), **options)
    assert others.hopeless_after_s(call(model="n"), 60.0, 0, 0.5) == pytest.approx(
        60.0 - 2 * (COST.p1 * 400 + STEP)
    )
    doubtful = estimates(engine(error=0.5), **options)
    trusted_s = one.hopeless_after_s(call(), 60.0, 0, 0.5)
    assert doubtful.hopeless_after_s(call(), 60.0, 0, 0.5) > trusted_s


# What is likely


def token_s(batch: int) -> float:
    return COST.step_s(batch, 0.0)


def test_a_workflow_waits_for_those_before_it_at_the_rate_of_the_fleet() -> None:
    busy, free = engine("a", slots=2, calls=4), engine("b", 2.0, slots=4)
    one = estimates(busy, free, learned=shapes(tuple(range(500, 800, 20))))
    demand = one.demand(call(final=True, expected_output_tokens=100), run(), 0)
    times = [busy.token_s(COST), free.token_s(COST.scaled(2.0))]
    rate = 2 / times[0] + 1 / times[1]
    pace = 2 / (1 / times[0] + 1 / times[1])
    assert one.predicted_s(demand, 0, 0) == pytest.approx(100 * pace)
    assert one.predicted_s(demand, 0, 500) == pytest.approx(500 / rate + 100 * pace)
    follows = one.demand(call(expected_output_tokens=100), run(), 0)
    assert one.predicted_s(follows, 0, 0) == pytest.approx((100 + 1280) * pace)
    assert one.predicted_s(follows, 1, 0) == pytest.approx((100 + 640) * pace)
    learned = one.demand(call(), run(), 0)
    assert one.predicted_s(learned, 0, 0) == pytest.approx((640 + 1280) * pace)


def test_what_nobody_can_foresee_is_taken_for_twice_a_short_one_at_most() -> None:
    load = engine()
    one = estimates(load, learned=shapes())
    token_s = load.token_s(COST)
    assert one.predicted_s(one.demand(call(), run(), 0), 0, 0) == pytest.approx(
        2 * (200 + 400) * token_s
    )
    hinted = one.demand(call(expected_output_tokens=100), run(), 0)
    assert one.predicted_s(hinted, 0, 0) == pytest.approx(2 * (100 + 400) * token_s)


def test_a_call_of_unknown_length_is_one_token_long() -> None:
    one = estimates(engine(), default_output_tokens=500)
    found = one.predicted_s(one.demand(call(), run(), 0), 0, 0)
    assert found == pytest.approx(engine().token_s(COST))


def test_the_pace_is_that_of_engines_with_the_model_and_the_rate_that_of_all() -> None:
    mine, other = engine("a", models=("m",)), engine("b", 3.0, models=("n",))
    one = estimates(mine, other, engine("c", 0.1, models=("m",), state=EngineState.DOWN))
    demand = one.demand(call(model="m", final=True, expected_output_tokens=100), run(), 0)
    times = [mine.token_s(COST), other.token_s(COST.scaled(3.0))]
    wanted = 50 / (1 / times[0] + 1 / times[1]) + 100 * times[0]
    assert one.predicted_s(demand, 0, 50) == pytest.approx(wanted)
    nowhere = one.demand(call(model="z", final=True, expected_output_tokens=100), run(), 0)
    pace = 2 / (1 / times[0] + 1 / times[1])
    assert one.predicted_s(nowhere, 0, 0) == pytest.approx(100 * pace), "then of all"


def test_nothing_is_predicted_where_an_engine_that_could_serve_it_is_unknown() -> None:
    one = estimates(engine("a", models=("m",)), engine("b", None, models=("n",)))
    demands = {
        model: one.demand(call(model=model, expected_output_tokens=10), run(), 0) for model in "mn"
    }
    assert one.predicted_s(demands["n"], 0, 0) == 0.0
    assert one.predicted_s(demands["m"], 0, 0) > 0.0, "the other cannot serve it"
    assert estimates().predicted_s(demands["m"], 0, 0) == 0.0


def test_engines_that_compute_prompts_all_the_time_are_full() -> None:
    busy, slotted, idle = engine("a", slots=8, calls=1), engine("b", slots=4, calls=3), engine("c")
    for load in (busy, slotted, idle):
        load.reported(EngineReport(cost=COST, prefill_share=0.6))
    assert busy.fullness() == pytest.approx(0.6)
    assert slotted.fullness() == pytest.approx(0.75)
    assert idle.fullness() == 0.0
    assert estimates(busy, slotted, idle).fullness() == pytest.approx((4.8 + 3.0) / 20)


def test_the_fleet_is_as_full_as_its_slots_at_work() -> None:
    down = engine("c", calls=8, state=EngineState.DOWN)
    one = estimates(engine(slots=8, calls=3), engine("b", slots=2, calls=1), down)
    assert one.fullness() == pytest.approx(0.4)
    assert estimates(engine(slots=2, calls=5)).fullness() == 1.0
    assert estimates(down).fullness() == 1.0
    assert not math.isnan(estimates().fullness())


def test_lengths_are_those_of_the_stage() -> None:
    learned = shapes()
    for length in (1, 1, 1, 5000, 5000, 5000, 5000, 5000, 5000, 5000, 5000):
        learned.learn_output("t", "z", length)
    one = estimates(engine(), learned=learned, length_quantile=0.2)
    assert one.output_tokens(call(stage="z")) == 1
    assert one.output_tokens(call(stage="s")) == 300
    assert one.least_s(call(final=True), 0, 0.0) == pytest.approx(200 * STEP)
    assert one.least_s(call(final=True, stage="z"), 0, 0.0) == pytest.approx(STEP)


def test_who_says_that_nothing_follows_is_believed() -> None:
    one = estimates(engine(), learned=shapes(), hopeless_pace=1.0)
    last = call(stages_left=0)
    assert one.demand(last, run(), 0).tail_s == 0.0
    assert one.least_s(last, 0, 0.0) == pytest.approx(200 * STEP)
    assert one.hopeless_after_s(last, 60.0, 0, 0.1) == pytest.approx(
        60.0 - COST.p1 * 400 - 200 * STEP
    )
    unknown = estimates(engine(), hopeless_pace=1.0)
    hinted = call(expected_output_tokens=30, stages_left=2)
    wanted = COST.p1 * (400 + 2 * 400) + STEP * (30 + 2 * 30)
    assert unknown.hopeless_after_s(hinted, 60.0, 0, 0.5) == pytest.approx(60.0 - wanted)


def test_a_call_itself_takes_what_engines_with_its_model_take() -> None:
    one = estimates(engine("a", models=("m",)), engine("b", 5.0, models=("n",)))
    demand = one.demand(call(model="n", final=True, expected_output_tokens=10), run(), 0)
    assert one.own_s(demand) == pytest.approx(path_s(10, 0, 5.0))


def test_a_call_is_expected_to_be_as_long_as_those_that_came_as_it_does() -> None:
    made = Shapes()
    for _ in range(50):
        for ordinal, tokens in enumerate((700, 50)):
            made.learn_output("t", "draft", tokens, ordinal)
    estimates = Estimates(DispatchOptions(), made, {"e": engine()})
    call = Call("c", "w", 0.0, 100, "t", "draft")
    run = WorkflowRun("w", "t", 0.0)
    lengths = [estimates.demand(call, run, ordinal).output_tokens for ordinal in (0, 1)]
    assert lengths == [700, 50]
    call.max_output_tokens = 300
    assert estimates.demand(call, run, 0).output_tokens == 300
    call.expected_output_tokens = 20
    assert estimates.demand(call, run, 0).output_tokens == 20
