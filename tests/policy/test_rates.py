"""Rates are trusted no further than their error says, by placement and by overload rules."""

from __future__ import annotations

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.cost import UNMEASURED, CostFit
from hexgen_vllm.policy.dispatch import OPTIMISM, assumed_cost, costs
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Rejection,
    StepCost,
)

COST = StepCost(0.01, 1e-4, 1e-8, 1e-3, 1e-4, 1e-9)


def engine(name: str = "e", cost: StepCost | None = COST, error: float | None = 0.02) -> EngineLoad:
    load = EngineLoad(EngineSpec(name, max_num_seqs=8))
    load.reported(EngineReport(cost=cost, fit_error=error))
    return load


def test_a_good_fit_is_the_cost() -> None:
    for error in (None, 0.0, 0.25):
        assert engine(error=error).cost() == COST


def test_a_fit_that_was_good_falls_back_to_what_it_was() -> None:
    load = engine()
    wrong = COST.scaled(5.0)
    load.reported(EngineReport(cost=wrong, fit_error=0.625))
    found = load.cost()
    assert found is not None
    assert found.c0 == pytest.approx(3 * COST.c0)
    for error in (1.0, 40.0):
        load.reported(EngineReport(cost=wrong, fit_error=error))
        assert load.cost() == COST
    load.reported(EngineReport(cost=wrong, fit_error=0.1))
    assert load.cost() == wrong


def test_a_fit_that_was_never_good_is_corrected_by_other_engines() -> None:
    good, bad = engine("good"), engine("bad", COST.scaled(9.0), 0.625)
    assumed = assumed_cost([good, bad])
    assert assumed.c0 == pytest.approx(OPTIMISM * COST.c0), "what is doubted teaches nothing"
    found = costs([good, bad])
    assert found[0] == COST
    assert found[1].c0 == pytest.approx(0.5 * (9 * COST.c0 + assumed.c0))


def test_a_fit_that_is_all_wrong_and_was_never_good_is_unknown() -> None:
    bad = engine("bad", COST.scaled(9.0), 1.5)
    assert bad.cost() is None
    assert costs([bad]) == [UNMEASURED]
    assert costs([bad, engine("good")])[0].c0 == pytest.approx(OPTIMISM * COST.c0)


def test_steps_that_take_no_time_were_not_measured() -> None:
    assert engine(cost=StepCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)).cost() is None


def test_a_restart_forgets_what_was_believed() -> None:
    load = engine()
    load.restarted(load.spec, EngineState.READY)
    assert load.cost() is None
    load.reported(EngineReport(cost=COST.scaled(5.0), fit_error=2.0))
    assert load.cost() is None


def test_the_least_cost_allows_for_the_error() -> None:
    assert engine(error=0.2).least_cost() == COST
    load = engine(error=0.2)
    load.reported(EngineReport(cost=COST, fit_error=1.0))
    found = load.least_cost()
    assert found is not None
    assert found.c0 == pytest.approx(COST.c0 / 2)


def test_calls_go_where_it_is_faster_only_as_far_as_that_is_believed() -> None:
    """An engine whose fit says that it is ten times as fast, and is off by as much."""
    for error, expected in ((0.05, "b"), (1.2, "a")):
        c = Coordinator(DispatchOptions(policy="slack"))
        for name, cost, off in (("a", COST, 0.02), ("b", COST.scaled(2.0), 0.02)):
            c.engine_joined(EngineSpec(name, max_num_seqs=8), 0.0)
            c.engine_reported(name, EngineReport(cost=cost, fit_error=off))
        c.engine_reported("b", EngineReport(cost=COST.scaled(0.1), fit_error=error))
        decision = c.call_arrived(Call("c", "w", 0.0, 1000), 0.0)[0]
        assert isinstance(decision, Placement)
        assert decision.engine_id == expected


# Overload


