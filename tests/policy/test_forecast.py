"""Each term of what placing a call on an engine means, one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, Handover, InFlight
from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad, TransferRate, solo_speed
from hexgen_vllm.policy.estimates import Estimates
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import SeenCall, WorkflowRun
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Role,
    StepCost,
)

COST = StepCost(c0=0.01, c1=1e-3, c2=1e-6, p0=2e-3, p1=1e-4, p2=1e-8)
NAMES = ("c0", "c1", "c2", "p0", "p1", "p2")


def call(name: str, prompt: int = 1_000, prefix: tuple[int, ...] = ()) -> Call:
    return Call(name, f"w-{name}", 0.0, prompt, prefix=prefix, prefix_chunk_tokens=250)


def demand(output: int = 100, due_s: float = 50.0, prompt: int = 1_000) -> Demand:
    return Demand(call("new", prompt), output, 60.0, 10.0, due_s, 0.0)


def engine(
    calls: int = 0,
    started: int = 0,
    *,
    slots: int = 8,
    kind: EngineKind = EngineKind.HEXGEN,
    due_s: float = 40.0,
    prefill_share: float | None = None,
) -> EngineLoad:
    """An engine with calls of 500 tokens, 40 to write; the first ``started`` have begun."""
    load = EngineLoad(EngineSpec("e", kind=kind, max_num_seqs=slots))
    load.reported(EngineReport(cost=COST, prefill_share=prefill_share))
    for i in range(calls):
        placement = Placement(
            f"{i}", "e", "test", due_s=due_s, expected_output_tokens=40, uncached_tokens=500
        )
        flight = InFlight(call(f"{i}", 500), placement, 0.0, batch=i + 1)
        load.placed(flight)
        if i < started:
            flight.first_token_s = 1.0
            load.started(flight)
    return load


OWN = 2e-3 + 1e-4 * 1_000 + 1e-8 * 1_000 * 500  # prefill of the new call alone
AHEAD = 2e-3 + 1e-4 * 500 + 1e-8 * 500 * 250


def step_s(batch: int, context: float) -> float:
    return 0.01 + 1e-3 * batch + 1e-6 * context


@pytest.mark.parametrize(
    ("load", "prefill_s", "step"),
    [
        (engine(), OWN, step_s(1, 0)),
        (engine(2, 2), OWN, step_s(3, 1_000)),  # two decode
        (engine(1, 0), AHEAD + OWN, step_s(2, 500)),  # one is to prefill before
        (engine(1, 0, due_s=55.0), OWN, step_s(2, 500)),  # one comes behind
        (engine(1, 0, due_s=55.0, kind=EngineKind.FCFS), AHEAD + OWN, step_s(2, 500)),
        (engine(0, prefill_share=0.5), OWN, 2 * step_s(1, 0)),
        (engine(0, prefill_share=0.99), OWN, 5 * step_s(1, 0)),  # at most 80 %
        (engine(5, 5, slots=2), OWN, step_s(2, 2_500 * 2 / 6)),  # no more than fit
    ],
)
def test_prefill_and_decode(load: EngineLoad, prefill_s: float, step: float) -> None:
    forecast = load.forecast(demand(), COST)
    assert forecast.prefill_s == pytest.approx(prefill_s)
    assert forecast.decode_s == pytest.approx(100 * step)
    assert load.forecast(demand(output=200), COST).decode_s == pytest.approx(200 * step)
    assert forecast.finish_in_s == pytest.approx(
        forecast.wait_s + forecast.prefill_s + forecast.decode_s
    )


def shown(load: EngineLoad, *shares: float | None) -> float:
    """Return the share of prefill reckoned with after reports of ``shares``."""
    for share in shares:
        load.reported(EngineReport(cost=COST, prefill_share=share))
    return 1.0 - step_s(1, 0) / load.token_s(COST)


def test_the_share_of_prefill_is_that_of_many_reports() -> None:
    load = engine()
    assert shown(load) == pytest.approx(0.0), "nothing said, nothing reckoned with"
    assert shown(load, 0.6) == pytest.approx(0.6)
    assert shown(load, 0.2) == pytest.approx(0.4)
    assert shown(load, None) == pytest.approx(0.4), "an engine that says nothing changes nothing"
    assert shown(load, *[0.4, 0.0] * 200) == pytest.approx(0.2, abs=0.02), "noise is levelled"
    steady = shown(load, *[0.5] * 100)
    assert steady == pytest.approx(0.5, abs=0.01), "and what lasts is followed"
    assert steady - shown(load, 0.0) < 0.05, "one report moves it by a twentieth at most"
    load.restarted(load.spec, EngineState.READY)
    assert shown(load) == pytest.approx(0.0)
    assert shown(load, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("load", "claims", "tokens"),
    [
        (engine(7, 7), 0, 0),  # a slot is free
        (engine(8, 8), 0, 40),  # the first of them ends
        (engine(8, 8), 1, 40),  # a claim is ahead: the second one's end
        (engine(8, 8), 8, 80),  # a whole round of claims is
        (engine(7, 7), 3, 40),  # claims take the free slot
    ],
)
def test_wait_for_a_slot(load: EngineLoad, claims: int, tokens: int) -> None:
    forecast = load.forecast(demand(), COST, claims)
    assert forecast.wait_s == pytest.approx(tokens * load.token_s(COST))


@pytest.mark.parametrize(
    ("load", "output", "delay_s"),
    [
        (engine(), 100, 0.0),
        (engine(1, 0), 100, OWN),  # waits for the prefill, does not decode
        (engine(1, 1), 100, OWN + (1e-3 + 1e-6 * 1_000) * 40),  # until it ends
        (engine(1, 1), 10, OWN + (1e-3 + 1e-6 * 1_000) * 10),  # until the new one ends
        (engine(3, 2), 10, 3 * OWN + (1e-3 + 1e-6 * 1_000) * 10 * 2),
        (engine(6, 6, slots=4), 10, 6 * OWN + (1e-3 + 1e-6 * 1_000) * 10 * 4),
    ],
)
def test_delay_to_others(load: EngineLoad, output: int, delay_s: float) -> None:
    assert load.forecast(demand(output), COST).delay_others_s == pytest.approx(delay_s)


def test_cached_tokens_need_no_prefill_but_are_context() -> None:
    load = engine()
    known = call("known", prefix=(1, 2))
    load.prefixes.add(known)
    new = Demand(call("new", prefix=(1, 2, 3)), 100, 60.0, 10.0, 50.0, 0.0)
    forecast = load.forecast(new, COST)
    assert forecast.uncached_tokens == 500
    assert forecast.prefill_s == pytest.approx(2e-3 + 1e-4 * 500 + 1e-8 * 500 * (500 + 250))
    assert load.forecast(new, COST, affinity=False).uncached_tokens == 1_000


@pytest.mark.parametrize("name", NAMES)
def test_each_coefficient_counts(name: str) -> None:
    load = engine(2, 1)
    load.placed(InFlight(call("w", 700), Placement("w", "e", "test", uncached_tokens=700), 0.0))
    dearer = replace(COST, **{name: 2 * getattr(COST, name)})
    before, after = load.forecast(demand(), COST), load.forecast(demand(), dearer)
    assert after.finish_in_s > before.finish_in_s
    if name not in ("c0",):  # what a step costs anyway is no delay to others
        assert after.delay_others_s > before.delay_others_s


# What is predicted of a whole workflow


def estimates(load: EngineLoad, lengths: tuple[int, ...] = (), **options: float) -> Estimates:
    shapes = Shapes()
    for length in lengths:
        run = WorkflowRun(f"w{length}", "default", 0.0)
        for i, tokens in enumerate((10, length)):
            run.calls[f"{i}"] = seen = SeenCall("default", i, float(i), 100)
            seen.ended_s, seen.output_tokens = i + 0.5, tokens
        shapes.learn(run)
    return Estimates(DispatchOptions(**options), shapes, {"e": load})  # type: ignore[arg-type]


def hinted(output: int, stages_left: int | None = None) -> Demand:
    one = Call("new", "w", 0.0, 1_000, expected_output_tokens=output, stages_left=stages_left)
    return Demand(one, output, 60.0, 0.0, 60.0, 0.0)


def test_a_workflow_takes_its_calls_at_todays_pace() -> None:
    load = engine(2, 2)
    pace = step_s(3, 1_000)
    found = estimates(load)
    assert found.predicted_s(hinted(100), 0, 0) == pytest.approx(100 * pace)
    # Calls that wait before it share the engine: three at a time.
    assert found.predicted_s(hinted(100), 0, 90) == pytest.approx(30 * pace + 100 * pace)
    # A hint of two more stages like this one.
    assert found.predicted_s(hinted(100, stages_left=2), 0, 0) == pytest.approx(300 * pace)


def test_what_follows_is_predicted_by_the_median() -> None:
    load = engine()
    lengths = tuple(range(500, 1_000, 50))  # 750 at the median, 950 at nine tenths
    found = estimates(load, lengths, slack_quantile=0.9)
    assert found.predicted_s(hinted(50), 0, 0) == pytest.approx(800 * step_s(1, 0))


def test_pace_is_the_harmonic_mean_of_engines_that_have_the_model() -> None:
    fast, slow = engine(), engine()
    slow.reported(EngineReport(cost=COST.scaled(3.0)))
    found = Estimates(DispatchOptions(), Shapes(), {"a": fast, "b": slow})
    pace = 2 / (1 / step_s(1, 0) + 1 / (3 * step_s(1, 0)))
    assert found.predicted_s(hinted(100), 0, 0) == pytest.approx(100 * pace)


def test_nothing_is_predicted_of_a_fleet_that_is_not_there() -> None:
    assert Estimates(DispatchOptions(), Shapes(), {}).predicted_s(hinted(100), 0, 0) == 0.0


def test_answers_teach_times_of_calls_and_not_of_queues() -> None:
    """A call placed beyond the slots waited in the engine for nobody knows how long."""
    load = engine(slots=2)
    load.reported(EngineReport())
    for batch, steps in ((3, 0), (2, 1)):
        placement = Placement("c", "e", "test", uncached_tokens=100)
        flight = InFlight(call("c", 100), placement, 0.0, batch=batch)
        load.learn(flight, CallResult(ok=True, output_tokens=10), 1.0)
        assert load.traffic_fit.steps == steps


def test_usual_calls_one_at_a_time() -> None:
    """Of 2,500 tokens, 110 to write."""
    usual_s = COST.prefill_s(2_500) + 110 * COST.step_s(1)
    assert solo_speed(COST) == pytest.approx(1 / usual_s)


def test_what_others_placed_is_context_too() -> None:
    load = engine(2, 2)
    load.elsewhere = Elsewhere(3, 100, 700, 60)
    assert load.context_tokens() == 2 * 500 + 700


# Prompts from prefill engines


def decoder(*, role: Role = Role.DECODE) -> EngineLoad:
    """An engine with two calls."""
    load = EngineLoad(EngineSpec("d", max_num_seqs=8, role=role))
    load.reported(EngineReport(cost=COST, fit_error=0.0))
    for i in range(2):
        load.placed(InFlight(call(f"{i}", 500), Placement(f"{i}", "d", ""), 0.0))
    return load


@pytest.mark.parametrize("cached", [0, 400, 999, 1_000])
@pytest.mark.parametrize("off", [-1e-9, 1e-9])
def test_a_prompt_is_computed_elsewhere_where_that_is_cheaper(cached: int, off: float) -> None:
    load, new = decoder(), demand()
    assert load.arrives_s(new, COST, cached) is None
    uncached = max(1_000 - cached, 1)
    own_s = COST.prefill_s(uncached, cached) + 0.5 * 2 * COST.p1 * uncached
    moved_s = uncached * 1e-5
    new.handover = Handover("p", own_s - moved_s + off, 0, 0.0, 0.5, 1e-5)
    found = load.arrives_s(new, COST, cached)
    assert found == (None if off > 0 else pytest.approx(own_s + off))
    assert decoder(role=Role.BOTH).arrives_s(new, COST, cached) is None


def test_transfers_count_from_64_tokens_and_four_calls_on() -> None:
    rate = TransferRate()
    for tokens in (63, 64, 64, 64):
        rate.learn(tokens, 0.64)
        assert rate.token_s(5.0) == 5.0
    rate.learn(64, 0.64)
    assert rate.token_s(5.0) == pytest.approx(0.01)


def test_a_prompt_that_has_to_be_computed_here_after_all_is_queued_here() -> None:
    load = EngineLoad(EngineSpec("d", role=Role.DECODE))
    half = Placement("a", "p", "", uncached_tokens=800)
    late, begun = (
        InFlight(call(name, 800), Placement(name, "d", "", uncached_tokens=1, prefill=half), 0.0)
        for name in "ab"
    )
    for entry in (late, begun):
        entry.moved_tokens = 800
        load.placed(entry)
    begun.first_token_s = 1.0
    load.started(begun)
    for entry in (late, begun, late):
        load.takes_prompt(entry)
        assert entry.moved_tokens == 0
    assert load.queued_prefill_tokens() == 800
    assert (late.placement.uncached_tokens, late.placement.prefill) == (800, None)
    assert (begun.placement.uncached_tokens, begun.placement.prefill) == (1, half)


def test_an_engine_that_tells_its_cost_has_nothing_for_others_to_learn() -> None:
    load = EngineLoad(EngineSpec("e"))
    for i in range(40):
        for tokens in (1, 2, 8):
            took_s = tokens * COST.step_s(4, 2_000) + COST.prefill_s(100 * (i % 5) + 50)
            load.traffic_fit.observe_call(tokens, 4, 500, 100 * (i % 5) + 50, took_s)
    learned = load.learned()
    assert learned is not None
    assert learned == (load.traffic_fit.cost(), load.traffic_fit.error())
    load.reported(EngineReport(cost=COST))
    assert load.learned() is None


def test_a_restart_changes_what_an_engine_is() -> None:
    load, one = engine(2), call("a", prefix=(1, 2, 3, 4))
    load.restarted(EngineSpec("e", kv_tokens=500, max_num_seqs=3), EngineState.DRAINING)
    assert (load.slots, load.state, load.calls) == (3, EngineState.DRAINING, 2)
    load.prefixes.add(one)
    assert load.prefixes.match(one) == 500, "as many tokens as it now has room for"
    assert load.learned() is None
