"""An urgent call makes room for itself, and nobody gives way for nothing."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.config import KVTransferConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from benchmarks.engine.headless import Setup, vllm_config
from hexgen_vllm.engine.displacement import Displacer
from hexgen_vllm.engine.options import options_of
from hexgen_vllm.policy.victims import VictimSearch
from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, expected, prompt
from tests.engine.nomodel.test_mix import warm

URGENT = CallMeta(workflow_deadline_ms=300.0)
LAZY = CallMeta(workflow_deadline_ms=900_000.0)


def fill(engine: FakeEngine, calls: int, prompt: int = 40, output: int = 60) -> None:
    """Let ``calls`` calls with much slack run for five steps."""
    for i in range(calls):
        engine.add(f"lazy{i}", [10 + i] * prompt, output, LAZY)
    engine.steps(5)


def test_displaces_for_a_slot_and_only_once(build: Build) -> None:
    engine = build(max_num_seqs=2)
    fill(engine, 4)
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.step()
    assert "urgent" in engine.running()
    assert engine.displaced() == 1
    engine.run()
    assert engine.ended[0] == "urgent"
    assert engine.displaced() == 1, "equal calls displace each other in turn"
    engine.assert_clean()


def test_displaces_for_kv_blocks(build: Build) -> None:
    engine = build(blocks=13, max_num_seqs=8, prefix_caching=False)
    fill(engine, 3)
    assert engine.free_blocks() <= 3
    engine.add("urgent", [99] * 100, 10, URGENT)  # 7 blocks
    engine.step()
    assert "urgent" in engine.running()
    assert engine.displaced() == 2
    engine.run()
    assert engine.ended[0] == "urgent"
    assert engine.tokens == {
        **{f"lazy{i}": expected([10 + i] * 40, 60) for i in range(3)},
        "urgent": expected([99] * 100, 10),
    }
    engine.assert_clean()


def test_finds_the_call_with_slack_wherever_it_is_in_the_batch(build: Build) -> None:
    engine = build(max_num_seqs=2)
    engine.add("lazy", [10] * 40, 60, LAZY)
    engine.step()
    engine.add("keen", [11] * 40, 60, CallMeta(workflow_deadline_ms=1500.0))
    engine.step()
    assert engine.running() == ["lazy", "keen"]
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.step()
    assert sorted(engine.running()) == ["keen", "urgent"]


def test_a_victim_waits_out_the_step_and_comes_back(build: Build) -> None:
    engine = build(max_num_seqs=2, async_scheduling=True)
    fill(engine, 2)
    engine.add("urgent", [99] * 40, 3, URGENT)
    output = engine.scheduler.schedule()
    victim = engine.scheduler.requests[engine.waiting()[0]]
    assert victim.status == RequestStatus.PREEMPTED
    assert victim.request_id not in output.num_scheduled_tokens
    assert victim.hexgen.displacements == 1
    engine.in_flight.append((output, engine.worker.execute(output)))
    engine.run()
    assert engine.tokens[victim.request_id] == expected(list(victim.prompt_token_ids), 60)
    engine.assert_clean()


def test_a_better_priority_displaces_whatever_the_deadlines(build: Build) -> None:
    engine = build(max_num_seqs=2)
    engine.add("near", [1] * 40, 60, CallMeta(workflow_deadline_ms=1.0))
    engine.add("minor", [2] * 40, 60, CallMeta(workflow_deadline_ms=1.0), priority=2)
    engine.steps(4)
    engine.add("lazy", [3] * 40, 10, LAZY, priority=5)
    engine.steps(6)
    assert engine.displaced() == 0, "a worse priority takes nothing"
    engine.add("major", [4] * 40, 10, priority=-10)
    engine.step()
    assert sorted(engine.running()) == ["major", "near"]
    engine.run()
    assert engine.ended == ["major", "near", "minor", "lazy"]
    assert engine.displaced() == 1
    engine.assert_clean()


def test_priorities_displace_a_call_at_most_so_often(build: Build) -> None:
    engine = build(max_num_seqs=1, hexgen={"max_displacements": 2})
    minor = engine.add("minor", [1] * 40, 300, priority=9)
    for i in range(6):
        engine.steps(6)
        engine.add(f"major{i}", [10 + i] * 20, 3, priority=-i)
    engine.run()
    assert minor.hexgen.displacements == 2
    assert engine.tokens["minor"] == expected([1] * 40, 300)


@pytest.mark.parametrize("first", ["blocked", "lora_full", "too_late"])
def test_one_call_that_cannot_be_helped_does_not_stop_the_next(build: Build, first: str) -> None:
    engine = build(max_num_seqs=2)
    fill(engine, 2)
    globals()[first](engine)
    engine.step()
    assert engine.displaced() == 0
    engine.add("next", [98] * 40, 10, CallMeta(workflow_deadline_ms=350.0))
    engine.steps(6)
    if first == "too_late":  # it goes first, so both need a place
        assert engine.displaced() == 2
        assert "urgent" in engine.running()
    assert "next" in engine.running()


def test_several_urgent_calls_displace_in_one_step(build: Build) -> None:
    engine = build(max_num_seqs=4)
    fill(engine, 4)
    for i in range(3):
        engine.add(f"urgent{i}", [90 + i] * 40, 10, URGENT)
    engine.step()
    assert engine.displaced() == 3
    assert {"urgent0", "urgent1", "urgent2"} < set(engine.running())


def test_a_step_without_a_look_would_have_displaced_nobody(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queue and batch are looked at only where somebody may be urgent, or may give way."""
    engine = build(max_num_seqs=2, async_scheduling=True)
    warm(engine)
    is_calm, without_look = Displacer._is_calm, 0

    def checked(displacer: Displacer, now: float) -> bool:
        nonlocal without_look
        found = is_calm(displacer, now)
        if found and engine.waiting():
            without_look += 1
            search = VictimSearch(displacer, engine.scheduler.hexgen_options)
            assert search.victims(now, displacer._step) == []
        return found

    monkeypatch.setattr(Displacer, "_is_calm", checked)
    rng = random.Random(3)
    for i in range(60):
        seconds = rng.choice([0.3, 2.2, 2.5, 90.0])
        output = rng.randint(5, 20) if seconds < 3 else rng.randint(200, 400)
        urgent = CallMeta(workflow_deadline_ms=1000 * seconds)
        engine.add(f"r{i}", prompt(rng, 10, 80), output, urgent)
        engine.steps(rng.randint(20, 80))
    engine.run()
    assert without_look > 60
    assert engine.displaced() > 5
    engine.assert_clean()


