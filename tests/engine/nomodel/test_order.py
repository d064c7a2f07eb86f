"""Who goes first: the waiting queue, background calls, and the order inside the batch."""

from __future__ import annotations

import random

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from hexgen_vllm.policy.urgency import BACKGROUND_S, latest_start, paper_key
from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, expected

SEEDS = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}


def due(seconds: float, tail_s: float = 0.0, **more: object) -> CallMeta:
    return CallMeta(workflow_deadline_ms=1000 * seconds, tail_ms=1000 * tail_s, **more)  # type: ignore[arg-type]


def add_four(engine: FakeEngine) -> None:
    """The batch is full; four calls wait that every order sorts differently."""
    engine.add("first", [5] * 20, 90, due(1000))
    engine.step()
    engine.add("soon-due", [1] * 20, 10, due(30.0, expected_output_tokens=10))
    engine.clock.now += 1.0
    engine.add("long-tail", [2] * 20, 10, due(40.0, 35.0, expected_output_tokens=10))
    engine.clock.now += 1.0
    engine.add("long-output", [3] * 20, 390, due(60.0, 5.0, expected_output_tokens=390))
    engine.clock.now += 1.0
    engine.add("short", [4] * 20, 10, due(50.0, 0.0, expected_output_tokens=10))


@pytest.mark.parametrize(
    ("order", "waiting"),
    [
        ("due", ["long-tail", "soon-due", "short", "long-output"]),
        ("slack", ["long-tail", "long-output", "soon-due", "short"]),
        ("edf", ["soon-due", "long-tail", "short", "long-output"]),
        ("fcfs", ["soon-due", "long-tail", "long-output", "short"]),
        ("paper", ["long-tail", "long-output", "soon-due", "short"]),
    ],
)
def test_the_queue_follows_the_order(build: Build, order: str, waiting: list[str]) -> None:
    engine = build(max_num_seqs=1, hexgen={"order": order, "displace": False, **SEEDS})
    add_four(engine)
    assert engine.waiting() == waiting
    engine.run()
    assert engine.ended == ["first", *waiting]
    engine.assert_clean()


def test_the_keys_are_those_of_the_policy(build: Build) -> None:
    engine = build(max_num_seqs=1, hexgen={"order": "slack", "displace": False, **SEEDS})
    add_four(engine)
    start_s = engine.clock.now - 1.0  # when long-output arrived
    service_s = 20 / 100 + 390 / 10
    call = next(r for r in engine.scheduler.waiting if r.request_id == "long-output").hexgen
    assert call.key_s == pytest.approx(latest_start(start_s + 60, 5.0, service_s))
    paper = build(max_num_seqs=1, hexgen={"order": "paper", "displace": False, **SEEDS})
    add_four(paper)
    call = next(r for r in paper.scheduler.waiting if r.request_id == "long-output").hexgen
    assert call.key_s == pytest.approx(paper_key(start_s, start_s + 60, 5.0, service_s))
    assert call.latest_start_s == pytest.approx(latest_start(start_s + 60, 5.0, service_s))


def test_a_late_urgent_call_overtakes(build: Build) -> None:
    engine = build(max_num_seqs=2, hexgen={"displace": False})
    for i in range(6):
        engine.add(f"slow{i}", [10 + i] * 40, 30, due(500))
    engine.steps(3)
    engine.add("urgent", [99] * 40, 4, due(1))
    engine.run()
    assert engine.ended.index("urgent") == 2, "only the two that ran before it end before it"
    engine.assert_clean()


