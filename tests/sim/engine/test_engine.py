"""A simulated engine: stretches change nothing, blocks are accounted for, time is as it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.engine.decode_clock import MARK_TOKENS, DecodeClock
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.prefix_cache import Link
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.types import Placement, StepCost
from tests.parity.scenarios import draw
from tests.parity.simulated import simulated

COST = StepCost(c0=0.02, c1=1e-3, c2=1e-6, p0=0.002, p1=1e-4, p2=0.0)
MODEL = EngineModel("e", COST, max_num_seqs=4, max_num_batched_tokens=256, kv_tokens=16_000)
FCFS = EngineOptions(order="fcfs")


def call(name: str, prompt: int, output: int, deadline_s: float = math.inf) -> Sequence:
    placement = Placement(name, "e", "test", deadline_s=deadline_s, expected_output_tokens=output)
    return Sequence(placement, prompt, output)


def drained(engine: SimEngine) -> dict[str, float]:
    ends: dict[str, float] = {}
    while engine.steps:
        now = engine.end_s
        ends.update({s.call_id: now for s in engine.step_ended(now)[1]})
    return ends


@pytest.mark.parametrize("order", ["fcfs", "edf", "paper", "slack"])
@pytest.mark.parametrize("stock", [False, True])
def test_stretches_change_nothing(order: str, stock: bool) -> None:
    options = EngineOptions(order=order)
    for seed in range(25):
        scenario = draw(seed, calls=30)
        # Rates measured over a stretch at once differ in the last digits, so they are assumed.
        quick = simulated(scenario, options, stock=stock, measured=False)
        slow = simulated(scenario, options, stock=stock, single=True, measured=False)
        assert quick.decisions() == slow.decisions(), seed
        assert quick.ends_s == pytest.approx(slow.ends_s)


@pytest.mark.parametrize("order", ["fcfs", "slack"])
def test_every_call_ends_and_every_block_is_free_again(order: str) -> None:
    for seed in range(25):
        scenario = draw(seed, calls=30, tight=True)
        engine = SimEngine(scenario.model, EngineOptions(order=order), stock=order == "fcfs")
        for arrival in scenario.arrivals:
            engine.submit(call(arrival.call_id, arrival.prompt_tokens, arrival.output_tokens), 0.0)
        assert len(drained(engine)) == 30
        assert engine.batch.pool.free == engine.model.blocks
        assert engine.batch.queued == 0
        assert not engine.batch.running


def test_a_call_alone_takes_what_its_steps_cost() -> None:
    engine = SimEngine(MODEL, FCFS, stock=True)
    engine.submit(call("a", 600, 10), 5.0)
    chunks = 3 * (0.02 + 0.002) + 600e-4
    decodes = 9 * (0.02 + 1e-3) + 1e-6 * sum(range(600, 609))
    assert drained(engine) == {"a": pytest.approx(5.0 + chunks + decodes)}


def test_first_tokens_are_told_when_the_prompt_is_done() -> None:
    engine = SimEngine(MODEL, FCFS, stock=True)
    sequence = call("a", 600, 10)
    engine.submit(sequence, 0.0)
    told = [engine.step_ended(engine.end_s)[0] for _ in range(3)]
    assert told == [[], [], [sequence]]
    assert sequence.first_token_s == engine.start_s


def test_an_arrival_joins_at_the_next_step() -> None:
    engine = SimEngine(MODEL, FCFS, stock=True)
    engine.submit(call("a", 16, 1000), 0.0)
    engine.step_ended(engine.end_s)
    assert engine.steps > 900
    engine.submit(call("b", 16, 5), engine.start_s + 0.05)  # in the third step
    assert engine.steps == 3
    engine.step_ended(engine.end_s)
    assert [s.call_id for s in engine.batch.chunks] == ["b"]


def test_with_asynchronous_scheduling_it_joins_one_step_later() -> None:
    engine = SimEngine(replace(MODEL, async_scheduling=True), FCFS, stock=True)
    engine.submit(call("a", 16, 1000), 0.0)
    engine.step_ended(engine.end_s)
    engine.submit(call("b", 16, 5), engine.start_s + 0.05)  # in the third step
    assert engine.steps == 4
    engine.step_ended(engine.end_s)
    assert [s.call_id for s in engine.batch.chunks] == ["b"]


def test_an_arrival_in_the_last_step_known_waits_for_the_one_after_the_next() -> None:
    engine = SimEngine(replace(MODEL, async_scheduling=True), FCFS, stock=True)
    engine.submit(call("a", 600, 10), 0.0)
    engine.submit(call("b", 16, 5), 0.01)
    chunks = []
    for _ in range(4):
        chunks.append([s.call_id for s in engine.batch.chunks])
        engine.step_ended(engine.end_s)
    assert chunks == [["a"], ["a"], ["a", "b"], []]


def test_a_demoted_call_is_ordered_among_the_others_in_the_end() -> None:
    options = EngineOptions(background_max_wait_s=30.0, displace=False)
    engine = SimEngine(replace(MODEL, max_num_seqs=1), options)
    placement = Placement("low", "e", "test", deadline_s=5.0, background=True)
    engine.submit(call("first", 100, 100, deadline_s=50.0), 0.0)
    engine.submit(Sequence(placement, 100, 10), 0.0)
    for index in range(40):
        engine.submit(call(f"urgent{index}", 100, 100, deadline_s=100.0), 0.1)
    ends = drained(engine)
    after = [name for name, end_s in ends.items() if end_s > ends["low"]]
    assert 30.0 < ends["low"] < 36.0
    assert len(after) > 10


def test_an_arrival_without_a_slot_cuts_nothing() -> None:
    engine = SimEngine(replace(MODEL, max_num_seqs=1), FCFS, stock=True)
    engine.submit(call("a", 16, 1000), 0.0)
    engine.step_ended(engine.end_s)
    before = engine.end_s
    engine.submit(call("b", 16, 5), engine.start_s + 0.05)
    assert engine.end_s == before


def test_kv_from_the_host_costs_the_copy_instead_of_prefill() -> None:
    ends = {}
    for rate in (None, 1e6):
        model = replace(MODEL, kv_tokens=800, prefix_caching=False, kv_copy_tokens_per_s=rate)
        engine = SimEngine(model, FCFS, stock=True)
        for name in "ab":  # together they outgrow the cache, so that b is preempted
            engine.submit(call(name, 300, 150), 0.0)
        ends[rate] = drained(engine)
        assert engine.batch.preemptions == 1
    assert ends[1e6]["b"] < ends[None]["b"] - 300e-4 / 2
    assert ends[1e6]["a"] == pytest.approx(ends[None]["a"], abs=1e-3)


def test_kv_is_copied_only_where_that_is_faster() -> None:
    model = replace(MODEL, kv_tokens=800, prefix_caching=False)
    ends = {}
    for rate, keep in ((None, "auto"), (100.0, "auto"), (100.0, "always")):
        engine = SimEngine(
            replace(model, kv_copy_tokens_per_s=rate), EngineOptions(order="fcfs", keep_kv=keep)
        )
        for name in "ab":
            engine.submit(call(name, 300, 150), 0.0)
        ends[rate, keep] = drained(engine)
    assert ends[100.0, "auto"] == ends[None, "auto"]
    assert ends[100.0, "always"]["b"] > ends[None, "auto"]["b"] + 3.0


def test_a_call_larger_than_the_cache_does_not_fit() -> None:
    engine = SimEngine(MODEL, FCFS)
    assert engine.fits(call("a", 15_990, 10))
    assert not engine.fits(call("a", 15_990, 11))


def test_an_urgent_call_displaces_a_lazy_one() -> None:
    engine = SimEngine(replace(MODEL, max_num_seqs=1), EngineOptions())
    engine.submit(call("lazy", 100, 500, deadline_s=1e4), 0.0)
    engine.step_ended(engine.end_s)
    engine.submit(call("urgent", 100, 10, deadline_s=2.0), 0.5)
    ends = drained(engine)
    assert ends["urgent"] < 2.0 < ends["lazy"]
    assert engine.batch.preemptions == 1


def test_telemetry_says_what_an_engine_of_that_kind_would() -> None:
    ours, stock = SimEngine(MODEL, EngineOptions()), SimEngine(MODEL, FCFS, stock=True)
    for engine in (ours, stock):
        for name in "abcdef":
            engine.submit(call(name, 160, 10), 0.0)
        report = engine.report()
        assert (report.running, report.waiting) == (1, 5) or report.running == 2
        assert report.kv_usage is not None
        assert report.kv_usage > 0
    assert ours.report().cost == COST
    assert stock.report().cost is None


def test_progress_is_told_every_64_tokens() -> None:
    engine = SimEngine(MODEL, FCFS, stock=True)
    sequence = call("a", 16, 300)
    engine.submit(sequence, 0.0)
    engine.step_ended(engine.end_s)
    told = []
    for tenth in range(10):
        told += engine.progressed(engine.start_s + (engine.end_s - engine.start_s) * tenth / 10)
    assert [s for s, _ in told] == [sequence] * (300 // MARK_TOKENS)
    written = [tokens for _, tokens in told]
    assert all(b - a >= MARK_TOKENS / 2 for a, b in pairwise(written))


def test_the_decode_clock_counts_blocks_as_single_steps_do() -> None:
    clock = DecodeClock(16)
    sequences = [call(str(n), 10 + 7 * n, 200) for n in range(5)]
    for number, sequence in enumerate(sequences):
        sequence.number = number
        sequence.tokens = sequence.computed = sequence.prompt_tokens
        clock.join(sequence)
    for step in range(1, 40):
        needed = sum((clock.tokens(s) + step - 2) % 16 == 0 for s in sequences)
        assert clock.blocks(step - 1, 1) == needed
    assert clock.blocks(0, 39) == sum(clock.blocks(step, 1) for step in range(39))
    assert clock.steps_within(clock.blocks(0, 20), 0, 100) >= 20
    assert clock.steps_within(clock.blocks(0, 20) - 1, 0, 100) < 20


@pytest.mark.parametrize(
    "wrong", [{"max_num_seqs": 0}, {"kv_tokens": 0}, {"watermark": 1.0}, {"block_size": 0}]
)
def test_impossible_engines_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(MODEL, **wrong)


def second_turns_s(host_tokens: int, options: EngineOptions) -> float:
    """Seconds that the second calls of ten workflows take; the device holds one of them."""
    model = replace(
        MODEL, kv_tokens=800, max_num_seqs=1, kv_copy_tokens_per_s=1e6, host_kv_tokens=host_tokens
    )
    engine, begin_s = SimEngine(model, options), 0.0
    for turn in (1, 2):
        began_s = begin_s
        for workflow in range(10):
            links = [Link(10 * workflow + i, 20 * (i - 1), 20 * i) for i in range(1, turn + 1)]
            placement = Placement(
                f"{workflow}.{turn}", "e", "test", tail_s=2.0 - turn, expected_output_tokens=21
            )
            sequence = Sequence(placement, 300 * turn, 21, chain=tuple(links))
            engine.submit(sequence, begin_s)
        begin_s = max(drained(engine).values())
        assert engine.batch.pool.free == model.blocks
    return begin_s - began_s


def test_a_workflow_goes_on_from_what_it_left_on_the_host() -> None:
    without = second_turns_s(0, FCFS)
    found = {tokens: second_turns_s(tokens, FCFS) for tokens in (800, 8000)}
    assert found[8000] < without - 10 * 250e-4
    assert found[8000] < found[800] < without + 0.05
    assert second_turns_s(8000, replace(FCFS, keep_ended_kv=False)) == without
    assert second_turns_s(8000, replace(FCFS, keep_kv="never")) == pytest.approx(without)


@pytest.mark.parametrize("options", [FCFS, replace(FCFS, evict_finished_first=False)])
@pytest.mark.parametrize("final", [False, True])
def test_kv_of_a_finished_workflow_is_evicted_before_that_of_an_open_one(
    options: EngineOptions, final: bool
) -> None:
    engine, now = SimEngine(replace(MODEL, kv_tokens=800), options), 0.0
    calls: list[Sequence] = []
    for name, key, last in (
        ("open", 1, False),
        ("ends", 2, final),
        ("x", 3, False),
        ("open", 1, False),
    ):
        placement = Placement(f"{len(calls)}", "e", "test", expected_output_tokens=5)
        call = Sequence(placement, 290, 5, chain=(Link(key, 0, 18),))
        call.workflow_id, call.final = name, last
        engine.submit(call, now)
        now = max(drained(engine).values())
        calls.append(call)
    spared = final and options.evict_finished_first
    assert (calls[-1].cached_tokens == 18 * MODEL.block_size) == spared