def test_equal_calls_never_displace_each_other(build: Build) -> None:
    engine = build(max_num_seqs=4, hexgen={"displace_gap_s": 0.0})
    for i in range(20):  # far more than can be on time: all of them come to be in danger
        engine.add(f"r{i}", [10 + i] * 40, 60, CallMeta(workflow_deadline_ms=2500))
    engine.run()
    assert engine.displaced() == 0


def test_a_call_is_displaced_at_most_so_often(build: Build) -> None:
    engine = build(max_num_seqs=1, hexgen={"max_displacements": 2})
    lazy = engine.add("lazy", [1] * 40, 300, LAZY)
    for i in range(6):
        engine.steps(6)
        engine.add(f"urgent{i}", [10 + i] * 20, 3, URGENT)
    engine.run()
    assert lazy.hexgen.displacements == 2
    assert engine.displaced() == 2
    assert engine.ended[:4] == ["urgent0", "urgent1", "lazy", "urgent2"]
    assert engine.tokens["lazy"] == expected([1] * 40, 300)


def blocked(engine: FakeEngine) -> None:
    """The urgent call waits for a grammar that is not compiled yet."""
    engine.add("urgent", [99] * 40, 10, URGENT, {"structured_outputs": GRAMMAR})


def lora_full(engine: FakeEngine) -> None:
    """Every adapter slot is taken by another adapter."""
    engine.scheduler.lora_config = SimpleNamespace(max_loras=1)
    for request in engine.scheduler.running:
        request.lora_request = LoRARequest("one", 1, "/one")
    engine.add("urgent", [99] * 40, 10, URGENT, lora_request=LoRARequest("two", 2, "/two"))


def paused(engine: FakeEngine) -> None:
    """The engine admits nobody."""
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add("urgent", [99] * 40, 10, URGENT)


def not_urgent(engine: FakeEngine) -> None:
    """The call can wait."""
    engine.add("urgent", [99] * 40, 10, CallMeta(workflow_deadline_ms=20_000.0))


def too_late(engine: FakeEngine) -> None:
    """The call was due long ago."""
    tail = CallMeta(workflow_deadline_ms=300.0, tail_ms=20_000.0)
    engine.add("urgent", [99] * 40, 10, tail)


def too_large(engine: FakeEngine) -> None:
    """The whole cache is not enough for the call and the batch's protected part."""
    for request in engine.scheduler.running[1:]:
        request.hexgen.displacements = 3
    engine.add("urgent", list(range(2, 400)), 10, URGENT)


def unfreeable(engine: FakeEngine) -> None:
    """A connector may still write the blocks of the batch."""
    engine.scheduler.defer_block_free = True
    for request in engine.scheduler.running:
        request.last_sched_seq = engine.scheduler.processed_step_seq + 9
    engine.add("urgent", [99] * 40, 10, URGENT)


