"""One preempted call at a time: what is saved and restored, and what may happen to it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from hexgen_vllm.engine.server.middleware import exposition
from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.harness import expected
from tests.engine.nomodel.swap_harness import SwapEngine

URGENT = CallMeta(workflow_deadline_ms=300.0)
LAZY = CallMeta(workflow_deadline_ms=900_000.0)
PROMPT = [7, 8, 9, 10] * 15  # 60 tokens: the fourth block of 16 is partly filled
WRITES = 60
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "beside": {"beside": True},
    "beside-async": {"beside": True, "async_scheduling": True},
    "async-no-prefix-cache": {"async_scheduling": True, "prefix_caching": False},
}
modes = pytest.mark.parametrize("mode", MODES)


def displaced(folder: Path, mode: str, **options: Any) -> SwapEngine:
    """An engine with one slot, whose lazy call has just been displaced by an urgent one."""
    engine = SwapEngine(folder, **{"max_num_seqs": 1, **MODES[mode], **options})
    engine.add("lazy", PROMPT, WRITES, LAZY)
    engine.steps(8)
    engine.add("urgent", [3] * 40, 12, URGENT)
    while not engine.displaced():
        engine.step()
    return engine


def finish(engine: SwapEngine, *names: str) -> None:
    engine.run()
    engine.assert_clean()
    assert engine.tokens["urgent"] == expected([3] * 40, 12)
    if "lazy" in names:
        assert engine.tokens["lazy"] == expected(PROMPT, WRITES)


@modes
def test_all_is_restored_and_nothing_computed_twice(folder: Path, mode: str) -> None:
    engine = displaced(folder, mode)
    before = engine.host_kv()
    assert before["copies"] == 1
    assert before["saved_tokens"] % 16, "the partly filled block is saved, too"
    assert before["used_bytes"] == before["saved_bytes"] == 128 * -(-before["saved_tokens"] // 16)
    finish(engine, "lazy")
    after = engine.host_kv()
    assert engine.recomputed() == 0
    assert after["restored_tokens"] + after["cached_tokens"] == before["saved_tokens"]
    assert engine.worker.computed_tokens == 60 + WRITES - 1 + 40 + 12 - 1


@modes
def test_a_preempted_call_is_ranked_as_if_its_kv_were_there(folder: Path, mode: str) -> None:
    starts = {}
    for keep in ("always", "never"):
        engine = displaced(folder, mode, hexgen={"keep_kv": keep})
        request = engine.scheduler.requests["lazy"]
        assert (request.hexgen.kept_tokens > 60) == (keep == "always")
        starts[keep] = request.hexgen.latest_start_s
    assert starts["always"] > starts["never"]


def test_what_the_prefix_cache_still_holds_is_not_restored(folder: Path) -> None:
    engine = displaced(folder, "sync", blocks=60)
    finish(engine, "lazy")
    kept = engine.host_kv()
    assert kept["cached_tokens"] == 64
    assert kept["restored_tokens"] == kept["saved_tokens"] - 64
    assert kept["survival"] > 0


def evicting(engine: SwapEngine) -> None:
    """Fill the device's cache with other calls, so that no block of a waiting one survives."""
    for i in range(6):
        engine.add(f"filler{i}", [100 + i] * 150, 2, URGENT)


@pytest.mark.parametrize("mode", ["sync", "async", "beside-async"])
def test_nothing_survives_and_all_is_restored(folder: Path, mode: str) -> None:
    engine = displaced(folder, mode)
    evicting(engine)
    finish(engine, "lazy")
    kept = engine.host_kv()
    assert kept["cached_tokens"] == 0
    assert kept["restored_tokens"] == kept["saved_tokens"]
    assert engine.recomputed() == 0


def at_once(engine: SwapEngine) -> None:
    """In the step that saves it."""


def in_flight(engine: SwapEngine) -> None:
    engine.steps(1)


def while_waiting(engine: SwapEngine) -> None:
    engine.steps(4)


