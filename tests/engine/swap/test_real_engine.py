"""A real engine under KV pressure writes what an undisturbed one writes, and computes little twice.

A third of the calls have structured output. n-gram speculation runs with synchronous scheduling
only, because vLLM refuses it with the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.engine.tiny_model import TinySpec, build
from tests.engine.swap import async_on_cpu
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
        async_on_cpu.allow(patch)
        async_on_cpu.register_once(patch)
        yield


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> Written:
    """What stock vLLM writes with room for everything."""
    with running(model, 1000) as engine:
        engine.play(LOAD)
        assert len(engine.written) == CALLS
        return engine.written


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