GRAMMAR = StructuredOutputsParams(regex="a+")
REASONS = [blocked, lora_full, paused, not_urgent, too_late, too_large, unfreeable]


@pytest.mark.parametrize("reason", REASONS, ids=lambda f: f.__name__)
def test_nobody_gives_way_for_nothing(build: Build, reason: Any) -> None:
    engine = build(blocks=28, max_num_seqs=2)
    fill(engine, 2)
    reason(engine)
    engine.steps(3)
    assert engine.displaced() == 0
    assert sorted(engine.running()) == ["lazy0", "lazy1"]


@pytest.mark.parametrize("options", [{"displace": False}, {"max_displacements": 0}])
def test_displacement_can_be_switched_off(build: Build, options: dict[str, Any]) -> None:
    engine = build(max_num_seqs=2, hexgen=options)
    fill(engine, 2)
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.steps(3)
    assert engine.displaced() == 0


def test_nearly_done_calls_are_left_to_end(build: Build) -> None:
    engine = build(max_num_seqs=2)
    fill(engine, 2, output=20)  # five steps gone: 15 left, 16 are protected
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.run()
    assert engine.displaced() == 0


def test_nobody_gives_way_when_room_comes_in_time(build: Build) -> None:
    engine = build(max_num_seqs=2, hexgen={"decode_tokens_per_s": 100.0})
    fill(engine, 2, output=60)  # 55 left: 0.55 s
    engine.add("urgent", [99] * 40, 10, CallMeta(workflow_deadline_ms=1000.0))
    engine.run()
    assert engine.displaced() == 0
    assert engine.ended[2] == "urgent"


def test_a_hopeful_prediction_ends_with_the_slack(build: Build) -> None:
    engine = build(max_num_seqs=2, hexgen={"decode_tokens_per_s": 1000.0})
    for i in range(2):  # they say 20 and write 300
        said = CallMeta(workflow_deadline_ms=900_000.0, expected_output_tokens=20)
        engine.add(f"lazy{i}", [10 + i] * 40, 300, said)
    engine.steps(2)
    due_s = engine.clock.now + 0.5
    engine.add("urgent", [99] * 40, 10, CallMeta(workflow_deadline_ms=500.0))
    engine.run()
    assert engine.displaced() == 1
    assert engine.ended[0] == "urgent"
    assert engine.scheduler.hexgen_counters.preemptions["displaced"] == 1
    assert engine.clock.now > due_s


def test_a_throttled_step_displaces_nobody(build: Build) -> None:
    engine = build(max_num_seqs=2)
    fill(engine, 2)
    engine.add("urgent", [99] * 40, 10, URGENT)
    output = engine.scheduler.schedule(True)  # data parallelism: prefills wait for their turn
    engine.in_flight.append((output, engine.worker.execute(output)))
    engine.take_output()
    assert engine.displaced() == 0
    engine.step()
    assert engine.displaced() == 1


def test_nobody_gives_way_when_the_token_budget_is_what_is_short(build: Build) -> None:
    engine = build(max_num_seqs=2, max_batched_tokens=64)
    engine.add("decoding", [1] * 40, 60, LAZY)
    engine.steps(3)
    chunked = engine.add("chunked", [2] * 500, 60, LAZY)
    engine.steps(2)
    chunked.hexgen.displacements = 3
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.step()
    assert engine.displaced() == 0, "what stays in the batch takes every token"
    while chunked.is_prefill_chunk:
        engine.step()
    engine.steps(9)
    assert engine.displaced() == 1
    engine.run()
    engine.assert_clean()


def test_a_compiled_grammar_is_no_obstacle(build: Build) -> None:
    engine = build(max_num_seqs=2)
    fill(engine, 2)
    request = engine.add("urgent", [99] * 40, 10, URGENT, {"structured_outputs": GRAMMAR})
    request.structured_output_request.grammar = SimpleNamespace()
    engine.scheduler.schedule()
    assert engine.displaced() == 1
    assert "urgent" in engine.running()


def test_blocks_shared_with_others_do_not_count_as_room(build: Build) -> None:
    engine = build(blocks=16, max_num_seqs=8)
    shared = list(range(2, 146))  # 9 blocks, once in the cache
    for i in range(2):
        engine.add(f"lazy{i}", [*shared, 500 + i], 40, LAZY)
        engine.steps(3)
    assert engine.free_blocks() == 15 - 9 - 2
    engine.add("urgent", [99] * 120, 10, URGENT)  # 8 blocks; both victims own one each
    engine.steps(3)
    assert engine.displaced() == 0
    assert "urgent" in engine.waiting()
    engine.run()
    engine.assert_clean()


