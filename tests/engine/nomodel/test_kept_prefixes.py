"""What ended calls leave is found by whoever comes with that prefix, and it is the right KV."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm import wire
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.returns import Plans
from tests.engine.nomodel.harness import expected
from tests.engine.nomodel.swap_harness import SwapEngine

SETUPS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "async-v2-runner": {"async_scheduling": True, "v2_runner": True},
    "small-budget": {"async_scheduling": True, "max_batched_tokens": 48},
    "beside": {"beside": True},
    "beside-async-v2-runner": {"beside": True, "async_scheduling": True, "v2_runner": True},
    "small-pool": {"async_scheduling": True, "host_blocks": 12},
}
TURNS = 4


class Talk:
    """A workflow of several turns, each with all that was said before."""

    def __init__(self, name: str, seed: int, *, first: list[int] | None = None) -> None:
        self.name, self.rng = name, random.Random(seed)
        self.context: list[int] = list(first or ())
        self.left = TURNS
        self.wanted: dict[str, list[int]] = {}

    def call(self, engine: SwapEngine, *, said: bool = True) -> str:
        self.left -= 1
        self.context += [self.rng.randrange(1000) for _ in range(self.rng.randint(20, 60))]
        writes, name = self.rng.randint(5, 40), f"{self.name}.{self.left}"
        meta = wire.CallMeta(
            workflow_id=self.name if said else None,
            workflow_type="talk" if said else None,
            stages_left=self.left if said else None,
            workflow_final=(not self.left) if said else None,
            workflow_deadline_ms=60_000.0,
        )
        self.wanted[name] = expected(self.context, writes)
        engine.add(name, self.context, writes, meta)
        self.context = self.context + self.wanted[name]
        return name


def play(engine: SwapEngine, talks: list[Talk], *, said: bool = True) -> None:
    alive = {talk.call(engine, said=said): talk for talk in talks}
    while alive:
        engine.step()
        for name in [n for n in alive if n in engine.ended]:
            talk = alive.pop(name)
            if talk.left:
                alive[talk.call(engine, said=said)] = talk
    while engine.busy():
        engine.step()


def kept(folder: Path, **options: Any) -> SwapEngine:
    """Return an engine that keeps the KV of ended calls."""
    hexgen = {"keep_ended_kv": True} | options.pop("hexgen", {})
    return SwapEngine(folder, **options, hexgen=hexgen)


def wrong(engine: SwapEngine, talks: list[Talk]) -> list[str]:
    return [n for t in talks for n, tokens in t.wanted.items() if engine.tokens[n] != tokens]


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETUPS)))
def test_workflows_go_on_from_what_they_left(folder: Path, name: str, seed: int) -> None:
    engine = kept(folder, **{"blocks": 40, **SETUPS[name]})
    talks = [Talk(f"w{i}", 100 * seed + i) for i in range(8)]
    play(engine, talks)
    assert wrong(engine, talks) == []
    found = engine.host_kv()
    assert found["found_tokens"] > (100 if name == "small-pool" else 1000)
    assert found["kept_bytes"] == 0, "all workflows said that they are over"
    engine.assert_clean()


def test_wrong_bytes_would_be_noticed(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    load = engine.worker.swap.load

    def corrupted(loads: Any) -> None:
        engine.worker.swap.memory.zero_()
        load(loads)

    engine.worker.swap.load = corrupted  # type: ignore[method-assign]
    talks = [Talk(f"w{i}", i) for i in range(8)]
    alive = {talk.call(engine): talk for talk in talks}
    for _ in range(400):  # wrong tokens lead elsewhere: the talks are not played to their end
        engine.step()
        for name in [n for n in alive if n in engine.ended]:
            talk = alive.pop(name)
            if talk.left:
                alive[talk.call(engine)] = talk
    assert wrong(engine, talks)


def test_lone_calls_are_learned(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    talks = [Talk(f"w{i}", i) for i in range(8)]
    play(engine, talks, said=False)
    assert wrong(engine, talks) == []
    assert engine.host_kv()["found_tokens"] > 0


@pytest.mark.parametrize("keep", ["never", "off"])
def test_it_can_be_switched_off(folder: Path, keep: str) -> None:
    hexgen = {"keep_kv": "never"} if keep == "never" else {"keep_ended_kv": False}
    engine = SwapEngine(folder, blocks=40, hexgen=hexgen)
    talks = [Talk(f"w{i}", i) for i in range(8)]
    play(engine, talks)
    assert wrong(engine, talks) == []
    assert engine.host_kv()["found_tokens"] == 0
    assert not EngineOptions().keep_ended_kv


def two(engine: SwapEngine) -> tuple[Talk, Talk]:
    """Two workflows whose first turns begin with the same 64 tokens, each played once."""
    shared = [7] * 64
    talks = Talk("a", 1, first=shared), Talk("b", 2, first=shared)
    for talk in talks:
        talk.call(engine)
        while engine.busy():
            engine.step()
    return talks


def flush(engine: SwapEngine) -> None:
    """Have other calls take all blocks of the device."""
    for i in range(2):
        size = (engine.scheduler.kv_cache_config.num_blocks - 2) * 16
        engine.add(f"flush {i}", [500 + i] * (size - 20), 4)
        while engine.busy():
            engine.step()


def test_what_others_use_too_stays_when_a_workflow_is_over(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    first, second = two(engine)
    before = engine.host_kv()["kept_bytes"]
    first.left = 1
    first.call(engine)
    while engine.busy():
        engine.step()
    assert 0 < engine.host_kv()["kept_bytes"] < before
    flush(engine)
    before = engine.host_kv()["found_tokens"]
    second.call(engine)
    while engine.busy():
        engine.step()
    assert engine.host_kv()["found_tokens"] >= before + 64
    assert wrong(engine, [first, second]) == []


def test_a_block_that_was_not_full_is_used_as_far_as_it_is_the_same(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    talk = Talk("a", 3)
    talk.call(engine)
    while engine.busy():
        engine.step()
    tokens = len(talk.context) - 1
    assert tokens % 16 > 4
    flush(engine)
    other = [*talk.context[: tokens - 2], 999, 998, 997, 996]
    engine.add("other", other, 5)
    while engine.busy():
        engine.step()
    assert engine.tokens["other"] == expected(other, 5)
    assert engine.host_kv()["found_tokens"] == tokens - 2


def test_a_reset_forgets_it(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    first, _ = two(engine)
    assert engine.scheduler.reset_prefix_cache()
    assert engine.host_kv()["kept_bytes"] == engine.host_kv()["used_bytes"] == 0
    first.call(engine)
    while engine.busy():
        engine.step()
    assert engine.host_kv()["found_tokens"] == 0
    assert wrong(engine, [first]) == []


def test_an_aborted_call_leaves_nothing(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    talk = Talk("a", 1)
    name = talk.call(engine)
    for _ in range(4):
        engine.step()
    engine.abort(name)
    while engine.busy():
        engine.step()
    engine.assert_clean()


@pytest.mark.parametrize(
    ("extra", "plans"),
    [
        ({}, Plans()),
        ({"hexgen_stages_left": 2}, Plans(follows=True)),
        ({"hexgen_stages_left": 0}, Plans()),
        ({"hexgen_workflow_final": True, "expected_resume": 3}, Plans(follows=False)),
        ({"expected_resume": 2.5}, Plans(resume_s=2.5)),
        ({"expected_resume": "true"}, Plans(follows=True)),
        ({"agentic_context": {"expected_resume": False}}, Plans(follows=False)),
        ({"agentic_context": {"kv_retention_ttl_seconds": "300"}}, Plans(keep_s=300.0)),
        ({"kv_retention_ttl_seconds": "soon", "expected_resume": [1]}, Plans()),
        ({"kv_retention_ttl_seconds": float("nan"), "expected_resume": -1}, Plans()),
    ],
)
def test_what_follows_is_read_in_the_words_of_others(
    folder: Path, extra: dict[str, Any], plans: Plans
) -> None:
    engine = kept(folder, blocks=40)
    request = engine.add("r", [1, 2, 3], 5, sampling={"extra_args": extra})
    assert request.hexgen.plans == plans


def test_hints_for_the_kv_are_read(folder: Path) -> None:
    engine = kept(folder, blocks=40)
    request = engine.add("r", [1, 2, 3], 5)
    action = SimpleNamespace(payload={"kv_retention_ttl_seconds": 60})
    request.kv_hints = SimpleNamespace(actions=[action, SimpleNamespace(payload=None)])
    engine.scheduler.hexgen_book.open(request, 1000.0)
    assert request.hexgen.plans == Plans(keep_s=60.0)


def test_hashes_of_smaller_pieces_than_blocks_are_left_alone(folder: Path) -> None:
    """Taken for hashes of blocks, they would name the wrong ones."""
    engine = kept(folder, blocks=40)
    talk = Talk("a", 1)
    name = talk.call(engine)
    request = next(iter(engine.scheduler.requests.values()))
    while not engine.tokens[name]:
        engine.step()
    request.block_hashes = [bytes([i]) * 32 for i in range(request.num_tokens // 2)]
    request._block_hasher = None
    while engine.busy():
        engine.step()
    assert engine.host_kv()["kept_bytes"] == 0
