"""Each term of what placing a call on an engine means, one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.engine_load import EngineLoad
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
    lengths = tuple(range(100, 1_100, 100))  # 600 at the median, 1,000 at nine tenths
    found = estimates(load, lengths, slack_quantile=0.9, hopeless_quantile=0.1)
    assert found.predicted_s(hinted(50), 0, 0) == pytest.approx(650 * step_s(1, 0))


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
