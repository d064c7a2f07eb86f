"""Placements: every term of the marginal cost, the rivals' formulas, policies from outside."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hexgen_vllm import check_policy
from hexgen_vllm.config import PLACEMENT_NAMES, DispatchOptions
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.policy.asked_prefixes import AskedPrefixes
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.dispatch import Dispatch
from hexgen_vllm.policy.engine_load import EngineLoad, solo_speed
from hexgen_vllm.policy.marginal_cost import FIRST
from hexgen_vllm.policy.placements import PLACEMENTS, placement, register
from hexgen_vllm.policy_file import load
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import timed
from hexgen_vllm.types import Call, EngineReport, EngineSpec, Placement, StepCost

COST = StepCost(c0=0.02, c1=1e-3, c2=1e-7, p0=0.0, p1=1 / 4000, p2=0.0)
NO_PREFIX: tuple[int, ...] = ()


def engine(name: str, factor: float = 1.0, **report: float) -> EngineLoad:
    made = EngineLoad(EngineSpec(name, max_num_seqs=64, kv_tokens=1_000_000))
    made.reported(EngineReport(cost=COST.scaled(factor), fit_error=0.0, **report))  # type: ignore[arg-type]
    return made


def demand(
    name: str = "c",
    prompt: int = 4000,
    output: int = 100,
    *,
    workflow: str = "w",
    prefix: tuple[int, ...] = NO_PREFIX,
    deadline_s: float = math.inf,
    started_s: float = 0.0,
    tail_s: float = 0.0,
) -> Demand:
    call = Call(name, workflow, 0.0, prompt, prefix=prefix, prefix_chunk_tokens=1000)
    return Demand(call, output, deadline_s, tail_s, deadline_s - tail_s, started_s)


def fill(one: EngineLoad, calls: int, uncached: int = 1, prompt: int = 10) -> None:
    for number in range(len(one.in_flight), len(one.in_flight) + calls):
        call = Call(f"{one.engine_id}-{number}", "other", 0.0, prompt)
        at = Placement(call.call_id, one.engine_id, "", uncached_tokens=uncached)
        flight = InFlight(call, at, 0.0)
        one.placed(flight)
        flight.first_token_s = 0.0
        one.started(flight)


def chosen(policy: Dispatch, call: Demand, *engines: EngineLoad, now: float = 0.0) -> str:
    choice = policy.choose(call, engines, {}, now)
    policy.placed(call, choice, now)
    return choice.engine.engine_id


def score(options: DispatchOptions, call: Demand, one: EngineLoad) -> float:
    return placement(options).choose(call, [one], {}, 0.0).score


def test_every_placement_has_a_name_that_options_take() -> None:
    assert set(PLACEMENTS) == set(PLACEMENT_NAMES)
    with pytest.raises(ConfigError, match="wlcaff"):
        DispatchOptions(policy="nonsense")


# Marginal cost, term by term


def test_the_score_is_its_formula() -> None:
    one = engine("a")
    fill(one, 3)
    step = COST.step_s(4, one.context_tokens())
    finish = COST.p1 * 4000 + (100 + FIRST) * step
    own = COST.p1 * 4000
    row = (COST.c1 + COST.c2 * (4000 + 50)) * 100
    for x in (0.0, 0.5, 1.0):
        found = score(DispatchOptions(externality=x), demand(), one)
        assert found == pytest.approx(finish + x * 3 * (own + row), rel=1e-9)


def test_the_delay_counts_every_call_of_the_engine_and_the_whole_output() -> None:
    options = DispatchOptions()
    grows = []
    for output in (100, 200):
        alone, beside = engine("a"), engine("a")
        fill(beside, 8)
        free = DispatchOptions(externality=0.0)
        delay = score(options, demand(output=output), beside)
        delay -= score(free, demand(output=output), beside)
        grows.append(delay)
        assert score(options, demand(output=output), alone) == pytest.approx(
            score(free, demand(output=output), alone)
        )
    row = COST.c1 * 100 + COST.c2 * (4100 * 200 - 4050 * 100)
    assert grows[1] - grows[0] == pytest.approx(8 * row)


def test_a_chunk_that_the_fleet_asks_for_is_charged_by_its_share() -> None:
    asked = AskedPrefixes()
    cold = demand(prompt=5000, prefix=(1, 2, 3)).call
    assert asked.shared(cold, 5000, 2) == 5000
    for _ in range(4):
        asked.add(Call("x", "w", 0.0, 3000, prefix=(1, 2), prefix_chunk_tokens=1000))
    count = sum(math.exp(-age / 1000.0) for age in range(4))
    own = 2000 + 1000 + 2 * 1000 / (1 + count / 2)
    assert asked.shared(cold, 5000, 2) == pytest.approx(own, rel=1e-6)
    assert asked.shared(cold, 3000, 2) == 3000, "what is cached is not charged"


def test_asked_prefixes_are_bounded_and_fade() -> None:
    asked = AskedPrefixes()
    asked.add(Call("x", "w", 0.0, 1000, prefix=(1,), prefix_chunk_tokens=1000))
    call = Call("y", "w", 0.0, 1000, prefix=(1,), prefix_chunk_tokens=1000)
    fresh = asked.shared(call, 1000, 1)
    for number in range(60_000):
        asked.add(Call("z", "w", 0.0, 1000, prefix=(number + 2,), prefix_chunk_tokens=1000))
    assert fresh == pytest.approx(500)
    assert asked.shared(call, 1000, 1) == 1000
    assert len(asked._seen) <= 50_000


def test_what_is_shared_is_the_same_whoever_was_asked_about_before() -> None:
    """Calls that wait are asked about again and again; what is kept for them must not be old."""
    quiet, busy = AskedPrefixes(), AskedPrefixes()
    waiting = [
        Call(f"w{i}", "w", 0.0, 5000, prefix=(1, i, 10 * i, 7), prefix_chunk_tokens=1000)
        for i in range(2, 6)
    ]
    for number in range(53_000):  # so many that the first ones are forgotten
        prefix = (1, number % 6) if number < 1000 else (number,)
        placed = Call(f"c{number}", "w", 0.0, 5000, prefix=prefix, prefix_chunk_tokens=1000)
        quiet.add(placed)
        busy.add(placed)
        if number < 2000 or number % 1000 == 0:
            busy.shared(waiting[number % 4], 5000, 2)
        if number in (500, 1500, 52_900):
            prefix = waiting[number % 3].prefix
            placed = Call("p", "w", 0.0, 5000, prefix=prefix, prefix_chunk_tokens=1000)
            quiet.add(placed)
            busy.add(placed)
            again = Call("w2", "w", 0.0, 3000, prefix=(1, 2, 3), prefix_chunk_tokens=1000)
            assert busy.shared(again, 3000, 2) == quiet.shared(again, 3000, 2)
            for call in waiting:
                fresh = Call("x", "w", 0.0, 5000, prefix=call.prefix, prefix_chunk_tokens=1000)
                for uncached in (5000, 2500):
                    assert busy.shared(call, uncached, 2) == quiet.shared(fresh, uncached, 2)


def test_what_is_kept_of_a_call_at_an_engine_is_what_is_asked_for_now() -> None:
    rng, asked, fleet = random.Random(3), AskedPrefixes(), [engine("a"), engine("b")]
    waiting = Call("w", "w", 0.0, 5000, prefix=(1, 2, 3, 4), prefix_chunk_tokens=1000)
    for number in range(200):
        for place in asked.at_engines(waiting, fleet):
            if rng.random() < 0.1:
                place.renew(waiting, COST, rng.choice((0, 1000, 3000, 4000)))
            shared = asked.shared(waiting, place.uncached, len(fleet))
            assert asked.shared_at(place, waiting, len(fleet)) == shared
        prefix = (1, 2, 3, 4, 5)[: rng.randrange(6)]
        asked.add(Call(f"{number}", "w", 0.0, 5000, prefix=prefix, prefix_chunk_tokens=1000))


def weight(policy: Dispatch, call: Demand, now: float = 0.0, factor: float = 1.0) -> float:
    """Return w of a call that is placed on an idle engine with nothing to charge it for."""
    one = engine("a", factor)
    choice = policy.choose(call, [one], {}, now)
    policy.placed(call, choice, now)
    assert choice.forecast is not None
    return choice.score / choice.forecast.finish_in_s


FINISH_S = COST.p1 * 4000 + (100 + FIRST) * COST.step_s(1, 0)  # of the usual call, idle engine


@pytest.mark.parametrize(
    ("call", "now", "needs_s", "has_s"),
    [
        (demand(deadline_s=10.0), 0.0, FINISH_S, 10.0),
        (demand(deadline_s=20.0), 0.0, FINISH_S, 20.0),
        (demand(deadline_s=10.0, tail_s=2.0), 0.0, FINISH_S + 2.0, 10.0),
        (demand(deadline_s=13.0, started_s=3.0), 3.0, FINISH_S, 10.0),
        (demand(deadline_s=13.0, started_s=3.0), 4.5, FINISH_S + 1.5, 10.0),
        (demand(deadline_s=14.0, started_s=3.0, tail_s=1.0), 4.0, FINISH_S + 2.0, 11.0),
    ],
)
@pytest.mark.parametrize("c", [0.5, 1.0])
def test_each_term_of_the_weight(
    call: Demand, now: float, needs_s: float, has_s: float, c: float
) -> None:
    policy = placement(DispatchOptions(stretch=c))
    first = demand(deadline_s=12.0)
    assert weight(policy, first) == pytest.approx(1.0), "the first is the mean itself"
    mean = FINISH_S / 12.0
    rho = needs_s / has_s
    assert weight(policy, call, now) == pytest.approx((rho / mean) ** c)
    mean += 0.01 * (rho - mean)
    assert weight(policy, first) == pytest.approx((FINISH_S / 12.0 / mean) ** c)


def test_the_finish_in_the_weight_is_the_mean_over_engines() -> None:
    policy = placement(DispatchOptions(stretch=1.0))
    weight(policy, demand(deadline_s=12.0))
    fast, slow = engine("fast"), engine("slow", 3.0)
    found = policy.choose(demand(deadline_s=12.0), [fast, slow], {}, 0.0)
    assert found.score == pytest.approx(2.0 * FINISH_S)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_the_weight_is_bounded_and_1_without_a_deadline(c: float) -> None:
    policy = placement(DispatchOptions(stretch=c))
    usual = demand(deadline_s=10.0)
    weight(policy, usual)
    assert weight(policy, demand()) == pytest.approx(1.0)
    assert weight(policy, usual) == pytest.approx(1.0), "one without a deadline is not in the mean"
    for call, now, bound in (
        (demand(deadline_s=1e9), 0.0, 0.2),
        (demand(deadline_s=-1.0), 0.0, 5.0),
        (demand(deadline_s=10.0, started_s=10.0), 10.0, 5.0),
        (demand(deadline_s=20.0, started_s=10.0), 0.0, 0.2),
    ):
        chosen_ = policy.choose(call, [engine("a")], {}, now)
        assert chosen_.score == pytest.approx(bound * FINISH_S)


def test_choices_that_are_not_taken_teach_nothing() -> None:
    policy = placement(DispatchOptions(stretch=1.0))
    weight(policy, demand(deadline_s=10.0))
    policy.choose(demand(deadline_s=5.0), [engine("a")], {}, 0.0)
    assert weight(policy, demand(deadline_s=10.0)) == pytest.approx(1.0)


def test_other_knobs_count_from_then_on() -> None:
    policy = placement(DispatchOptions(stretch=1.0))
    weight(policy, demand(deadline_s=10.0))
    policy.retuned(DispatchOptions(stretch=0.0))
    assert weight(policy, demand(deadline_s=5.0)) == pytest.approx(1.0)
    policy.retuned(DispatchOptions(stretch=1.0))
    assert weight(policy, demand(deadline_s=5.0)) == pytest.approx(2.0)


def test_equal_engines_go_by_name_and_claims_and_caches_count() -> None:
    policy = placement(DispatchOptions(stretch=0.0))
    one, two = engine("a"), engine("b")
    found = policy.choose(demand(), [one, two], {}, 0.0)
    assert (found.engine.engine_id, found.reason) == ("a", "marginal_cost")
    full = [engine("a"), engine("b")]
    for each in full:
        fill(each, 64)
    assert policy.choose(demand(), full, {}, 0.0).engine.engine_id == "a"
    assert policy.choose(demand(), full, {"a": 64}, 0.0).engine.engine_id == "b"
    known = demand(prefix=(1, 2))
    two.prefixes.add(known.call)
    assert policy.choose(known, [one, two], {}, 0.0).engine.engine_id == "b"
    policy.retuned(DispatchOptions(stretch=0.0, prefix_affinity=False))
    assert policy.choose(known, [one, two], {}, 0.0).engine.engine_id == "a"


def test_a_placed_call_asks_for_its_prefix() -> None:
    policy = placement(DispatchOptions(externality=1.0, stretch=0.0))
    asks = demand(prefix=(1, 2, 3, 4))
    beside = engine("b")
    fill(beside, 2)
    before = policy.choose(asks, [beside], {}, 0.0).score
    chosen(policy, asks, engine("a"))
    after = policy.choose(asks, [beside], {}, 0.0).score
    assert before - after == pytest.approx(2 * COST.p1 * 2000), "each chunk is asked for once: half"


@pytest.mark.parametrize(
    ("prompt", "prefix", "uncached", "tokens"),
    [
        (5000, (1, 2, 3), 5000, 5000 - 2 * 500),  # two chunks known, one not, the rest is its own
        (5000, (1, 2, 3), 4000, 4000 - 500),  # the first is cached
        (5000, (1, 2, 3), 3000, 3000),  # both are
        (5000, (1, 2, 3), 2500, 2500),  # in the middle of a chunk: no more than is computed
        (5000, (), 4000, 4000),
        (2000, (1, 2), 2000, 1000),
    ],
)
def test_chunks_count_by_their_share_where_they_are_computed(
    prompt: int, prefix: tuple[int, ...], uncached: int, tokens: float
) -> None:
    asked = AskedPrefixes()
    asked.add(Call("x", "w", 0.0, 2000, prefix=(1, 2), prefix_chunk_tokens=1000))
    call = Call("y", "w", 0.0, prompt, prefix=prefix, prefix_chunk_tokens=1000)
    assert asked.shared(call, uncached, 1) == pytest.approx(tokens)
    assert asked.shared(Call("y", "w", 0.0, prompt, prefix=prefix), uncached, 1) == uncached


def test_a_workflow_that_is_long_against_its_deadline_gets_the_fast_engine() -> None:
    def where(tail_s: float, stretch: float) -> str:
        policy = placement(DispatchOptions(stretch=stretch))
        fast, slow = engine("fast"), engine("slow", 2.0)
        for number in range(200):  # usual workflows need half of what they have
            usual = demand(f"u{number}", deadline_s=100.0, tail_s=45.0)
            policy.placed(usual, policy.choose(usual, [fast, slow], {}, 0.0), 0.0)
        fill(fast, 7)
        return chosen(policy, demand(deadline_s=100.0, tail_s=tail_s), fast, slow)

    assert where(45.0, 3.0) == "slow"
    assert where(85.0, 3.0) == "fast"
    assert where(85.0, 0.0) == "slow"


@pytest.mark.parametrize(("times", "goes"), [(2.5, "slow"), (10.0, "fast")])
def test_a_workflow_that_has_time_does_not_go_where_it_takes_many_times_as_long(
    times: float, goes: str
) -> None:
    policy = placement(DispatchOptions(stretch=3.0))
    fast, slow = engine("fast"), engine("slow", times)
    weight(policy, demand(deadline_s=10.0))
    short = demand(output=1000, prompt=40_000, deadline_s=1000.0)  # weighs 0.2
    fill(fast, 8)  # it adds 120 s to them, and takes itself 31 s there
    assert chosen(policy, short, fast, slow) == goes


@pytest.mark.parametrize("deadline_s", [-1e9, 0.0, 1e-9, 1e18, math.inf])
def test_the_weight_is_bounded_whatever_the_deadline(deadline_s: float) -> None:
    policy, fast = placement(DispatchOptions()), engine("a")
    usual = demand(deadline_s=100.0, tail_s=45.0)
    policy.placed(usual, policy.choose(usual, [fast], {}, 0.0), 0.0)
    base = score(DispatchOptions(stretch=0.0), demand(), fast)
    odd = policy.choose(demand(deadline_s=deadline_s, tail_s=1.0), [fast], {}, 0.0).score
    assert 0.2 * base * (1 - 1e-9) <= odd <= 5.0 * base * (1 + 1e-9)


def test_new_knobs_leave_what_was_learned() -> None:
    policy = placement(DispatchOptions())
    one = engine("a")
    fill(one, 2)
    call = demand(prompt=3000, prefix=(1, 2, 3))
    policy.placed(call, policy.choose(call, [one], {}, 0.0), 0.0)
    before = policy.choose(call, [one], {}, 0.0).score
    policy.retuned(DispatchOptions(externality=0.0))
    assert policy.choose(call, [one], {}, 0.0).score < before
    policy.retuned(DispatchOptions())
    assert policy.choose(call, [one], {}, 0.0).score == pytest.approx(before)


# Rivals


def test_weighted_round_robin_takes_turns_by_speed() -> None:
    policy = placement(DispatchOptions(policy="weighted_round_robin"))
    fast, slow = engine("a"), engine("b", 3.0)
    went = [chosen(policy, demand(), fast, slow) for _ in range(8)]
    assert went.count("a") == 6
    assert went[:4] != ["a", "a", "a", "b"] or went[4:] == went[:4]


def test_weighted_least_counts_calls_against_speed() -> None:
    policy = placement(DispatchOptions(policy="weighted_least"))
    fast, slow = engine("fast"), engine("slow", 3.0)
    fill(fast, 1)
    assert chosen(policy, demand(), fast, slow) == "fast"  # 2 calls at 3 < 1 call at 1
    fill(fast, 2)
    assert chosen(policy, demand(), fast, slow) == "slow"  # 4 calls at 3 > 1 call at 1


def test_sticky_keeps_a_workflow_until_its_engine_is_gone() -> None:
    policy = placement(DispatchOptions(policy="sticky"))
    fast, slow = engine("fast"), engine("slow", 3.0)
    assert chosen(policy, demand(workflow="w"), fast, slow) == "fast"
    fill(fast, 30)
    assert chosen(policy, demand(workflow="w"), fast, slow) == "fast"
    assert chosen(policy, demand(workflow="v"), fast, slow) == "slow"
    assert chosen(policy, demand(workflow="w"), slow) == "slow"
    assert chosen(policy, demand(workflow="w"), fast, slow) == "slow"


@pytest.mark.parametrize(("tokens", "goes"), [(100.0, "holds"), (10_000.0, "empty")])
def test_wlcaff_weighs_uncached_tokens_as_calls(tokens: float, goes: str) -> None:
    policy = placement(DispatchOptions(policy="wlcaff", affinity_tokens=tokens))
    holds, empty = engine("holds"), engine("empty")
    holds.prefixes.add(demand(prompt=4000, prefix=(1, 2, 3)).call)
    fill(holds, 5)
    assert chosen(policy, demand(prompt=4000, prefix=(1, 2, 3)), holds, empty) == goes


def test_llm_d_adds_its_three_scores() -> None:
    policy = placement(DispatchOptions(policy="llm_d"))
    holds = engine("holds", waiting=4, kv_usage=0.5)
    empty = engine("empty", waiting=0, kv_usage=0.0)
    holds.prefixes.add(demand(prompt=4000, prefix=(1, 2, 3)).call)
    whole = demand(prompt=3000, prefix=(1, 2, 3))
    # 3 x 1 + 2 x 0 + 2 x 0.5 against 2 x 1 + 2 x 1: a tie but for the last uncached token
    assert chosen(policy, whole, holds, empty) == "empty"
    holds.reported(EngineReport(cost=COST, fit_error=0.0, waiting=4, kv_usage=0.4))
    assert chosen(policy, whole, holds, empty) == "holds"


def test_cache_aware_follows_the_prefix_until_loads_differ() -> None:
    policy = placement(DispatchOptions(policy="cache_aware"))
    holds, empty = engine("holds"), engine("empty")
    holds.prefixes.add(demand(prompt=4000, prefix=(1, 2, 3)).call)
    fill(holds, 60)
    shared = demand(prompt=4000, prefix=(1, 2, 3))
    assert chosen(policy, shared, holds, empty) == "holds"
    fill(holds, 5)
    assert chosen(policy, shared, holds, empty) == "empty"


def test_dynamo_counts_blocks_to_compute_and_active_ones() -> None:
    policy = placement(DispatchOptions(policy="dynamo"))
    holds, empty = engine("holds"), engine("empty")
    holds.prefixes.add(demand(prompt=4000, prefix=(1, 2, 3)).call)
    shared = demand(prompt=4000, prefix=(1, 2, 3))
    fill(holds, 1, prompt=2900)
    assert chosen(policy, shared, holds, empty) == "holds"  # 1000 + 2900 against 4000
    holds.placed(InFlight(Call("q", "w", 0.0, 200), Placement("q", "holds", ""), 0.0))
    assert chosen(policy, shared, holds, empty) == "empty"


def test_power_of_two_prefers_fewer_tokens_and_is_reproducible() -> None:
    one, other = engine("a"), engine("b")
    fill(one, 4, uncached=500)
    policy = placement(DispatchOptions(policy="power_of_two"))
    assert {chosen(policy, demand(), one, other) for _ in range(20)} == {"b"}


def test_speed_is_as_configured_or_else_as_measured() -> None:
    assert engine("a").speed() == solo_speed(COST)
    told = EngineLoad(EngineSpec("a", speed=7.0))
    told.reported(EngineReport(cost=COST, fit_error=0.0))
    assert told.speed() == 7.0


# What an engine with priorities is told


@pytest.mark.parametrize("order", ["fcfs", "edf", "plas", "srpt"])
def test_every_order_plays(order: str) -> None:
    simulation = Simulation(fleet("reference-4"), named(f"wlcaff+{order}"), lambda _: 60.0)
    simulation.run(timed(text2sql(20, seed=1), [2.0 * i for i in range(20)]))
    assert all(w.error is None for w in simulation.workflows)


# Policies from outside

STRANGER = "examples/policies/wlcaff.py:Wlcaff"


def latencies(name: str) -> list[float | None]:
    simulation = Simulation(
        fleet("reference-4"), named(name), lambda _: 60.0, SimOptions(record_calls=False)
    )
    simulation.run(timed(text2sql(60, seed=3), [3.0 * i for i in range(60)]))
    return [w.latency_s for w in simulation.workflows]


def test_a_policy_from_outside_gives_the_same_as_the_built_in() -> None:
    assert latencies(f"{STRANGER}+fcfs") == latencies("wlcaff+fcfs")
    assert latencies(f"{STRANGER}+fcfs") != latencies("sticky+fcfs")


@pytest.mark.parametrize("name", [*PLACEMENT_NAMES, STRANGER])
def test_policies_conform(name: str) -> None:
    load(name)
    said = {check_policy.title(c): check_policy.run(c, name) for c in check_policy.CHECKS}
    assert {title: wrong for title, wrong in said.items() if wrong is not None} == {}


class Wrong:
    def __init__(self, options: DispatchOptions) -> None:
        self.calls = 0


class Stranger(Wrong):
    def choose(self, demand: object, engines: list[object], *_: object) -> object:
        return object()


class Spoiler(Wrong):
    def choose(self, demand: object, engines: list[EngineLoad], *_: object) -> object:
        engines[0].slots += 1
        return engines[0]


class Raises(Wrong):
    def choose(self, demand: Demand, engines: list[EngineLoad], *_: object) -> object:
        return engines[int(demand.deadline_s) % len(engines)]


@pytest.mark.parametrize(
    ("made", "check"),
    [
        (Stranger, check_policy.one_engine),
        (Spoiler, check_policy.changes_nothing),
        (Raises, check_policy.bare_calls),
    ],
)
def test_what_a_policy_does_wrong_is_found(made: type[Wrong], check: Callable[[str], None]) -> None:
    register(f"{made.__name__}.py:{made.__name__}", made)
    assert check_policy.run(check, f"{made.__name__}.py:{made.__name__}")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (None, "missing.py:A"),
        ("class B: pass", "file.py:A"),
        ("class A: pass", "file.py:A"),
        ("raise ValueError('no')", "file.py:A"),
        ("def broken(:", "file.py:A"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_sentence(
    tmp_path: Path, text: str | None, name: str
) -> None:
    if text is not None:
        (tmp_path / "file.py").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["", ":Third"])
@pytest.mark.parametrize("use", [load, named])
def test_what_a_file_has_is_said_where_no_class_of_it_is_named(
    tmp_path: Path, use: Callable[[str], object], suffix: str
) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        "from hexgen_vllm.policy.dispatch import Dispatch\n"
        "class First:\n    def choose(self, *given): ...\n"
        "class Second(First): ...\nclass Other: ...\n"
    )
    with pytest.raises(ConfigError, match=r"it has First, Second\.$"):
        use(f"{path}{suffix}")


def test_a_policy_that_was_not_loaded_says_so() -> None:
    with pytest.raises(HexgenError, match="not loaded"):
        placement(DispatchOptions(policy="never.py:Loaded"))
