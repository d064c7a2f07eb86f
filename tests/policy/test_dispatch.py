"""The placements of policy/dispatch.py by their formulas, and what they take engines to cost."""

from __future__ import annotations

import math

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.dispatch import (
    Dispatch,
    EarliestFinish,
    LeastOutstanding,
    PaperScore,
    RoundRobin,
    assumed_cost,
    costs,
)
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.types import Call, EngineReport, EngineSpec, Placement, StepCost

COST = StepCost(c0=0.02, c1=1e-3, c2=1e-7, p0=0.0, p1=1 / 4000, p2=0.0)


def engine(name: str, factor: float | None = 1.0, error: float = 0.0, slots: int = 4) -> EngineLoad:
    made = EngineLoad(EngineSpec(name, max_num_seqs=slots, kv_tokens=1_000_000))
    if factor is not None:
        made.reported(EngineReport(cost=COST.scaled(factor), fit_error=error))
    return made


def demand(due_s: float = math.inf, prefix: tuple[int, ...] = ()) -> Demand:
    call = Call("c", "w", 0.0, 2000, prefix=prefix, prefix_chunk_tokens=1000)
    return Demand(call, 100, due_s, 0.0, due_s, 0.0)


def fill(one: EngineLoad, calls: int) -> None:
    for number in range(calls):
        call = Call(f"{one.engine_id}-{number}", "other", 0.0, 10)
        at = Placement(
            call.call_id, one.engine_id, "", uncached_tokens=1, expected_output_tokens=400
        )
        flight = InFlight(call, at, 0.0)
        one.placed(flight)
        flight.first_token_s = 0.0
        one.started(flight)


def turns(policy: Dispatch, engines: list[EngineLoad], count: int) -> str:
    found = (policy.choose(demand(), engines, {}, 0.0) for _ in range(count))
    return "".join(choice.engine.engine_id for choice in found)


def test_round_robin_takes_engines_in_turn() -> None:
    engines = [engine(name) for name in "abc"]
    assert turns(RoundRobin(DispatchOptions()), engines, 7) == "abcabca"
    choice = RoundRobin(DispatchOptions()).choose(demand(), engines, {}, 0.0)
    assert (choice.score, choice.reason, choice.forecast) == (0.0, "turn", None)


def test_the_fewest_calls_win_and_ties_go_round() -> None:
    engines = [engine(name) for name in "abcd"]
    fill(engines[1], 2)
    for one in (engines[0], engines[2], engines[3]):
        fill(one, 1)
    policy = LeastOutstanding(DispatchOptions())
    assert turns(policy, engines, 6) == "cdacda"
    choice = policy.choose(demand(), engines, {}, 0.0)
    assert (choice.score, choice.reason) == (-1.0, "fewest_calls")


def test_the_code_of_the_paper_weighs_speed_against_all_work_ever_assigned() -> None:
    fast, slow = engine("a"), engine("b", 2.0)
    policy = PaperScore(DispatchOptions(alpha=0.3, paper_form="code"))
    one = demand()
    solo = COST.prefill_s(2000) + 100 * COST.step_s(1, 2000)
    assert fast.solo_s(one, COST) == pytest.approx(solo)
    first = policy.choose(one, [fast, slow], {}, 0.0)
    assert (first.engine, first.score, first.reason) == (fast, 0.0, "paper_score")
    assert (fast.assigned_s, slow.assigned_s) == (pytest.approx(solo), 0.0)
    second = policy.choose(one, [fast, slow], {}, 0.0)
    assert second.engine is slow, "0.3 * 1 / 2 - 0 against 0.3 - 0.7"
    assert second.score == pytest.approx(0.15)
    assert slow.assigned_s == pytest.approx(2 * solo)
    third = policy.choose(one, [fast, slow], {}, 0.0)
    assert (third.engine, third.score) == (fast, pytest.approx(0.3 - 0.7))
    assert fast.assigned_s == pytest.approx(2 * solo)
    policy.retuned(DispatchOptions(alpha=1.0, paper_form="code"))
    fourth = policy.choose(one, [fast, slow], {}, 0.0)
    assert (fourth.engine, fourth.score) == (fast, pytest.approx(1.0))


def test_before_anything_is_assigned_the_first_engine_is_the_base() -> None:
    engines = [engine("a", 9.0), engine("b"), engine("c")]
    policy = PaperScore(DispatchOptions(alpha=1.0, paper_form="code"))
    assert policy._code([1.0, 1.0, 1.0], engines) == [0.0, -1.0, -2.0]
    engines[0].assigned_s = 0.25
    assert policy._code([1.0, 0.5, 2.0], engines) == [1.0, 2.0, 0.5]
    engines[0].assigned_s = 0.0
    assert policy.choose(demand(), engines, {}, 0.0).engine.engine_id == "a"
    assert policy.choose(demand(), engines, {}, 0.0).engine.engine_id == "b", "of equals the first"


