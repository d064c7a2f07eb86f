"""A real engine under KV pressure writes what an undisturbed one writes, and computes little twice.

A third of the calls have structured output. n-gram speculation runs with synchronous scheduling
only, because vLLM refuses it with the other.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hexgen_vllm.engine.swap.setup import pool_size, transfer_config
from hexgen_vllm.testing.tiny_model import TinySpec, build
from tests.engine import cpu_worker
from tests.engine.patched import copy_sources, put_in_place
from tests.engine.swap.real_engine import (
    CALLS,
    LONGEST,
    SPECULATION,
    Engine,
    calls,
    fifth_of_the_load,
    running,
    swapping,
)

LOAD = calls()
BLOCKS = fifth_of_the_load(LOAD)
ENGINES = int(os.environ.get("RANDOM_REAL_ENGINES", "1"))
SCHEDULING = ("sync", "async", "ngram")
Combination = tuple[bool, str, bool]
COMBINATIONS = list(product((True, False), SCHEDULING, (True, False)))
Written = dict[str, list[int]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), TinySpec(hidden=64, layers=2))


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        cpu_worker.allow_async(patch)
        cpu_worker.allow_many(patch)
        yield


class Reference(NamedTuple):
    """What stock vLLM writes with room for everything, and the bytes of a KV block."""

    written: Written
    block_bytes: int


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    with running(model, 1000) as engine:
        engine.play(LOAD)
        assert len(engine.written) == CALLS
        config = engine.scheduler.kv_cache_config
        return Reference(engine.written, pool_size(engine.vllm_config, config, 1.0).block_bytes)


@pytest.fixture(scope="module")
def undisturbed(reference: Reference) -> Written:
    return reference.written


def arguments(combination: Combination) -> dict[str, Any]:
    prefix_caching, scheduling, chunked = combination
    return {
        "enable_prefix_caching": prefix_caching,
        "async_scheduling": scheduling == "async",
        "speculative_config": SPECULATION if scheduling == "ngram" else None,
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": 64 if chunked else LONGEST,
        **swapping(),
    }


def name(combination: Combination) -> str:
    prefix_caching, scheduling, chunked = combination
    words = ("cache" if prefix_caching else "no-cache", scheduling, "chunked" if chunked else "")
    return "-".join(filter(None, words))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_tokens_are_those_of_an_undisturbed_run(
    model: Path, undisturbed: Written, combination: Combination
) -> None:
    with running(model, BLOCKS, **arguments(combination)) as engine:
        engine.play(LOAD)
        engine.assert_clean()
        stats = engine.scheduler.hexgen_stats()
    assert [n for n in undisturbed if engine.written[n] != undisturbed[n]] == []
    assert len(engine.written) == CALLS
    assert stats["preemptions"]["displaced"] > 0
    assert stats["preemptions"]["kv"] > 0
    restored, again = stats["host_kv"]["restored_tokens"], stats["recomputed_tokens"]
    assert restored > 1000
    assert again <= 0.1 * (restored + again)


def test_vllm_refuses_speculation_by_ngrams_with_asynchronous_scheduling(model: Path) -> None:
    both = arguments((True, "async", False)) | {"speculative_config": SPECULATION}
    with pytest.raises(ValueError, match="async scheduling is only supported"):
        Engine(model, BLOCKS, **both)


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_corrupted_copy_is_noticed(model: Path, undisturbed: Written, scheduling: str) -> None:
    """The negative control: wrong KV changes what is written."""
    with running(model, BLOCKS, **arguments((False, scheduling, True))) as engine:
        worker = engine.connector.worker
        assert worker is not None
        load = worker.load

        def corrupted(loads: Any) -> None:
            worker.memory.zero_()
            load(loads)

        worker.load = corrupted  # type: ignore[method-assign]
        engine.play(LOAD)
    wrong = [n for n in undisturbed if engine.written[n] != undisturbed[n]]
    assert len(wrong) > 5


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_aborts_and_resets_leave_nothing_behind(
    model: Path, undisturbed: Written, scheduling: str
) -> None:
    with running(model, BLOCKS, **arguments((True, scheduling, True))) as engine:
        aborted: set[str] = set()
        for call in LOAD:
            engine.add(call)
        copies, resets = engine.scheduler.hexgen_keeper.pool.copies, 0
        while engine.llm.has_unfinished_requests():
            engine.step()
            if copies and len(aborted) <= resets:
                victim = next(iter(copies))
                engine.llm.abort_request([victim], internal=True)
                aborted.add(victim.rsplit("-", 1)[0])
            elif copies and resets < 3:
                assert engine.core.reset_prefix_cache(reset_running_requests=True)
                assert engine.host_kv()["used_bytes"] == 0
                resets += 1
        engine.assert_clean()
        dropped = engine.host_kv()["dropped_tokens"]
    assert len(aborted) == 4
    assert dropped.keys() >= {"finished", "reset"}
    rest = [n for n in undisturbed if n not in aborted]
    assert [n for n in rest if engine.written[n] != undisturbed[n]] == []


@pytest.fixture(scope="module")
def lone(model: Path) -> Callable[[int], Written]:
    """What stock vLLM writes of a load with room for everything, by its seed."""

    @cache
    def written(seed: int) -> Written:
        with running(model, 1000) as engine:
            engine.play(calls(seed))
            return engine.written

    return written


@pytest.mark.parametrize("seed", range(ENGINES))
def test_engines_of_random_kinds_with_resets_and_sleep(
    model: Path, lone: Callable[[int], Written], seed: int
) -> None:
    """A few in every run; many: RANDOM_REAL_ENGINES=300 pytest -k random_kinds (this file)."""
    rng, which = random.Random(seed), 1 + seed % 4
    kind = arguments((rng.random() < 0.7, rng.choice(SCHEDULING), rng.random() < 0.5))
    kind |= swapping(
        host_kv_gib=rng.choice((0.001, 0.1)),
        keep_kv=rng.choice(("always", "auto", "never")),
        evict_finished_first=rng.random() < 0.7,
    )
    load, want = calls(which), lone(which)
    with running(model, fifth_of_the_load(load) + rng.randint(0, 12), **kind) as engine:
        for call in load:
            engine.add(call)
            for _ in range(rng.randint(0, 4)):
                engine.step()
        while engine.llm.has_unfinished_requests():
            engine.step()
            if rng.random() < 0.03:
                assert engine.core.reset_prefix_cache(reset_running_requests=True)
            elif rng.random() < 0.03:
                engine.core.sleep(1, mode="keep")
                for _ in range(2):
                    engine.step()
                engine.core.wake_up()
        engine.assert_clean()
    assert [n for n in want if engine.written[n] != want[n]] == []


PHASES = {(True, 1): "saved", (True, 3): "waiting", (False, 1): "loaded", (False, 3): "resumed"}
"""Of a preempted call: by whether its copy is there, and for how many steps that has been so."""


class Aborter:
    """Aborts the first call that it sees in each phase."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.aborted: dict[str, str] = {}
        self._steps: Counter[tuple[str, bool]] = Counter()

    def look(self) -> None:
        scheduler = self.engine.scheduler
        copies = scheduler.hexgen_keeper.pool.copies
        victims = {name for name, _ in self._steps} | copies.keys()
        for name in sorted(victims & scheduler.requests.keys()):
            state = (name, name in copies)
            self._steps[state] += 1
            phase = PHASES.get((state[1], self._steps[state]))
            if phase is not None and phase not in self.aborted:
                self.engine.llm.abort_request([name], internal=True)
                self.aborted[phase] = name.rsplit("-", 1)[0]


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_aborts_in_every_phase_leave_nothing_behind(
    model: Path, undisturbed: Written, scheduling: str
) -> None:
    with running(model, BLOCKS, **arguments((False, scheduling, True))) as engine:
        aborter = Aborter(engine)
        for call in LOAD:
            engine.add(call)
        while engine.llm.has_unfinished_requests():
            engine.step()
            aborter.look()
        engine.assert_clean()
    assert aborter.aborted.keys() == set(PHASES.values())
    rest = [n for n in undisturbed if n not in aborter.aborted.values()]
    assert [n for n in rest if engine.written[n] != undisturbed[n]] == []


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_full_host_pool_costs_time_only(
    model: Path, reference: Reference, scheduling: str
) -> None:
    few = arguments((True, scheduling, True)) | swapping(
        host_kv_gib=8.5 * reference.block_bytes / (1 << 30)
    )
    with running(model, BLOCKS, **few) as engine:
        engine.play(LOAD)
        engine.assert_clean()
        stats = engine.scheduler.hexgen_stats()
    kept = stats["host_kv"]
    assert kept["capacity_bytes"] == 8 * reference.block_bytes
    assert kept["dropped_tokens"].get("evicted", 0) + kept["refused_tokens"].get("full", 0) > 0
    assert stats["recomputed_tokens"] > 0
    assert engine.written == reference.written


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_patched_vllm_keeps_kv_under_its_own_scheduler(
    model: Path,
    undisturbed: Written,
    scheduling: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_place(copy_sources(tmp_path), monkeypatch)
    stock = arguments((False, scheduling, True)) | {
        "scheduler_cls": None,
        "kv_transfer_config": transfer_config(),
    }
    with running(model, BLOCKS, **stock) as engine:
        engine.play(LOAD)
        engine.step_out()
        kept = engine.scheduler.connector.planner.stats()
        assert engine.leaked_blocks() == 0
    assert engine.written == undisturbed
    assert kept["used_bytes"] == 0
    assert kept["restored_tokens"] > 1000
    assert kept["refused_tokens"] == {}


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_shutdown_with_copies_in_host_memory_ends(model: Path, scheduling: str) -> None:
    with running(model, BLOCKS, **arguments((True, scheduling, True))) as engine:
        for call in LOAD:
            engine.add(call)
        while not engine.host_kv()["copies"]:
            engine.step()
        connector = engine.connector
    assert engine.scheduler.hexgen_keeper.pool.used == 0
    assert connector.worker is not None
    assert connector.worker.memory.numel() == 0
