"""Our patch for vLLM, on the sources of the vLLM under test: it fits, goes again, and works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.engine.swap.connector import HOOK
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.patch.tree import ABSENT, APPLIED, Tree
from tests.engine.nomodel.harness import FakeEngine, expected, prompt
from tests.engine.nomodel.swap_harness import SwapEngine
from tests.engine.patched import BASE, SCHEDULER, copy_sources, put_in_place

Patched = Callable[[], None]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return copy_sources(tmp_path)


@pytest.fixture
def patched(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Patched:
    """Have vLLM patched from the call on."""
    return lambda: put_in_place(tree, monkeypatch)


def files(tree: Tree) -> dict[str, bytes]:
    folder = tree.package.parent
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def test_it_fits_and_leaves_a_way_back(tree: Tree) -> None:
    before = files(tree)
    (patch,) = tree.patches()
    assert tree.status(patch) == ABSENT
    tree.apply(patch)
    assert tree.status(patch) == APPLIED
    changed = files(tree)
    for name in (SCHEDULER, BASE):
        assert changed.pop(name + patch.suffix) == before[name]
        assert changed[name].count(f"{HOOK}(".encode()) == 1
        compile(changed[name], name, "exec")
    tree.revert(patch)
    assert files(tree) == before


@pytest.mark.parametrize("name", [SCHEDULER, BASE])
def test_a_vllm_that_was_changed_is_refused(tree: Tree, name: str) -> None:
    path, (patch,) = tree.package.parent / name, tree.patches()
    lines = [line for hunk in patch.files[name] for line in hunk.old if line.strip()]
    path.write_text(path.read_text().replace(lines[-1], "    pass\n"))
    before = files(tree)
    for change in (tree.apply, tree.revert):
        with pytest.raises(ConfigError, match=rf"patch {patch.name} does not fit .*: hunk 1"):
            change(patch)
    assert files(tree) == before


RNG = random.Random(0)
PROMPTS = [prompt(RNG, 16, 120) for _ in range(40)]
WRITES = 40
WRITTEN = {f"r{i}": expected(words, WRITES) for i, words in enumerate(PROMPTS)}


def play(engine: FakeEngine) -> FakeEngine:
    """Run calls that overflow the KV cache."""
    for i, words in enumerate(PROMPTS):
        engine.add(f"r{i}", words, WRITES)
        engine.steps(2)
    engine.run()
    engine.assert_clean()
    assert engine.tokens == WRITTEN
    return engine


MODES: tuple[dict[str, Any], ...] = (
    {},
    {"async_scheduling": True},
    {"async_scheduling": True, "beside": True, "prefix_caching": False},
    {"policy": "priority"},
    {"v2_runner": True},
)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_vllms_own_scheduler_keeps_kv(folder: Path, patched: Patched, mode: dict[str, Any]) -> None:
    patched()
    engine = SwapEngine(folder, AsyncScheduler, **mode)
    play(engine)
    kept = engine.host_kv()
    assert kept["restored_tokens"] > 200
    assert kept["restored_tokens"] + kept["cached_tokens"] == kept["saved_tokens"]
    once = sum(len(words) + WRITES - 1 for words in PROMPTS)
    assert engine.worker.computed_tokens <= once


def test_a_small_pool_is_used_by_turns(folder: Path, patched: Patched) -> None:
    patched()
    engine = SwapEngine(folder, AsyncScheduler, host_blocks=6)
    play(engine)
    assert engine.host_kv()["refused_tokens"].keys() | engine.host_kv()["dropped_tokens"].keys()


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_a_reset_drops_what_was_kept(folder: Path, patched: Patched, mode: dict[str, Any]) -> None:
    patched()
    engine = SwapEngine(folder, AsyncScheduler, **mode)
    for i, words in enumerate(PROMPTS):
        engine.add(f"r{i}", words, WRITES)
    while not engine.host_kv()["copies"]:
        engine.step()
    saved = engine.host_kv()["saved_tokens"]
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.host_kv()["copies"] == 0
    assert engine.host_kv()["saved_tokens"] == saved
    engine.run()
    engine.assert_clean()
    assert engine.tokens == WRITTEN


def test_a_session_is_computed_again(folder: Path, patched: Patched) -> None:
    patched()
    engine = SwapEngine(folder, AsyncScheduler, blocks=16)
    for i in range(3):
        engine.add(f"r{i}", [i + 2] * 60, 50, resumable=i == 2)
    while len(engine.running()) < 3:
        engine.step()
    while not engine.waiting():
        engine.step()
    assert engine.waiting() == ["r2"]
    assert engine.host_kv()["saved_tokens"] == 0


def test_our_scheduler_saves_once_on_a_patched_vllm(folder: Path, patched: Patched) -> None:
    def run() -> dict[str, Any]:
        kept = play(SwapEngine(folder, UrgencyScheduler)).host_kv()  # type: ignore[attr-defined]
        return {name: kept[name] for name in ("saved_tokens", "restored_tokens", "cached_tokens")}

    before = run()
    patched()
    assert run() == before


def test_vllms_own_scheduler_needs_the_patch(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^host_kv_gib needs --scheduler-cls .* patch apply"):
        SwapEngine(folder, AsyncScheduler)