def test_the_formula_of_the_paper_divides_by_the_queue() -> None:
    options = DispatchOptions(alpha=0.25, beta=3.0, paper_form="paper")
    busy, free = engine("a"), engine("b", 2.0)
    fill(busy, 2)
    one = demand()
    solo = busy.solo_s(one, COST)
    policy = PaperScore(options)
    idle = 0.75 * 3.0 / 1e-3 - 0.25 * 2 * solo
    choice = policy.choose(one, [busy, free], {}, 0.0)
    assert (choice.engine, choice.score) == (free, pytest.approx(idle))
    assert free.assigned_s == pytest.approx(2 * solo)
    choice = policy.choose(one, [busy], {}, 0.0)
    assert choice.score == pytest.approx(0.75 * 3.0 / (2 * solo) - 0.25 * solo)


def finish_score(one: EngineLoad, wanted: Demand, now: float, waiting: int = 0) -> float:
    forecast = one.forecast(wanted, COST, waiting)
    late_s = max(0.0, now + forecast.finish_in_s - wanted.due_s)
    return forecast.finish_in_s + 0.12 * forecast.delay_others_s + late_s


@pytest.mark.parametrize("due_s", [math.inf, 12.0, 10.0])
def test_the_earliest_finish_counts_delays_of_others_and_lateness(due_s: float) -> None:
    one, wanted = engine("a"), demand(due_s)
    fill(one, 3)
    assert one.forecast(wanted, COST).delay_others_s > 0.1
    choice = EarliestFinish(DispatchOptions()).choose(wanted, [one], {}, 9.0)
    assert choice.score == pytest.approx(finish_score(one, wanted, 9.0), rel=1e-12)
    assert choice.reason == "finish"
    assert choice.forecast == one.forecast(wanted, COST)
    assert choice.first_token_in_s(wanted) == pytest.approx(
        choice.forecast.wait_s + choice.forecast.prefill_s
    )


def test_the_earliest_finish_counts_who_waits_for_an_engine() -> None:
    engines, wanted = [engine("a", slots=1), engine("b", 1.2, slots=1)], demand()
    for one in engines:
        fill(one, 1)
    policy = EarliestFinish(DispatchOptions())
    assert policy.choose(wanted, engines, {}, 0.0).engine.engine_id == "a"
    choice = policy.choose(wanted, engines, {"a": 2}, 0.0)
    assert choice.engine.engine_id == "b"
    only = policy.choose(wanted, engines[:1], {"a": 2}, 0.0)
    assert only.score == pytest.approx(finish_score(engines[0], wanted, 0.0, waiting=2))
    assert policy.choose(wanted, [engine("x"), engine("y")], {}, 0.0).engine.engine_id == "x"


@pytest.mark.parametrize("affinity", [True, False])
def test_the_earliest_finish_counts_cached_prefixes_if_asked_to(affinity: bool) -> None:
    plain, cached, wanted = engine("a"), engine("b", 1.05), demand(prefix=(1, 2))
    cached.prefixes.add(wanted.call)
    policy = EarliestFinish(DispatchOptions(prefix_affinity=affinity))
    choice = policy.choose(wanted, [plain, cached], {}, 0.0)
    assert choice.engine is (cached if affinity else plain)
    with pytest.raises(ValueError, match="no engines to choose from"):
        policy.choose(wanted, [], {}, 0.0)


def test_an_unmeasured_engine_is_taken_for_a_little_faster_than_the_others() -> None:
    engines = [engine("a"), engine("b", 3.0), engine("c", None)]
    assumed = COST.scaled(2.0 * 0.9)
    assert assumed_cost([engine("c", None)]) == UNMEASURED
    found = costs(engines)
    assert found[:2] == [COST, COST.scaled(3.0)]
    for name in ("c0", "c1", "c2", "p0", "p1", "p2"):
        assert getattr(found[2], name) == pytest.approx(getattr(assumed, name))
    assert costs(engines[:2]) == [COST, COST.scaled(3.0)]


def test_doubted_rates_move_towards_those_of_the_fleet_and_earlier_ones_are_kept() -> None:
    once = engine("a")
    once.reported(EngineReport(cost=COST.scaled(5.0), fit_error=0.5))
    doubted = engine("b", 4.0, error=0.4)
    assert (once.doubted, doubted.doubted) == (False, True)
    kept = once.cost()
    assert kept is not None
    found = costs([once, doubted, engine("c")])
    assert found[0] == kept, "corrected by what was measured of it before, and by that only"
    assert COST.c0 * 0.9 < found[1].c0 < COST.c0 * 4.0
