"""Calls that change or go in the middle: aborts, sessions, resets, pauses, odd requests."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator

import pytest
from vllm.pooling_params import PoolingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, expected, prompt

URGENT = CallMeta(workflow_deadline_ms=300.0)
LAZY = CallMeta(workflow_deadline_ms=900_000.0)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_displaced_call_can_be_aborted(build: Build, async_scheduling: bool) -> None:
    engine = build(max_num_seqs=1, async_scheduling=async_scheduling)
    engine.add("lazy", [1] * 40, 60, LAZY)
    engine.steps(5)
    engine.add("urgent", [2] * 40, 5, URGENT)
    engine.step()
    assert engine.displaced() == 1
    engine.abort("lazy")
    engine.run()
    engine.assert_clean()
    assert engine.tokens["urgent"] == expected([2] * 40, 5)


def test_everything_can_be_aborted_at_once(build: Build) -> None:
    engine = build(blocks=24, async_scheduling=True)
    for i in range(12):
        engine.add(f"r{i}", [10 + i] * 40, 60, URGENT if i % 3 else LAZY)
    engine.steps(7)
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.run()
    engine.assert_clean()


def test_resetting_the_cache_recomputes_the_batch(build: Build) -> None:
    engine = build(async_scheduling=True)
    for i in range(4):
        engine.add(f"r{i}", [10 + i] * 40, 30, LAZY)
    engine.steps(6)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    stats = engine.scheduler.hexgen_stats()
    assert stats["preemptions"] == {"displaced": 0, "kv": 0, "reset": 4}
    engine.run()
    assert engine.tokens == {f"r{i}": expected([10 + i] * 40, 30) for i in range(4)}
    assert engine.scheduler.hexgen_stats()["recomputed_tokens"] >= 4 * 40
    engine.assert_clean()


def test_a_paused_engine_keeps_its_order(build: Build) -> None:
    engine = build(max_num_seqs=2)
    for i, seconds in enumerate((90, 30, 60)):
        engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        engine.add(f"r{i}", [10 + i] * 20, 5, CallMeta(workflow_deadline_ms=1000.0 * seconds))
    output = engine.scheduler.schedule()
    assert not output.num_scheduled_tokens
    assert engine.waiting() == ["r1", "r2", "r0"]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.ended == ["r1", "r2", "r0"]


def play_session(engine: FakeEngine, name: str, turns: list[list[int]], count: int) -> list[int]:
    """Send every turn of a session when it is due; return the tokens that it should write."""
    history: list[int] = []
    want: list[int] = []
    for tokens in turns:
        engine.add(name, tokens, count, LAZY, resumable=True)
        history += tokens
        out = expected(history, count)
        want += out
        history += out[:-1]  # vLLM drops the token of a turn that was not computed yet
        while len(engine.tokens[name]) < len(want):
            engine.step()
    engine.add(name, [2], 1, resumable=False)  # the end of the session
    return want


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sessions_under_pressure_are_exact(build: Build, seed: int, async_scheduling: bool) -> None:
    rng = random.Random(seed)
    engine = build(blocks=24, max_num_seqs=4, async_scheduling=async_scheduling)
    others = {}
    for i in range(10):
        tokens, count = prompt(rng, 20, 90), rng.randint(5, 40)
        engine.add(f"r{i}", tokens, count, rng.choice([LAZY, URGENT]))
        others[f"r{i}"] = expected(tokens, count)
    turns = [prompt(rng, 5, 30) for _ in range(4)]
    want = play_session(engine, "session", turns, rng.randint(2, 12))
    engine.run()
    assert engine.tokens == {**others, "session": want}
    engine.assert_clean()


def test_a_sessions_next_turn_has_a_deadline_of_its_own(build: Build) -> None:
    engine = build(max_num_seqs=4)
    session = engine.add("session", [7] * 30, 4, LAZY, resumable=True)
    engine.steps(6)
    engine.clock.now += 50.0
    engine.add("session", [8] * 30, 4, URGENT, resumable=True)
    assert session.hexgen.deadline_s == pytest.approx(engine.clock.now + 0.3)
    queue = [q for q in engine.scheduler.__dict__.values() if type(q).__name__ == "UrgencyQueue"]
    held = [q for q in queue if session in q]
    assert [q._heap._entries[session][1] for q in held] == [session.hexgen.key_s]


def test_a_pooling_request_has_no_sampling_params(build: Build) -> None:
    engine = build()
    request = Request(
        request_id="pool",
        prompt_token_ids=[5] * 20,
        sampling_params=None,
        pooling_params=PoolingParams(task="embed"),
        block_hasher=engine.hasher,
    )
    engine.scheduler.add_request(request)
    output = engine.scheduler.schedule()
    assert output.num_scheduled_tokens == {"pool": 20}
    assert request.hexgen.expected_tokens == 1


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    """Messages of our engine logger, which does not propagate to the root."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.hexgen")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)  # whatever VLLM_LOGGING_LEVEL was when vLLM was imported
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_bad_metadata_never_stops_the_engine(build: Build, warnings_logged: list[str]) -> None:
    engine = build()
    bad = {
        "hexgen_workflow_deadline_ms": "soon",
        "hexgen_tail_ms": float("nan"),
        "hexgen_expected_output_tokens": -3,
        "hexgen_background": [1],
        "hexgen_colour": "red",
        "somebody_elses": object(),
    }
    for i in range(3):
        engine.add(f"r{i}", [10 + i] * 20, 5, sampling={"extra_args": dict(bad)})
    engine.add("odd", [9] * 20, 5, sampling={"extra_args": {5: "x"}})
    request = engine.scheduler.requests["r0"]
    assert request.hexgen.deadline_s == math.inf
    assert (request.hexgen.tail_s, request.hexgen.background) == (0.0, False)
    engine.run()
    assert len(engine.ended) == 4
    assert engine.scheduler.hexgen_stats()["bad_metadata"] == 3 * 5 + 1
    assert len(warnings_logged) == 1
    assert "hexgen_workflow_deadline_ms" in warnings_logged[0]
    engine.clock.now += 61.0
    engine.add("later", [8] * 20, 5, sampling={"extra_args": dict(bad)})
    assert len(warnings_logged) == 2