def until_loaded(engine: SwapEngine) -> None:
    """In the step that loads it, or while that runs beside the forward pass."""
    while not engine.host_kv()["restored_tokens"]:
        engine.step()


def when_resumed(engine: SwapEngine) -> None:
    until_loaded(engine)
    engine.steps(5)


PHASES = [at_once, in_flight, while_waiting, until_loaded, when_resumed]
phases = pytest.mark.parametrize("phase", PHASES)
Phase = Callable[[SwapEngine], None]


@modes
@phases
def test_an_abort_leaves_nothing_behind(folder: Path, mode: str, phase: Phase) -> None:
    engine = displaced(folder, mode)
    phase(engine)
    engine.abort("lazy")
    finish(engine)
    got = engine.tokens["lazy"]
    assert got == expected(PROMPT, WRITES)[: len(got)]


@modes
@phases
def test_everything_aborted_leaves_nothing_behind(folder: Path, mode: str, phase: Phase) -> None:
    engine = displaced(folder, mode)
    phase(engine)
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.run()
    engine.assert_clean()


@modes
@phases
@pytest.mark.parametrize("running", [False, True])
def test_a_reset_drops_the_copy(folder: Path, mode: str, phase: Phase, running: bool) -> None:
    engine = displaced(folder, mode)
    phase(engine)
    request = engine.scheduler.requests["lazy"]
    done = engine.scheduler.reset_prefix_cache(reset_running_requests=running, reset_connector=True)
    assert done or not running
    assert engine.keeper.pool.used == 0
    assert request.hexgen.kept_tokens == 0
    finish(engine, "lazy")


@modes
@phases
def test_a_shutdown_in_the_middle_ends(folder: Path, mode: str, phase: Phase) -> None:
    engine = displaced(folder, mode)
    phase(engine)
    engine.scheduler.shutdown()
    engine.worker.connector.shutdown()
    assert engine.keeper.pool.used == 0
    assert engine.worker.swap.memory.numel() == 0
    assert not engine.worker.swap.finished()
    engine.worker.connector.shutdown()  # vLLM may call it twice


def test_a_call_that_ends_while_preempted_takes_its_copy_along(folder: Path) -> None:
    engine = SwapEngine(
        folder, max_num_seqs=1, async_scheduling=True, hexgen={"protect_last_tokens": 0}
    )
    engine.add("lazy", PROMPT, 4, LAZY)
    while len(engine.tokens["lazy"]) < 3:
        engine.step()
    engine.add("urgent", [3] * 40, 12, CallMeta(workflow_deadline_ms=1.0))  # cannot wait
    finish(engine)
    assert engine.displaced() == 1
    assert engine.tokens["lazy"] == expected(PROMPT, 4)
    assert engine.host_kv()["dropped_tokens"].keys() == {"finished"}


