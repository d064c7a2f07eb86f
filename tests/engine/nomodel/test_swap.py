"""With KV kept in host memory every call still ends with the tokens of a lone run, and cheaper."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.nomodel.harness import FakeEngine
from tests.engine.nomodel.swap_harness import SwapEngine
from tests.engine.nomodel.test_exact import Load

SETUPS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "sync-no-prefix-cache": {"prefix_caching": False},
    "async-no-prefix-cache": {"async_scheduling": True, "prefix_caching": False},
    "sync-v2-runner": {"v2_runner": True},
    "async-v2-runner": {"async_scheduling": True, "v2_runner": True},
    "async-policy-priority": {"async_scheduling": True, "policy": "priority"},
    "small-budget": {"async_scheduling": True, "max_batched_tokens": 48},
    "by-rates": {"async_scheduling": True, "hexgen": {"keep_kv": "auto"}},
    "beside": {"beside": True},
    "beside-async": {"beside": True, "async_scheduling": True},
    "beside-async-v2-runner": {"beside": True, "async_scheduling": True, "v2_runner": True},
    "beside-no-prefix-cache": {
        "beside": True,
        "async_scheduling": True,
        "prefix_caching": False,
    },
}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETUPS)))
def test_tokens_are_exact_and_hardly_any_is_computed_again(
    folder: Path, name: str, seed: int
) -> None:
    engine = SwapEngine(folder, **SETUPS[name])
    load = Load(engine, seed)
    load.play()
    load.check()
    kept = engine.host_kv()
    assert engine.displaced() > 0
    assert kept["saved_tokens"] > 1000
    assert kept["refused_tokens"].keys() <= ({"slower"} if name == "by-rates" else set())
    assert engine.recomputed() <= 0.1 * (engine.recomputed() + kept["restored_tokens"])


def test_without_it_the_same_load_is_computed_again(folder: Path) -> None:
    """What the limit above is a share of: it would not hold by itself."""
    found = []
    for keep in ("always", "never"):
        engine = SwapEngine(folder, async_scheduling=True, hexgen={"keep_kv": keep})
        Load(engine, 0).play()
        found.append(engine.recomputed())
    assert found[0] < 0.1 * found[1]


@pytest.mark.parametrize(
    ("setup", "host_blocks"),
    [
        ("async", 1),
        ("sync", 5),
        ("async", 5),
        ("beside-async", 5),
        ("async-no-prefix-cache", 5),
        ("sync", 15),
        ("beside-async", 15),
    ],
)
def test_a_full_pool_is_exact_and_stays_in_its_bounds(
    folder: Path, setup: str, host_blocks: int
) -> None:
    engine = SwapEngine(folder, host_blocks=host_blocks, **SETUPS[setup])
    put, most = engine.keeper.pool.put, 0

    def counted(*args: Any) -> Any:
        nonlocal most
        evicted = put(*args)
        most = max(most, engine.keeper.pool.used)
        return evicted

    engine.keeper.pool.put = counted
    load = Load(engine, 3)
    load.play()
    load.check()
    kept = engine.host_kv()
    assert kept["refused_tokens"]["full"] > 0
    assert host_blocks < 15 or kept["dropped_tokens"]["evicted"] > 0
    assert 0 < most <= host_blocks


@pytest.mark.parametrize("name", ["sync", "beside-async", "async-no-prefix-cache"])
def test_a_corrupted_copy_is_noticed(folder: Path, name: str) -> None:
    """The negative control: were restored KV never read, everything above would prove nothing."""
    engine = SwapEngine(folder, **SETUPS[name])
    load = engine.worker.swap.load

    def corrupted(loads: Any) -> None:
        engine.worker.swap.memory[:] = 7
        load(loads)

    engine.worker.swap.load = corrupted  # type: ignore[method-assign]
    played = Load(engine, 0)
    played.play()
    assert len(engine.worker.errors) > 20
    wrong = [n for n in played.want if engine.tokens[n] != played.want[n]]
    assert len(wrong) > 10


def test_one_wrong_byte_is_noticed(folder: Path) -> None:
    engine = SwapEngine(folder, prefix_caching=False)
    save, saves = engine.worker.swap.save, 0

    def corrupted(planned: Any) -> None:
        nonlocal saves
        save(planned)
        if planned and not saves:
            first = planned[0].extents[0].first
            engine.worker.swap.memory[first * 128] ^= 1
        saves += len(planned)

    engine.worker.swap.save = corrupted  # type: ignore[method-assign]
    Load(engine, 0).play()
    assert engine.worker.errors


def test_random_resets_and_aborts_leave_nothing_behind(folder: Path) -> None:
    engine = SwapEngine(folder, async_scheduling=True)
    load, rng = Load(engine, 5), random.Random(5)
    for i in range(120):
        load.add(f"r{i}")
        engine.steps(rng.randint(0, 4))
        if rng.random() < 0.3:
            load.abort_one()
        if rng.random() < 0.1:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            assert engine.keeper.pool.used == 0
    engine.run()
    load.check()
    assert engine.host_kv()["dropped_tokens"].keys() >= {"reset", "finished"}


def test_never_keeps_nothing(folder: Path) -> None:
    engine = SwapEngine(folder, hexgen={"keep_kv": "never"})
    load = Load(engine, 0)
    load.play()
    load.check()
    kept = engine.host_kv()
    assert kept["saved_tokens"] == 0
    assert kept["refused_tokens"].keys() == {"never"}


def test_an_engine_without_it_says_so(folder: Path, build: Any) -> None:
    engine: FakeEngine = build(blocks=24)
    assert engine.scheduler.hexgen_stats()["host_kv"] is None
