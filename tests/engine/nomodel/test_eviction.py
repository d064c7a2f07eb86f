"""KV that only finished workflows have used is evicted first; all other as in stock vLLM."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, prompt
from tests.engine.nomodel.test_exact import Load

BLOCKS = 41  # one of them vLLM's own; a call of PROMPT takes 16 of 16 tokens
PROMPT = 250
OFF = {"evict_finished_first": False}


def send(engine: FakeEngine, name: str, tokens: list[int], *, final: bool = False) -> int:
    """Play a call to its end, or abort it if it is called so; return its computed tokens."""
    workflow, before = name.partition(".")[0], engine.worker.computed_tokens
    meta = CallMeta(
        workflow_id=None if workflow == "lone" else workflow, workflow_final=final or None
    )
    engine.add(name, tokens, 4, meta)
    if "aborted" in name:
        engine.steps(3)
        engine.abort(name)
    engine.run()
    return engine.worker.computed_tokens - before


def texts(count: int, length: int = PROMPT) -> list[list[int]]:
    rng = random.Random(7)
    return [prompt(rng, length, length) for _ in range(count)]


@pytest.mark.parametrize("how", ["ended", "not said", "aborted", "switched off"])
def test_what_is_open_outlives_what_is_finished(build: Build, how: str) -> None:
    engine = build(blocks=BLOCKS, hexgen=OFF if how == "switched off" else {})
    first, second, third = texts(3)
    send(engine, "open.1", first)
    send(engine, f"done.{how}", second, final=how != "not said")
    send(engine, "third.1", third)  # takes what is free of cached blocks, and eight more
    again = send(engine, "open.2", first)
    assert (again < 20) == (how == "ended"), again
    let_go = engine.scheduler.hexgen_stats()["let_go_blocks"]
    assert let_go == (15 if how == "ended" else 0)
    engine.assert_clean()


def test_all_calls_of_a_finished_workflow_go_and_the_end_of_a_text_first(build: Build) -> None:
    engine = build(blocks=BLOCKS + 20)
    first, second, third = texts(3)
    send(engine, "open.1", first)
    send(engine, "done.1", second[:160])
    send(engine, "done.2", third[:160], final=True)
    send(engine, "third.1", texts(4)[3] + texts(5)[4])  # 32 blocks: 25 that are free, 7 of done's
    assert send(engine, "open.2", first) < 20
    assert send(engine, "done.3", second[:161]) < 20, "what was used last is evicted first"
    engine.assert_clean()


@pytest.mark.parametrize("other", ["second.1", "lone.1"])
@pytest.mark.parametrize("waits", [False, True])
def test_a_prompt_that_others_share_stays(build: Build, other: str, waits: bool) -> None:
    engine = build(blocks=BLOCKS, max_num_seqs=1)
    shared, rest = texts(2)
    if waits:  # the other comes before the workflow is over, and has computed nothing yet
        engine.add("done.1", shared, 4, CallMeta(workflow_id="done", workflow_final=True))
        engine.steps(3)
        assert send(engine, other, [*shared, 5]) < 30
    else:
        send(engine, other, [*shared, 5])
        send(engine, "done.1", shared, final=True)
    assert engine.scheduler.hexgen_stats()["let_go_blocks"] <= 1
    assert send(engine, "third.1", rest) > PROMPT
    assert send(engine, other + "b", [*shared, 5]) < 20
    engine.assert_clean()


def test_a_lone_call_that_says_that_nothing_follows_goes_first(build: Build) -> None:
    engine = build(blocks=BLOCKS)
    first, second, third = texts(3)
    send(engine, "open.1", first)
    send(engine, "lone.1", second, final=True)
    send(engine, "third.1", third)
    assert send(engine, "open.2", first) < 20


class Flows(Load):
    """Random calls, each of one of a few workflows, some of which it ends."""

    def meta(self, count: int) -> CallMeta:
        meta = super().meta(count)
        meta.workflow_id = f"w{self.rng.randrange(12)}"
        meta.workflow_final = self.rng.random() < 0.4 or None
        return meta


SETUPS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "async-v2-runner": {"async_scheduling": True, "v2_runner": True},
    "pipeline": {"pipeline": 2},
    "small-budget": {"async_scheduling": True, "max_batched_tokens": 48},
    "no-prefix-cache": {"prefix_caching": False},
}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETUPS)))
def test_tokens_are_those_of_a_lone_run_and_no_block_is_lost(
    build: Build, name: str, seed: int
) -> None:
    engine = build(**{"blocks": 40, **SETUPS[name]})
    load = Flows(engine, seed)
    load.play()
    load.check()
    assert (engine.scheduler.hexgen_stats()["let_go_blocks"] > 50) == (name != "no-prefix-cache")


def test_calls_that_say_nothing_are_evicted_as_in_stock_vllm(build: Build) -> None:
    """The order of the line itself, after the same random calls."""
    lines = []
    for hexgen in ({}, OFF):
        engine = build(blocks=60, hexgen=hexgen)
        load = Load(engine, 4)
        load.play()
        queue = engine.scheduler.kv_cache_manager.block_pool.free_block_queue
        lines.append([block.block_id for block in queue.get_all_free_blocks()])
    assert lines[0] == lines[1]