class TestSharedHead:
    """Two calls with a long head in common; the one that has more to write is displaced."""

    HEAD = [5] * 96

    def displace(self, folder: Path, **options: Any) -> SwapEngine:
        options.setdefault("hexgen", {"keep_kv": "auto", "prefill_tokens_per_s": 50.0})
        engine = SwapEngine(folder, max_num_seqs=2, **options)
        for name, tail in (("lazy", 21), ("other", 22)):
            engine.add(name, [*self.HEAD, tail], WRITES, LAZY)
            engine.steps(2)
        engine.keeper.ledger.head_risk = 0.0 if options.get("blocks") else 1.0
        engine.add("urgent", [3] * 40, 12, URGENT)
        engine.steps(2)
        assert engine.displaced() == 1
        return engine

    def check(self, engine: SwapEngine) -> None:
        engine.run()
        engine.assert_clean()
        for name, tail in (("lazy", 21), ("other", 22)):
            assert engine.tokens[name] == expected([*self.HEAD, tail], WRITES)

    def test_is_saved_where_losing_it_is_likely(self, folder: Path) -> None:
        engine = self.displace(folder)
        assert engine.host_kv()["saved_tokens"] > 96
        self.check(engine)
        assert engine.recomputed() == 0
        assert engine.keeper.ledger.head_risk < 1.0

    def test_is_left_out_where_it_stays(self, folder: Path) -> None:
        engine = self.displace(folder, blocks=40)
        assert 0 < engine.host_kv()["saved_tokens"] < 32
        self.check(engine)
        assert engine.recomputed() == 0

    def test_is_saved_with_the_rest_where_rates_are_overruled(self, folder: Path) -> None:
        engine = self.displace(folder, blocks=40, hexgen={"keep_kv": "always"})
        assert engine.host_kv()["saved_tokens"] > 96
        self.check(engine)

    def test_gone_nevertheless_makes_the_copy_useless(self, folder: Path) -> None:
        engine = self.displace(folder, blocks=40)
        victim = next(iter(engine.keeper.pool.copies))
        engine.abort({"lazy": "other", "other": "lazy"}[victim])
        for i in range(6):
            engine.add(f"filler{i}", [100 + i] * 200, 2, URGENT)
        engine.run()
        engine.assert_clean()
        tail = {"lazy": 21, "other": 22}[victim]
        assert engine.tokens[victim] == expected([*self.HEAD, tail], WRITES)
        assert engine.host_kv()["dropped_tokens"].keys() == {"headless"}
        assert engine.recomputed() > 96
        assert engine.keeper.ledger.head_risk > 0.0


def test_a_call_that_must_not_read_the_cache_is_not_kept(folder: Path) -> None:
    engine = SwapEngine(folder, max_num_seqs=1)
    engine.add("lazy", PROMPT, WRITES, LAZY, {"skip_reading_prefix_cache": True})
    engine.steps(8)
    engine.add("urgent", [3] * 40, 12, URGENT)
    finish(engine, "lazy")
    assert engine.displaced() == 1
    assert engine.host_kv()["saved_tokens"] == 0


def test_the_worst_call_in_a_full_pool_gives_way(folder: Path) -> None:
    engine = SwapEngine(folder, max_num_seqs=3, host_blocks=6, blocks=60)
    for name, hours in (("later", 3), ("late", 2)):
        meta = CallMeta(workflow_deadline_ms=3_600_000.0 * hours)
        engine.add(name, [*PROMPT, hours], WRITES, meta)
    engine.steps(6)
    for i in range(3):
        engine.add(f"urgent{i}", [30 + i] * 40, 30, URGENT)
    engine.steps(3)
    assert engine.displaced() == 2
    assert list(engine.keeper.pool.copies) == ["late"]
    engine.run()
    engine.assert_clean()


def test_the_page_of_metrics_tells_what_was_copied(folder: Path) -> None:
    engine = displaced(folder, "sync")
    finish(engine, "lazy")
    page = exposition(engine.scheduler.hexgen_stats())
    kept = engine.host_kv()
    assert f"hexgen_vllm_host_kv_saved_tokens_total {kept['saved_tokens']}\n" in page
    assert f"hexgen_vllm_host_kv_capacity_bytes {400 * 128}\n" in page
    assert "hexgen_vllm_host_kv_used_bytes 0\n" in page
    assert kept["save_bytes_per_s"] > 0
    assert kept["restore_bytes_per_s"] > 0


@pytest.mark.parametrize(("keep", "displacements"), [("always", 1), ("never", 0)])
def test_cheap_copies_let_urgency_act(folder: Path, keep: str, displacements: int) -> None:
    """Computing the victim's KV again would take 8 seconds, more than its slack allows."""
    slow = {"prefill_tokens_per_s": 10.0, "keep_kv": keep}
    engine = SwapEngine(folder, max_num_seqs=1, hexgen=slow)
    engine.add("lazy", PROMPT, WRITES, CallMeta(workflow_deadline_ms=16_000.0))
    engine.steps(20)
    engine.add("urgent", [3] * 20, 12, CallMeta(workflow_deadline_ms=3_000.0))
    engine.step()
    assert engine.displaced() == displacements
    engine.run()
    engine.assert_clean()
