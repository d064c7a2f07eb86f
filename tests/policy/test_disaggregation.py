"""Prompts go to prefill engines where that is cheaper, by measured rates and transfers."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.config import PLACEMENT_NAMES, DispatchOptions
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.disaggregation import handover
from hexgen_vllm.policy.engine_load import EngineLoad, TransferRate
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Role,
    StepCost,
)

# Strong at prompts, and at answers; the last one is neither.
PROMPTS = StepCost(0.05, 0.002, 0.0, 0.0, 1 / 10_000, 0.0)
ANSWERS = StepCost(0.01, 0.0002, 0.0, 0.0, 1 / 1_000, 0.0)
PLAIN = StepCost(0.04, 0.001, 0.0, 0.0, 1 / 2_000, 0.0)
OK = CallResult(ok=True, output_tokens=20)


def fleet(policy: str = "slack", *, both: bool = False, **options: object) -> Coordinator:
    """Return a coordinator of prefill engines (p1 half as fast) and decode engines, two each."""
    c = Coordinator(DispatchOptions(policy=policy, **options))  # type: ignore[arg-type]
    engines = [
        ("p0", Role.PREFILL, PROMPTS),
        ("p1", Role.PREFILL, PROMPTS.scaled(2.0)),
        ("d0", Role.DECODE, ANSWERS),
        ("d1", Role.DECODE, ANSWERS),
        *([("both", Role.BOTH, PLAIN)] if both else []),
    ]
    for name, role, cost in engines:
        spec = EngineSpec(name, max_num_seqs=8, kv_tokens=200_000, role=role)
        c.engine_joined(spec, 0.0)
        c.engine_reported(name, EngineReport(cost=cost))
    return c


def call(name: str, prompt: int = 8_000, now: float = 0.0, **more: object) -> Call:
    values: dict[str, object] = {"deadline_s": now + 60, "expected_output_tokens": 20, **more}
    return Call(name, f"wf-{name}", now, prompt, **values)  # type: ignore[arg-type]


def placed(c: Coordinator, one: Call) -> Placement:
    (decision,) = c.call_arrived(one, one.arrived_s)
    assert isinstance(decision, Placement)
    return decision


def settled(c: Coordinator) -> bool:
    return not any(e.in_flight or e.outstanding_tokens() for e in c.engines.values())


@pytest.mark.parametrize("policy", PLACEMENT_NAMES)
def test_every_policy_has_prompts_computed_by_the_cheapest_prefill_engine(policy: str) -> None:
    c = fleet(policy)
    found = placed(c, call("a"))
    assert found.engine_id in ("d0", "d1")
    assert found.prefill is not None
    assert found.prefill.engine_id == "p0"
    assert found.uncached_tokens == 1
    assert found.prefill.uncached_tokens == 8_000
    # Both halves are booked, and each is given back when it ends.
    assert c.engines["p0"].queued_prefill_tokens() == 8_000
    assert c.engines[found.engine_id].queued_prefill_tokens() == 1
    c.call_prefilled("a", CallResult(True, 8_000, 0, 1), 1.0)
    assert not c.engines["p0"].in_flight
    assert c.engines[found.engine_id].calls == 1
    c.call_started("a", 1.5)
    c.call_finished("a", OK, 2.0)
    assert settled(c)


def test_the_halves_are_due_one_after_the_other() -> None:
    found = placed(fleet(), call("a"))
    half = found.prefill
    assert half is not None
    assert half.deadline_s == found.deadline_s == 60.0
    assert half.due_s <= found.due_s - found.decode_s
    assert half.ordered_by_s - half.tail_s == pytest.approx(half.due_s)
    assert half.expected_output_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "rate", "apart"),
    [
        (8_000, 50_000.0, True),  # 0.8 s there and 0.16 s on the way, against 8 s
        (8_000, 1_000.0, False),  # as long on the way as here
        (30, 50_000.0, False),  # shorter than a step of the prefill engine
    ],
)
def test_a_decode_engine_computes_what_it_has_sooner(prompt: int, rate: float, apart: bool) -> None:
    found = placed(fleet(kv_transfer_rate=rate), call("a", prompt))
    assert found.engine_id.startswith("d")
    assert (found.prefill is not None) is apart
    assert found.uncached_tokens == (1 if apart else prompt)


def test_what_a_decode_engine_has_cached_is_not_moved() -> None:
    c = fleet()
    head = tuple(range(31))
    first = placed(c, call("a", prefix=head, prefix_chunk_tokens=256))
    c.call_prefilled("a", CallResult(True, 8_000, 0, 1), 1.0)
    c.call_finished("a", OK, 2.0)
    again = placed(c, call("b", 31 * 256 + 40, now=3.0, prefix=head, prefix_chunk_tokens=256))
    assert again.engine_id == first.engine_id
    assert again.prefill is None
    assert again.uncached_tokens == 40


@pytest.mark.parametrize(("affinity", "uncached"), [(True, 40), (False, 31 * 256 + 40)])
def test_what_a_prefill_engine_has_cached_counts_where_it_is_to_count(
    affinity: bool, uncached: int
) -> None:
    c = fleet(prefix_affinity=affinity)
    for name in ("d0", "d1"):  # slow, so that they never compute a prompt
        c.engine_reported(name, EngineReport(cost=ANSWERS.scaled(1e3)))
    head: dict[str, object] = {"prefix": tuple(range(31)), "prefix_chunk_tokens": 256}
    assert placed(c, call("a", **head)).prefill is not None
    c.call_prefilled("a", CallResult(True, 8_000, 0, 1), 1.0)
    c.call_finished("a", OK, 2.0)
    half = placed(c, call("b", 31 * 256 + 40, now=3.0, **head)).prefill
    assert half is not None
    assert (half.engine_id, half.uncached_tokens) == ("p0", uncached)


def test_a_handover_is_priced_term_by_term() -> None:
    def engine(name: str, calls: int) -> EngineLoad:
        made = EngineLoad(EngineSpec(name, max_num_seqs=8, kv_tokens=200_000, role=Role.PREFILL))
        made.reported(EngineReport(cost=PROMPTS, fit_error=0.0))
        for i in range(calls):
            other = call(f"other-{i}", 100)
            entry = InFlight(other, Placement(f"other-{i}", name, ""), 0.0)
            made.placed(entry)
            made.started(entry)
        return made

    demand = Demand(call("a"), 20, 60.0, 0.0, 60.0, 0.0)
    options = DispatchOptions(externality=0.5, kv_transfer_rate=4_000.0)
    found = handover(demand, [engine("busy", 3)], options)
    assert found is not None
    assert found.uncached_tokens == 8_000
    assert found.ready_s == pytest.approx(PROMPTS.prefill_s(8_000) + 0.05 + 0.002)
    assert found.token_delay_s == pytest.approx(0.5 * 3 * 1e-4)
    assert (found.externality, found.token_s) == (0.5, 1 / 4_000)
    assert found.price_s == pytest.approx(found.ready_s + 8_000 * found.token_delay_s)
    one_of_two = handover(demand, [engine("first", 1), engine("second", 1)], options)
    assert one_of_two is not None
    assert one_of_two.engine_id == "first"
    assert handover(demand, [], options) is None


def test_load_on_prefill_engines_spreads_prompts_and_sends_whole_calls_elsewhere() -> None:
    c = fleet(both=True)
    found = [placed(c, call(f"c{i}", 20_000)) for i in range(16)]
    halves = {p.prefill.engine_id for p in found if p.prefill is not None}
    assert halves == {"p0", "p1"}
    whole = [p for p in found if p.prefill is None]
    assert whole
    assert {p.engine_id for p in whole} <= {"both", "d0", "d1"}
    assert not {p.engine_id for p in found} & {"p0", "p1"}


def test_calls_that_cannot_be_parted_stay_whole() -> None:
    for more in ({"whole": True}, {"engine": "d1"}):
        assert placed(fleet(), call("a", **more)).prefill is None


def test_without_prefill_engines_decode_engines_do_all_and_prefill_engines_alone_nothing() -> None:
    c = fleet()
    for name in ("p0", "p1"):
        c.engine_changed(name, EngineState.DOWN, 0.0)
    assert placed(c, call("a")).prefill is None
    c = Coordinator(DispatchOptions())
    c.engine_joined(EngineSpec("p", role=Role.PREFILL), 0.0)
    (refused,) = c.call_arrived(call("a"), 0.0)
    assert not isinstance(refused, Placement)


def test_a_prefill_engine_that_fails_is_not_asked_again_for_that_call() -> None:
    c = fleet()
    assert placed(c, call("a")).prefill is not None
    (second,) = c.call_bounced("a", 1.0)
    assert isinstance(second, Placement)
    assert second.prefill is not None
    assert second.prefill.engine_id == "p1"
    (third,) = c.call_bounced("a", 2.0)
    assert isinstance(third, Placement)
    assert third.prefill is None
    assert third.engine_id in ("d0", "d1")
    assert third.uncached_tokens == 8_000
    # Now it is the engine that answers that fails.
    (fourth,) = c.call_bounced("a", 3.0)
    assert isinstance(fourth, Placement)
    assert fourth.engine_id in {"d0", "d1"} - {third.engine_id}
    c.call_finished("a", OK, 4.0)
    assert settled(c)


def test_a_decode_engine_that_fails_later_is_the_one_to_avoid() -> None:
    c = fleet()
    first = placed(c, call("a"))
    c.call_prefilled("a", CallResult(True, 8_000, 0, 1), 1.0)
    (second,) = c.call_bounced("a", 2.0)
    assert isinstance(second, Placement)
    assert second.engine_id in {"d0", "d1"} - {first.engine_id}
    assert second.prefill is not None  # its KV may be gone, so it is computed again
    assert second.prefill.engine_id == "p0"


def test_an_engine_that_has_to_compute_the_prompt_itself_has_it_on_its_books() -> None:
    c = fleet()
    found = placed(c, call("a"))
    c.call_prefilled("a", CallResult(ok=False), 1.0)
    assert c.engines[found.engine_id].queued_prefill_tokens() == 8_000
    assert not c.engines["p0"].in_flight
    c.call_prefilled("a", CallResult(ok=False), 1.0)  # said twice
    c.call_started("a", 5.0)
    c.call_finished("a", OK, 6.0)
    assert settled(c)


def test_the_time_of_transfers_is_learned_from_first_tokens() -> None:
    c = fleet()
    for i in range(20):
        now = 100.0 * i
        one = call(f"c{i}", now=now)
        found = placed(c, one)
        if found.prefill is None:
            break
        c.call_prefilled(one.call_id, CallResult(True, 8_000, 0, 1), now + 1)
        c.call_started(one.call_id, now + 1 + 16.0)  # 2 ms a token: twice what computing takes
        c.call_finished(one.call_id, OK, now + 20)
    assert found.prefill is None  # by then it pays no more
    rates = [c.engines[d].transfer.token_s(0.0) for d in ("d0", "d1")]
    assert max(rates) == pytest.approx(16.0 / 8_000, rel=0.01)


def test_a_rate_of_transfer_is_a_median_of_long_ones() -> None:
    rate = TransferRate()
    for seconds in (0.1, 0.2, -1.0, 99.0, 0.2):
        rate.learn(1_000, seconds)
        rate.learn(10, 5.0)
    assert rate.token_s(1.0) == pytest.approx(0.2 / 1_000)


def test_what_every_transfer_takes_is_not_taken_for_the_rate() -> None:
    rate = TransferRate()
    for tokens in (300, 4_000, 280, 320, 5_000, 310, 6_000, 290, 7_000):
        rate.learn(tokens, 0.05 + tokens / 40_000)
    assert rate.token_s(1.0) == pytest.approx(1 / 40_000, rel=0.5)
    rate.learn(9_000, 30.0)
    assert rate.token_s(1.0) == pytest.approx(1 / 40_000, rel=0.5), "one that waited tells little"


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_left_behind_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    c = fleet(both=True, hold_depth=rng.choice((-1, 0, 2)))
    open_: dict[str, Placement | None] = {}

    def take(decisions: object) -> None:
        for d in decisions:  # type: ignore[attr-defined]
            if isinstance(d, Placement):
                open_[d.call_id] = d
            else:
                open_.pop(d.call_id, None)

    now = 0.0
    for i in range(1500):
        now += rng.expovariate(4.0)
        on = [name for name, p in open_.items() if p is not None]
        name = rng.choice(on) if on else ""
        match rng.randrange(8):
            case 0 | 1 | 2:
                open_[f"c{i}"] = None
                take(c.call_arrived(call(f"c{i}", rng.choice((20, 500, 9_000)), now), now))
            case 3 if name:
                take(c.call_prefilled(name, CallResult(rng.random() < 0.8, None, None, 1), now))
            case 4 if name:
                take(c.call_bounced(name, now))
            case 5 | 6 if name:
                c.call_started(name, now)
                del open_[name]
                take(c.call_finished(name, CallResult(rng.random() < 0.9, None, None, 9), now))
            case 7:
                engine = rng.choice(sorted(c.engines))
                state = rng.choice((EngineState.READY, EngineState.TRIAL, EngineState.DRAINING))
                take(c.engine_changed(engine, state, now))
    for engine in c.engines:
        take(c.engine_changed(engine, EngineState.READY, now))
    while open_:
        for name in [n for n, p in open_.items() if p is not None]:
            del open_[name]
            take(c.call_finished(name, OK, now))
        take(c.tick(now))
    assert settled(c)
    assert not c.held