def test_without_metadata_the_order_is_first_come(build: Build) -> None:
    engine = build(max_num_seqs=1, hexgen={})
    for i in range(5):
        engine.add(f"r{i}", [10 + i] * 8, 3)
        engine.clock.now += 0.1
    engine.run()
    assert engine.ended == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize("order", ["due", "slack", "edf", "paper", "fcfs"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_priority_comes_before_every_deadline(build: Build, order: str, policy: str) -> None:
    """Lower first, as in vLLM, and whatever word its own policy got."""
    engine = build(max_num_seqs=1, policy=policy, hexgen={"order": order, "displace": False})
    engine.add("first", [5] * 8, 9, due(9))
    engine.step()
    engine.add("soon", [6] * 8, 3, due(0.5))
    engine.add("later", [7] * 8, 3, due(0.1), priority=3)
    engine.add("sooner", [8] * 8, 3, priority=-10)
    engine.add("latest", [9] * 8, 3, due(0.1), priority=2**40)
    engine.add("soonest", [10] * 8, 3, due(900), priority=-(2**62))
    engine.run()
    assert engine.ended == ["first", "soonest", "sooner", "soon", "later", "latest"]


@pytest.mark.parametrize("seed", range(5))
def test_priority_alone_gives_the_order_of_stock_vllm(build: Build, seed: int) -> None:
    """Whoever comes from ``--scheduling-policy priority`` sees the same order and victims."""
    rng = random.Random(seed)
    calls = [(f"r{i}", [rng.randrange(2, 900)] * rng.randint(4, 90), rng.randint(3, 60),
              rng.choice([-7, 0, 0, 3, 2**33])) for i in range(60)]  # fmt: skip

    def play(engine: FakeEngine) -> FakeEngine:
        for i, (name, prompt, output, priority) in enumerate(calls):
            engine.add(name, prompt, output, priority=priority, arrival_time=float(i))
            step_and_note(engine, 2)
        while engine.busy():
            step_and_note(engine, 1)
        engine.assert_clean()
        return engine

    def step_and_note(engine: FakeEngine, count: int) -> None:
        for _ in range(count):
            had = len(engine.ended)
            engine.step()
            engine.ended[had:] = sorted(engine.ended[had:])  # of one step there is no order

    tight = {"blocks": 24, "max_num_seqs": 4, "policy": "priority", "prefix_caching": False}
    stock = play(build(AsyncScheduler, **tight))
    ours = play(build(**tight, hexgen={"displace": False}))
    assert ours.ended == stock.ended
    assert ours.tokens == stock.tokens


def test_a_full_cache_takes_from_the_least_important(build: Build) -> None:
    engine = build(blocks=9, max_num_seqs=4, policy="priority", prefix_caching=False)
    engine.add("minor", [1] * 40, 60, due(0.1), priority=1)
    engine.step()
    engine.add("major", [2] * 40, 60, due(900))
    engine.run()
    assert engine.ended == ["major", "minor"]
    assert engine.scheduler.hexgen_counters.preemptions["kv"] == 1
    engine.assert_clean()


def test_background_is_last_and_its_shortest_work_first(build: Build) -> None:
    engine = build(max_num_seqs=1)
    back = {"background": True, "expected_output_tokens": 20}
    engine.add("back-long", [1] * 20, 20, due(0.1, 9.0, **back))
    engine.add("back-short", [2] * 20, 20, due(0.1, 1.0, **back))
    engine.add("late", [3] * 20, 20, due(9000))
    engine.run()
    assert engine.ended == ["late", "back-short", "back-long"]


def test_background_gives_way_and_is_not_given_way_to(build: Build) -> None:
    engine = build(max_num_seqs=1)
    engine.add("back", [1] * 20, 50, due(0.1, background=True))
    engine.steps(3)
    engine.add("urgent", [2] * 20, 5, due(0.1))
    engine.step()
    assert engine.running() == ["urgent"]
    engine.add("back-too", [3] * 20, 5, due(0.1, background=True))
    engine.run()
    assert engine.ended == ["urgent", "back-too", "back"]
    assert engine.displaced() == 1


@pytest.mark.parametrize("order", ["due", "slack", "edf", "paper", "fcfs"])
def test_background_ages_behind_an_endless_stream(build: Build, order: str) -> None:
    bound_s = 3.0
    engine = build(max_num_seqs=1, hexgen={"order": order, "background_max_wait_s": bound_s})
    began = engine.clock.now
    back = engine.add("back", [1] * 20, 5, due(0.1, background=True))
    count = 0
    while "back" not in engine.ended:
        for _ in range(len(engine.waiting()), 5):  # five calls wait at any time
            engine.add(f"r{count}", [count % 900] * 20, 5, due(2.0))
            count += 1
        engine.step()
        if engine.clock.now < began + bound_s - 0.1 and "back" in engine.waiting():
            assert back.hexgen.key_s >= BACKGROUND_S
        assert engine.clock.now < began + bound_s + 3.0, "background starves"
    assert engine.clock.now >= began + bound_s, "background is not behind"


@pytest.mark.parametrize(
    ("blocks", "order"),
    [(8, ["r1", "r3", "r2", "r0"]), (200, ["r1", "r2", "r0", "r3"])],
    ids=["blocks may run out: by urgency", "plenty: as admitted"],
)
def test_the_batch_is_ordered_when_it_matters(build: Build, blocks: int, order: list[str]) -> None:
    engine = build(blocks=blocks, max_num_seqs=4)
    for i, seconds in enumerate((30, 10, 20)):
        engine.add(f"r{i}", [10 + i] * 8, 30, due(seconds))
    engine.steps(2)
    engine.add("r3", [1] * 8, 30, due(15))
    engine.steps(2)
    assert engine.running() == order


def test_prefill_chunks_get_tokens_in_the_order_of_urgency(build: Build) -> None:
    engine = build(max_num_seqs=4, max_batched_tokens=48)
    engine.scheduler.scheduler_config.long_prefill_token_threshold = 32
    engine.add("far", [1] * 500, 5, due(500))
    engine.step()
    engine.add("near", [2] * 500, 5, due(400))
    engine.step()
    assert engine.running() == ["far", "near"], "one of them gets 32 tokens a step, the other 16"
    engine.run()
    assert engine.ended == ["near", "far"]


def test_the_least_urgent_gives_way_when_kv_is_full(build: Build) -> None:
    engine = build(blocks=9, max_num_seqs=2, hexgen={"displace": False})
    engine.add("lazy", [1] * 40, 50, due(900))  # admitted first: stock vLLM would keep it
    engine.step()
    engine.add("keen", [2] * 40, 50, due(9))
    engine.run()
    assert engine.scheduler.hexgen_counters.preemptions == {"displaced": 0, "kv": 1, "reset": 0}
    assert engine.ended == ["keen", "lazy"]
    assert engine.tokens["lazy"] == expected([1] * 40, 50)
    engine.assert_clean()


def test_an_urgent_long_prompt_does_not_stall_decodes(build: Build) -> None:
    engine = build(max_num_seqs=4, max_batched_tokens=64)
    for i in range(3):
        engine.add(f"r{i}", [10 + i] * 8, 50, due(500))
    engine.steps(3)
    before = [len(engine.tokens[f"r{i}"]) for i in range(3)]
    engine.add("urgent", [5] * 600, 5, due(0.5))
    engine.steps(8)
    assert "urgent" in engine.running()
    assert [len(engine.tokens[f"r{i}"]) for i in range(3)] == [n + 8 for n in before]


def test_waiting_calls_are_rekeyed_when_the_measured_rates_differ(build: Build) -> None:
    options = {"order": "slack", "decode_tokens_per_s": 1.0, "displace": False}
    engine = build(max_num_seqs=2, hexgen=options)
    busy = iter(range(1000))
    waiting = [
        engine.add(f"w{i}", [5 + i] * 8, 100, due(2000, expected_output_tokens=100))
        for i in range(150)
    ]
    priced = [r.hexgen.key_s for r in waiting]
    for _ in range(60):
        engine.add(f"b{next(busy)}", [next(busy)] * 30, 8, due(3))
        engine.steps(4)
    waits = [i for i, r in enumerate(waiting) if r in engine.scheduler.waiting]
    assert len(waits) > 100
    # 100 tokens were priced at 100 s; measured, they take about 0.6 s.
    assert all(waiting[i].hexgen.key_s > priced[i] + 95 for i in waits)
    assert [r.hexgen.key_s for r in engine.scheduler.waiting] == sorted(
        r.hexgen.key_s for r in engine.scheduler.waiting
    )