def test_what_agents_say_to_another_router_is_read_behind_what_is_said_to_us(build: Build) -> None:
    engine = build()
    context = {"program_id": "p1", "deadline_seconds": 9.0, "agent_role": "draft"}
    for name, more in (("a", {}), ("b", {"hexgen_workflow_deadline_ms": 2000})):
        xargs = {"agentic_context": context, **more}
        engine.add(name, [7] * 20, 5, sampling={"extra_args": xargs})
    engine.add("odd", [7] * 20, 5, sampling={"extra_args": {"agentic_context": "p1"}})
    calls = {name: request.hexgen for name, request in engine.scheduler.requests.items()}
    assert [calls[name].workflow_id for name in ("a", "b", "odd")] == ["p1", "p1", "odd"]
    left = [calls[name].deadline_s - calls[name].arrived_s for name in ("a", "b")]
    assert left == pytest.approx([9.0, 2.0])


def test_remaining_time_counts_from_arrival(build: Build) -> None:
    engine = build()
    late = engine.add("late", [1] * 8, 5, URGENT, arrival_time=time.time() - 5.0)
    absurd = engine.add("absurd", [1] * 8, 5, URGENT, arrival_time=time.time() + 5000.0)
    assert late.hexgen.deadline_s == pytest.approx(engine.clock.now - 4.7, abs=0.5)
    assert absurd.hexgen.deadline_s == pytest.approx(engine.clock.now + 0.3)


def test_the_workflow_is_named_by_whatever_is_there(build: Build) -> None:
    engine = build()
    said = engine.add("a", [1] * 8, 5, CallMeta(workflow_id="w"), session_id="s")
    session = engine.add("b", [1] * 8, 5, session_id="s")
    # A router that places a call says whose workflow it is; the body may say anything.
    routed = engine.add("d", [1] * 8, 5, CallMeta(tail_ms=0.0), session_id="s")
    assert routed.hexgen.workflow_id == "d"
    alone = engine.add("c", [1] * 8, 5)
    assert [r.hexgen.workflow_id for r in (said, session, alone)] == ["w", "s", "c"]