def protected(cost: StepCost | None = None, error: float | None = None) -> Coordinator:
    c = Coordinator(DispatchOptions(overload="protect"))
    c.engine_joined(EngineSpec("e", kind=EngineKind.FCFS, max_num_seqs=4), 0.0)
    c.engine_reported("e", EngineReport(cost=cost, fit_error=error))
    return c


def asked(
    name: str, now: float, within_s: float, output: int | None = 200, *, streamed: bool = False
) -> Call:
    return Call(
        name, f"w-{name}", now, 500, deadline_s=now + within_s, expected_output_tokens=output,
        streamed=streamed,
    )  # fmt: skip


def refused(c: Coordinator, call: Call, now: float) -> bool:
    return any(isinstance(d, Rejection) for d in c.call_arrived(call, now))


def test_unknown_rates_refuse_nobody() -> None:
    """A fast engine that says nothing of itself: 200 tokens in a second are no trouble to it."""
    c = protected()
    for i in range(4):
        assert not refused(c, asked(str(i), 0.0, 1.0), 0.0)
    wild = protected(COST.scaled(100.0), 3.0)
    assert not refused(wild, asked("a", 0.0, 1.0), 0.0)


def test_one_unknown_engine_may_be_the_fast_one() -> None:
    c = protected(COST.scaled(100.0), 0.02)
    assert refused(c, asked("a", 0.0, 1.0), 0.0)
    c.engine_joined(EngineSpec("new", max_num_seqs=4), 0.0)
    assert not refused(c, asked("b", 0.0, 1.0), 0.0)
    c.engine_left("new", 0.0)
    c.engine_joined(EngineSpec("other", frozenset(("elsewhere",)), max_num_seqs=4), 0.0)
    assert refused(c, asked("c", 0.0, 1.0), 0.0), "it does not serve the call"


def test_an_unknown_length_refuses_nobody() -> None:
    c = protected(COST, 0.02)
    assert not refused(c, asked("a", 0.0, 1.0, output=None), 0.0)
    assert refused(c, asked("b", 0.0, 1.0, output=5_000), 0.0)


@pytest.mark.parametrize(
    ("error", "within_s", "turned_away"),
    # 200 tokens of 10.1 ms and a bit: 2.1 s on the engine, less by the error
    [
        (0.02, 1.9, True),
        (0.02, 2.5, False),
        (0.25, 1.9, True),
        (0.9, 1.5, False),
        (0.9, 1.0, True),
    ],
)
def test_rates_refuse_no_more_than_their_error_allows(
    error: float, within_s: float, turned_away: bool
) -> None:
    c = protected(COST, 0.02)
    c.engine_reported("e", EngineReport(cost=COST, fit_error=error))
    assert refused(c, asked("a", 0.0, within_s), 0.0) == turned_away


def test_rates_are_learned_from_answers_in_one_piece() -> None:
    """No stream, no telemetry: lengths and times of whole calls, 10 ms a token and slower."""
    c, now = protected(), 0.0
    for i in range(40):
        call = asked(str(i), now, 600.0, output=20 + 10 * (i % 9))
        assert not refused(c, call, now)
        tokens = call.expected_output_tokens or 0
        now += 500 * 1e-4 + tokens * 0.0101
        result = CallResult(ok=True, prompt_tokens=500, cached_tokens=0, output_tokens=tokens)
        c.call_finished(call.call_id, result, now)
    found = c.engines["e"].cost()
    assert found is not None
    assert found.step_s(1, 550) == pytest.approx(0.0101, rel=0.1)
    assert not refused(c, asked("easy", now, 4.0), now)
    assert refused(c, asked("late", now, 0.5), now)


def test_calls_that_teach_nothing_leave_no_trace() -> None:
    c, now = protected(), 0.0
    for i in range(40):
        call = asked(str(i), now, 600.0)
        c.call_arrived(call, now)
        c.call_finished(call.call_id, CallResult(ok=True, output_tokens=0), now)
        now += 1.0
    assert c.engines["e"].cost() is None
    assert isinstance(c.engines["e"].traffic_fit, CostFit)
    assert c.engines["e"].traffic_fit.steps == 0
