"""The real engine of ``bench mix``: its load, its clock, and what priorities alone do there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.testing import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def live() -> Iterator[Any]:
    """The module, which imports vLLM, in an environment for engines in this process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from benchmarks.engine import live_mix
    from tests.engine import cpu_worker

    cpu_worker.allow_many(patch)
    yield live_mix
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = tiny_model.TinySpec(hidden=128, layers=2)
    return str(tiny_model.build(tmp_path_factory.mktemp("live") / "tiny", spec))


def test_chats_come_in_bursts_and_are_the_same_for_everybody(live: Any) -> None:
    load = live.LiveLoad(7)
    calls = load.calls()
    chats = [call for call in calls if call.chat]
    assert calls == load.calls()
    assert [c for c in calls if not c.chat] == live.LiveLoad(7, chats=False).calls()
    assert all((call.at_s - 8.0) % 24.0 <= 6.0 for call in chats)
    assert len({int((call.at_s - 8.0) // 24.0) for call in chats}) == load.bursts
    assert 0.0 < load.least_share() < 0.2


def test_a_step_takes_the_time_of_the_device_or_of_this_process(live: Any) -> None:
    cached = SimpleNamespace(num_computed_tokens=[9, 9], req_ids=["a", "b"])
    step = SimpleNamespace(
        scheduled_cached_reqs=cached,
        scheduled_new_reqs=(),
        num_scheduled_tokens={"a": 1, "b": 1},
        total_num_scheduled_tokens=2,
    )
    clock = live.DeviceClock()
    clock.spend(step)
    assert clock.now == pytest.approx(0.028, abs=0.02)
    before, began_s = clock.now, time.process_time()
    while time.process_time() - began_s < 0.1:
        pass
    clock.spend(step)
    assert clock.now - before >= 0.09
    clock.wait(9.0)
    assert clock.now == 9.0


def test_ours_is_on_time_on_a_real_engine_where_priorities_are_not(live: Any, model: str) -> None:
    load = live.LiveLoad(7, bursts=1)
    with live.engine(model, "priority") as engine:
        stock = engine.play(load)
    with live.engine(model, "ours") as engine:
        ours = engine.play(load)
    assert len(ours.chats) == len(stock.chats) > 5
    assert ours.interactive >= 90.0
    assert stock.interactive < 60.0
    assert ours.batch >= 0.75 * stock.batch
