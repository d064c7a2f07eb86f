"""Calls with deadlines beside calls without, on vLLM's scheduler."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState

from hexgen_vllm.engine import compat
from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, expected, prompt


def chat(seconds: float, tokens: int | None = None, **more: Any) -> CallMeta:
    return CallMeta(workflow_deadline_ms=1000 * seconds, expected_output_tokens=tokens, **more)


def warm(engine: FakeEngine) -> None:
    """Let the engine learn what its steps cost: calls of all kinds, in batches of all sizes."""
    rng = random.Random(5)
    for i in range(30):
        engine.add(f"warm{i}", prompt(rng, 10, 200), rng.randint(2, 30))
        engine.steps(rng.randint(1, 5))
    engine.run()
    engine.ended.clear()
    assert engine.scheduler.hexgen_meter.fit.cost() is not None


def test_tails_of_workflows_are_learned_in_the_engine(build: Build) -> None:
    engine = build(max_num_seqs=4)
    for i in range(12):
        said = {"workflow_id": f"w{i}", "workflow_type": "t"}
        engine.add(f"w{i}.a", [5 + i] * 8, 5, chat(60, stage="a", **said))
        engine.run()
        engine.add(f"w{i}.b", [5 + i] * 8, 100, chat(60, stage="b", workflow_final=True, **said))
        engine.run()
    new = {"workflow_type": "t", "stage": "a"}
    path = engine.add("new", [5] * 8, 5, chat(60, workflow_id="n", **new)).hexgen
    alone = engine.add("last", [5] * 8, 5, chat(60, workflow_id="o", stages_left=0, **new)).hexgen
    told = engine.add("told", [5] * 8, 5, chat(60, workflow_id="p", tail_ms=7000.0, **new)).hexgen
    token_s = engine.scheduler.hexgen_book.rates.output_token_s
    assert path.tail_s == pytest.approx(100 * token_s, rel=0.2)
    assert alone.tail_s == 0.0
    assert told.tail_s == 7.0


def test_a_later_call_keeps_the_deadline_of_its_workflow(build: Build) -> None:
    engine = build(max_num_seqs=4)
    first = engine.add("one", [5] * 8, 5, chat(60, workflow_id="w")).hexgen
    engine.run()
    later = engine.add("two", [5] * 8, 5, CallMeta(workflow_id="w")).hexgen
    assert later.deadline_s == first.deadline_s
    assert later.began_s == first.began_s < later.arrived_s
    batch = engine.add("three", [5] * 8, 5, chat(9, service_class="batch")).hexgen
    assert batch.deadline_s == math.inf


@pytest.mark.parametrize("default_s", [None, 30.0])
def test_no_default_replaces_what_an_earlier_call_said(
    build: Build, default_s: float | None
) -> None:
    engine = build(hexgen={"default_deadline_s": default_s})
    first = engine.add("one", [5] * 8, 5, chat(60, workflow_id="w", workflow_type="t")).hexgen
    engine.run()
    said = CallMeta(workflow_id="w", workflow_type="t")
    for name in ("two", "three"):
        later = engine.add(name, [5] * 8, 5, said).hexgen
        assert later.deadline_s == first.deadline_s
        assert later.expected_tokens == 5, "what the first one taught"
        engine.run()


@pytest.mark.parametrize(
    ("said", "priority", "deadline_s"),
    [
        (CallMeta(), 0, 30.0),
        (CallMeta(), -3, 30.0),
        (CallMeta(), 5, math.inf),
        (chat(7), 5, 7.0),
        (CallMeta(service_class="interactive"), 5, 30.0),
        (CallMeta(service_class="batch"), -1, math.inf),
    ],
)
def test_who_has_a_deadline(build: Build, said: CallMeta, priority: int, deadline_s: float) -> None:
    engine = build(hexgen={"default_deadline_s": 30.0})
    call = engine.add("one", [5] * 8, 5, said, priority=priority).hexgen
    assert call.deadline_s - engine.clock.now == pytest.approx(deadline_s)


def test_what_cannot_be_on_time_comes_after_what_can(build: Build) -> None:
    engine = build(max_num_seqs=1)
    warm(engine)
    engine.add("running", [5] * 8, 40, chat(90, 40))
    engine.step()
    engine.add("hopeless-long", [6] * 8, 60, chat(0.15, 60))
    engine.add("hopeless", [7] * 8, 30, chat(0.1, 30))
    engine.add("fine", [8] * 8, 30, chat(50, 30))
    engine.add("batch", [9] * 8, 3)
    engine.step()
    assert engine.waiting() == ["fine", "hopeless", "hopeless-long", "batch"]
    off = build(max_num_seqs=1, hexgen={"demote_late": False, "displace": False})
    warm(off)
    off.add("running", [5] * 8, 40, chat(90, 40))
    off.step()
    off.add("hopeless", [7] * 8, 30, chat(0.1, 30))
    off.add("fine", [8] * 8, 30, chat(50, 30))
    off.step()
    assert off.waiting() == ["hopeless", "fine"]


def test_a_call_in_the_second_queue_can_become_late(build: Build) -> None:
    engine = build(max_num_seqs=1)
    warm(engine)
    engine.add("running", [5] * 8, 40, chat(90, 40))
    engine.step()
    request = engine.add("hopeless", [7] * 8, 30, chat(0.1, 30))
    engine.scheduler.waiting.remove_request(request)
    getattr(engine.scheduler, compat.SECOND_QUEUE).add_request(request)
    engine.step()
    assert request.hexgen.late


def test_assumed_rates_put_nobody_behind(build: Build) -> None:
    engine = build(max_num_seqs=1, hexgen={"decode_tokens_per_s": 1.0, "displace": False})
    engine.add("running", [5] * 8, 9, chat(90, 9))
    engine.step()
    engine.add("soon", [7] * 8, 30, chat(0.5, 30))  # 30 s at the rate that is assumed
    engine.add("later", [8] * 8, 30, chat(50, 30))
    engine.step()
    assert engine.waiting() == ["soon", "later"]


def slow_mix(engine: FakeEngine) -> None:
    """Twelve long calls without deadline run; a chat call comes that needs fast steps."""
    for i in range(12):
        engine.add(f"batch{i}", [5 + i] * 40, 300)
    engine.steps(12)
    # 100 tokens: alone in 5.5 ms each, beside all twelve in 11.5 ms.
    engine.add("chat", [99] * 40, 100, chat(1.0, 100))


def test_a_chat_call_is_on_time_beside_a_full_batch(build: Build) -> None:
    engine = build(max_num_seqs=16, blocks=2000)
    warm(engine)
    slow_mix(engine)
    due_s = engine.clock.now + 1.0
    while "chat" not in engine.ended:
        engine.step()
        assert len(engine.scheduler.running) <= 16
    assert engine.clock.now <= due_s
    assert engine.scheduler.hexgen_stats()["batch_tokens_given_up"] > 100
    assert engine.displaced() == 0
    assert len(engine.running()) == 12, "they kept their places and their KV"
    engine.run()
    assert engine.tokens["chat"] == expected([99] * 40, 100)
    assert all(engine.tokens[f"batch{i}"] == expected([5 + i] * 40, 300) for i in range(12))
    engine.assert_clean()


def test_without_pace_control_it_is_late(build: Build) -> None:
    engine = build(max_num_seqs=16, blocks=2000, hexgen={"pace": False})
    warm(engine)
    slow_mix(engine)
    due_s = engine.clock.now + 1.0
    while "chat" not in engine.ended:
        engine.step()
    assert engine.clock.now > due_s


def test_calls_with_an_adapter_are_left_out_of_no_step(build: Build) -> None:
    engine = build(max_num_seqs=16, blocks=2000)
    warm(engine)
    slow_mix(engine)
    bound = engine.scheduler.requests["batch11"]  # the last one, the first to be left out
    bound.lora_request = LoRARequest("one", 1, "/one")
    while "chat" not in engine.ended:
        before = len(engine.tokens["batch11"])
        engine.step()
        assert len(engine.tokens["batch11"]) == before + 1
    assert engine.scheduler.hexgen_stats()["batch_tokens_given_up"] > 100


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_calls_without_deadline_keep_their_share_of_turns(build: Build, share: float) -> None:
    """However pressing the others are, and for as long as they come."""
    engine = build(max_num_seqs=24, blocks=4000, hexgen={"interactive_share": share})
    warm(engine)
    for i in range(12):
        engine.add(f"batch{i}", [5 + i] * 40, 900)
    engine.steps(12)
    before = sum(len(engine.tokens[f"batch{i}"]) for i in range(12))
    steps = 0
    for i in range(60):
        engine.add(f"chat{i}", [99] * 20, 40, chat(0.36, 40))
        for _ in range(12):
            engine.step()
            steps += 1
    written = sum(len(engine.tokens[f"batch{i}"]) for i in range(12)) - before
    turns = 12 * steps
    assert written >= 0.95 * (1.0 - share) * turns
    assert written < turns, "nothing was left out"


def test_the_oldest_waiting_call_gets_a_place_however_many_deadlines_come(build: Build) -> None:
    engine = build(max_num_seqs=4, hexgen={"interactive_share": 0.75})
    for i in range(3):
        engine.add(f"batch{i}", [5 + i] * 20, 20)
    count = 0
    while not {"batch0", "batch1", "batch2"} <= set(engine.ended):
        for _ in range(len(engine.waiting()), 8):
            engine.add(f"chat{count}", [99] * 20, 20, chat(60, 20))
            count += 1
        engine.step()
        assert count < 200, "starved"
    assert engine.ended.index("batch0") < engine.ended.index("batch1")
    never = build(max_num_seqs=4, hexgen={"interactive_share": 1.0})
    never.add("batch", [5] * 20, 20)
    for i in range(40):
        never.add(f"chat{i}", [99] * 20, 20, chat(60, 20))
    never.run()
    assert never.ended[-1] == "batch"


def test_who_is_left_out_gives_way_first_when_the_cache_is_full(build: Build) -> None:
    engine = build(max_num_seqs=16, blocks=60, prefix_caching=False)
    warm(engine)
    for i in range(8):
        engine.add(f"batch{i}", [5 + i] * 60, 60)
    engine.steps(10)
    engine.add("chat", [99] * 100, 200, chat(1.4, 200))
    while "chat" not in engine.ended:
        engine.step()
        assert not engine.scheduler.requests.get("chat") or (
            engine.scheduler.requests["chat"].num_preemptions == 0
        )
    engine.run()
    assert all(engine.tokens[f"batch{i}"] == expected([5 + i] * 60, 60) for i in range(8))
    engine.assert_clean()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("v2_runner", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_an_undisturbed_run(
    build: Build, seed: int, caching: bool, v2_runner: bool, async_scheduling: bool
) -> None:
    """Random calls of both kinds, aborts of any, resets, pauses; few blocks and few places."""
    rng = random.Random(seed)
    engine = build(
        blocks=rng.choice([60, 120, 400]),
        max_num_seqs=rng.choice([4, 8, 16]),
        max_batched_tokens=rng.choice([64, 256]),
        prefix_caching=caching,
        v2_runner=v2_runner,
        async_scheduling=async_scheduling,
        hexgen={"interactive_share": rng.choice([0.5, 0.95, 1.0])},
    )
    warm(engine)
    shared = prompt(rng, 40, 90)
    calls: dict[str, tuple[list[int], int]] = {}
    left_out = 0
    for i in range(120):
        tokens = (shared if rng.random() < 0.3 else []) + prompt(rng, 4, 120)
        urgent = rng.random() < 0.4
        count = rng.randint(2, 60) if urgent else rng.randint(20, 150)
        meta = chat(rng.choice([0.2, 0.6, 2.0, 9.0]), rng.choice([None, count])) if urgent else None
        calls[f"r{i}"] = (tokens, count)
        engine.add(f"r{i}", tokens, count, meta, priority=rng.choice([0, 0, 0, 0, -1, 2]))
        for _ in range(rng.randint(0, 12)):
            engine.step()
            left_out += bool(engine.scheduler._pauser._out)
        if rng.random() < 0.1:
            alive = [n for n in engine.scheduler.requests if n in calls]
            if alive:
                gone = rng.choice(alive)
                engine.abort(gone)
                calls.pop(gone)
        if rng.random() < 0.03:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        if rng.random() < 0.05:
            state = rng.choice([PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
            engine.scheduler.set_pause_state(state)
            engine.steps(3)
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert left_out > 20, "nobody was ever left out of a step"
    for name, (tokens, count) in calls.items():
        assert engine.tokens[name] == expected(tokens, count), name
    engine.assert_clean()


@pytest.mark.parametrize("seed", range(4))
def test_plain_calls_run_as_in_stock_vllm(build: Build, seed: int) -> None:
    """No deadline, no class, no priority: the same steps, call by call."""
    rng = random.Random(seed)
    calls = [(prompt(rng, 4, 300), rng.randint(1, 90)) for _ in range(80)]
    pauses = [rng.randint(0, 6) for _ in calls]
    setup = {"blocks": rng.choice([60, 200]), "max_num_seqs": rng.choice([4, 12]),
             "max_batched_tokens": 128}  # fmt: skip

    def play(scheduler_class: type | None) -> list[dict[str, int]]:
        engine = build(scheduler_class, **setup) if scheduler_class else build(**setup)
        steps: list[dict[str, int]] = []
        schedule = engine.scheduler.schedule

        def noted(*args: Any) -> Any:
            output = schedule(*args)
            steps.append(dict(output.num_scheduled_tokens))
            return output

        engine.scheduler.schedule = noted
        for i, (tokens, count) in enumerate(calls):
            engine.add(f"r{i}", tokens, count)
            engine.steps(pauses[i])
        engine.run()
        return steps

    assert play(None) == play(AsyncScheduler)