def test_blocks_that_the_urgent_call_shares_need_no_room(build: Build) -> None:
    engine = build(blocks=20, max_num_seqs=8)
    shared = list(range(2, 146))
    engine.add("lazy", [*shared, 500], 40, LAZY)
    engine.add("other", [7] * 90, 40, LAZY)
    engine.steps(3)
    assert engine.free_blocks() == 19 - 10 - 6
    engine.add("urgent", [*shared, 501], 10, URGENT)  # 9 of its 10 blocks are there
    engine.step()
    assert engine.displaced() == 0
    assert sorted(engine.running()) == ["lazy", "other", "urgent"]


def test_a_call_that_already_holds_kv_goes_first(build: Build) -> None:
    engine = build(max_num_seqs=3)
    session = engine.add("session", [7] * 30, 30, LAZY, resumable=True)
    engine.steps(32)
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    fill(engine, 2)
    engine.add("session", [8] * 30, 30, LAZY, resumable=True)
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.step()
    assert engine.displaced() == 0
    assert "session" in engine.running()
    engine.step()
    assert engine.displaced() == 1
    assert "urgent" in engine.running()


def test_nobody_is_displaced_while_the_connector_is_about_to_free_blocks(build: Build) -> None:
    engine = build(max_num_seqs=1)
    pending = [True]
    engine.scheduler.connector = Mock(
        has_pending_block_frees=lambda: pending[0],
        has_pending_push_work=lambda: False,
        get_num_new_matched_tokens=lambda *_: (0, False),
        take_events=list,
        requires_kv_delivery=False,
        build_connector_meta=lambda _: None,
        request_finished=lambda *_: (False, None),
    )
    engine.add("lazy", [1] * 40, 60, LAZY)
    engine.steps(4)
    engine.add("urgent", [2] * 40, 5, URGENT)
    engine.steps(3)
    assert engine.displaced() == 0
    pending[0] = False
    engine.steps(8)
    assert engine.displaced() == 1


ROLES = [
    ("NixlConnector", "kv_consumer", False),
    ("NixlConnector", "kv_both", False),
    ("LMCacheConnectorV1", "kv_both", False),
    ("NixlConnector", "kv_producer", True),
    ("OffloadingConnector", "kv_both", True),
]


@pytest.mark.parametrize(("connector", "role", "displaces"), ROLES)
@pytest.mark.parametrize("said", [None, True, False])
def test_displacement_is_off_where_kv_comes_from_other_engines(
    folder: Path, connector: str, role: Any, displaces: bool, said: bool | None
) -> None:
    options = {} if said is None else {"displace": said}
    config = vllm_config(folder, Setup(blocks=24, additional={"hexgen": options}))
    config.kv_transfer_config = KVTransferConfig(kv_connector=connector, kv_role=role)
    assert options_of(config).displace == (displaces if said is None else said)


def test_hooks_of_a_preemption_get_keywords(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other plugins hook vLLM's method as ``(self, request, timestamp, **more)``."""
    seen: list[dict[str, Any]] = []
    original = Scheduler._preempt_request

    def hooked(self: Any, request: Any, timestamp: float, **more: Any) -> None:
        seen.append(more)
        original(self, request, timestamp, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", hooked)
    engine = build(max_num_seqs=1)
    engine.add("lazy", [1] * 40, 60, LAZY)
    engine.steps(4)
    engine.add("urgent", [2] * 40, 5, URGENT)
    engine.steps(3)
    assert engine.displaced() == 1
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [list(more) for more in seen] == [["drop_stale_output"]] * len(seen)
    assert [more["drop_stale_output"] for more in seen][:1] == [False]
    assert seen[-1]["drop_stale_output"]


def test_claims_are_held_to_the_engines_limits(build: Build) -> None:
    """A client that reaches the engine itself gains nothing beyond them."""
    engine = build(max_num_seqs=1, hexgen={"max_priority": 1, "min_deadline_s": 30.0})
    engine.add("running", [1] * 40, 60, LAZY)
    engine.steps(5)
    engine.add("honest", [2] * 40, 5, CallMeta(workflow_deadline_ms=20_000.0), priority=-1)
    engine.add("liar", [3] * 40, 5, CallMeta(workflow_deadline_ms=1.0), priority=-(2**31))
    engine.step()
    assert engine.scheduler.requests["liar"].hexgen.rank == -1
    assert engine.running() == ["honest"], "both have the priority to displace, and it came first"
    engine.run()
    assert engine.ended.index("honest") < engine.ended.index("liar")


def test_without_limits_a_claim_is_what_counts(build: Build) -> None:
    engine = build(max_num_seqs=1)
    engine.add("liar", [3] * 40, 5, CallMeta(workflow_deadline_ms=1.0), priority=-(2**31))
    assert engine.scheduler.requests["liar"].hexgen.rank == -(2**31)
