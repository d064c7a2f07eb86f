"""Four ways in which calls without deadline, late ones and long ones once harmed the others.

On every vLLM that is supported.
"""

from __future__ import annotations

import pytest

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.test_mix import chat


def test_a_call_without_deadline_never_goes_before_one_with(build: Build) -> None:
    """However long it has waited: it used to have a default deadline, and went first."""
    engine = build(max_num_seqs=1)
    engine.add("running", [5] * 8, 3, chat(9))
    engine.step()
    engine.add("batch", [6] * 8, 3)
    engine.clock.now += 70.0
    engine.add("chat", [7] * 8, 3, chat(5, 3))
    assert engine.waiting() == ["chat", "batch"]
    engine.run()
    assert engine.ended == ["running", "chat", "batch"]


def test_one_late_call_does_not_stop_displacement_for_those_behind_it(build: Build) -> None:
    engine = build(max_num_seqs=2)
    for name in "ab":
        engine.add(name, [5] * 40, 600)
    engine.steps(40)
    engine.add("late", [6] * 40, 60, chat(1.0, 60, tail_ms=20_000.0))
    engine.add("chat", [7] * 40, 60, chat(2.5, 60))
    engine.steps(3)
    assert "chat" in engine.running()
    assert engine.displaced() >= 1
    engine.run()
    engine.assert_clean()


def test_of_equal_deadlines_the_first_to_come_goes_first(build: Build) -> None:
    """Not the longest: better estimates of lengths would make the order worse."""
    engine = build(max_num_seqs=1)
    engine.add("running", [5] * 8, 3, chat(9))
    engine.step()
    engine.add("long", [6] * 8, 100, chat(60, 900))
    engine.add("short", [7] * 8, 5, chat(60, 5))
    sooner = build(max_num_seqs=1)
    sooner.add("running", [5] * 8, 3, chat(9))
    sooner.step()
    sooner.add("short", [7] * 8, 5, chat(60, 5))
    sooner.add("long", [6] * 8, 100, chat(60, 900))
    assert engine.waiting() == ["long", "short"]
    assert sooner.waiting() == ["short", "long"]


@pytest.mark.parametrize("named", [False, True])
def test_lengths_of_batch_answers_say_nothing_of_chat_answers(build: Build, named: bool) -> None:
    kind = {"workflow_type": "assistant", "stage": "answer"} if named else {}
    engine = build(max_num_seqs=64, blocks=2000, hexgen={"decode_tokens_per_s": 60.0})
    for i in range(40):
        engine.add(f"batch{i}", [5 + i] * 8, 900, CallMeta(**kind))
    engine.run()
    call = engine.add("chat", [7] * 8, 1000, chat(8, **kind)).hexgen
    assert call.latest_start_s - engine.clock.now > 0
    assert engine.add("more", [8] * 8, 1000, CallMeta(**kind)).hexgen.expected_tokens == 900
    lengths = engine.scheduler.hexgen_stats()["lengths"]
    stage = kind.get("stage", "default")
    assert lengths[f"{kind.get('workflow_type', 'default')} batch"][stage]["p50"] == 900
