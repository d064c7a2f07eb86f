"""Whatever is copied when weights change: no KV from before is used after, and nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.engine.nomodel.harness import expected
from tests.engine.nomodel.swap_harness import LateCopier, SwapEngine
from tests.engine.nomodel.test_exact import Load
from tests.engine.nomodel.test_swap_phases import (
    MODES,
    PHASES,
    PROMPT,
    WRITES,
    Phase,
    displaced,
    evicting,
    until_loaded,
)

ALL_MODES = {
    **MODES,
    "beside-v2-runner": {"beside": True, "async_scheduling": True, "v2_runner": True},
    "beside-no-prefix-cache": {"beside": True, "prefix_caching": False},
}
modes = pytest.mark.parametrize("mode", ALL_MODES)
phases = pytest.mark.parametrize("phase", PHASES)
beside = pytest.mark.parametrize("mode", [m for m in ALL_MODES if "beside" in m])

Update = Callable[[SwapEngine], None]


def at_once(engine: SwapEngine) -> None:
    """As the utility call of the engine core, and a pause of an engine in process."""
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)


def twice(engine: SwapEngine) -> None:
    at_once(engine)
    at_once(engine)


def paused_keep(engine: SwapEngine) -> None:
    """A pause that keeps the calls; it is complete when the engine has nothing to do."""
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(50):
        if not engine.busy():
            break
        engine.step()
    assert not engine.busy()
    assert not engine.keeper.loads_under_way()
    at_once(engine)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)


def steps_between(engine: SwapEngine) -> None:
    at_once(engine)
    engine.steps(2)
    at_once(engine)


UPDATES = [at_once, twice, paused_keep, steps_between]
updates = pytest.mark.parametrize("update", UPDATES)


def loading(folder: Path, mode: str) -> SwapEngine:
    """An engine whose lazy call is being loaded, with nothing of it in the prefix cache."""
    engine = displaced(folder, "sync", **ALL_MODES[mode])
    evicting(engine)
    until_loaded(engine)
    return engine


@modes
@phases
@updates
def test_after_new_weights_no_old_kv_is_used(
    folder: Path, mode: str, phase: Phase, update: Update
) -> None:
    engine = displaced(folder, "sync", **ALL_MODES[mode])
    phase(engine)
    update(engine)
    written = list(engine.tokens["lazy"])
    if update is not steps_between:
        engine.worker.weights = 77
    engine.run()
    engine.assert_clean()
    if update is not steps_between:
        rest = expected([*PROMPT, *written], WRITES - len(written), weights=77)
        assert engine.tokens["lazy"] == written + rest
    else:
        assert engine.tokens["lazy"] == expected(PROMPT, WRITES)


@beside
def test_a_load_under_way_is_taken_back(folder: Path, mode: str) -> None:
    engine = loading(folder, mode)
    request = engine.scheduler.requests["lazy"]
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert engine.keeper.loads_under_way()
    at_once(engine)
    assert engine.free_blocks() == engine.setup.blocks - 1
    assert request.status == RequestStatus.PREEMPTED
    assert request.num_computed_tokens == 0
    engine.run()
    engine.assert_clean()
    assert not engine.keeper.loads_under_way()
    assert engine.tokens["lazy"] == expected(PROMPT, WRITES)


@beside
def test_a_load_that_is_done_but_not_taken_up_is_taken_back(folder: Path, mode: str) -> None:
    engine = loading(folder, mode)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    while engine.busy():
        engine.step()
    assert "lazy" in engine.scheduler.finished_recving_kv_req_ids
    engine.worker.weights = 5
    written = list(engine.tokens["lazy"])
    at_once(engine)
    assert "lazy" not in engine.scheduler.finished_recving_kv_req_ids
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    engine.assert_clean()
    rest = expected([*PROMPT, *written], WRITES - len(written), weights=5)
    assert engine.tokens["lazy"] == written + rest


@beside
@pytest.mark.parametrize("before", [False, True])
def test_an_abort_and_a_reset_while_loading(folder: Path, mode: str, before: bool) -> None:
    """As pausing an engine in process with ``abort`` does, and clients that leave."""
    engine = loading(folder, mode)
    if before:
        engine.abort("lazy")
    at_once(engine)
    if not before:
        engine.abort("lazy")
    engine.run()
    engine.assert_clean()
    assert not engine.keeper.loads_under_way()


@beside
def test_everything_aborted_and_reset_while_loading(folder: Path, mode: str) -> None:
    engine = loading(folder, mode)
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    at_once(engine)
    engine.run()
    engine.assert_clean()


@beside
def test_a_late_load_does_not_overwrite_who_got_its_blocks(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors() -> list[str]:
        engine = loading(folder, mode)
        at_once(engine)
        engine.worker.weights = 9
        engine.run()
        return engine.worker.errors

    assert errors() == []
    monkeypatch.setattr(LateCopier, "fence", lambda self: None)
    assert errors() != [], "the test would not see it"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", ["async", "beside", "beside-async", "beside-v2-runner"])
def test_resets_at_random_moments_are_exact(folder: Path, mode: str, seed: int) -> None:
    engine = SwapEngine(folder, **ALL_MODES[mode])
    load, rng = Load(engine, seed), random.Random(seed)
    step: Any = engine.step
    resets = 0

    def disturbed() -> None:
        nonlocal resets
        step()
        loads = engine.keeper.loads_under_way()
        if rng.random() < (0.3 if loads else 0.03):
            resets += loads or "beside" not in mode
            setattr(engine, "step", step)  # noqa: B010
            rng.choice(UPDATES[:3])(engine)
            setattr(engine, "step", disturbed)  # noqa: B010

    setattr(engine, "step", disturbed)  # noqa: B010
    load.play()
    load.check()
    assert resets > 5
    assert engine.host_kv()["restored_tokens"] > 0
