"""What ended calls leave is found by whoever comes with that prefix, and it is the right KV."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

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


def wrong(engine: SwapEngine, talks: list[Talk]) -> list[str]:
    return [n for t in talks for n, tokens in t.wanted.items() if engine.tokens[n] != tokens]


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETUPS)))
def test_workflows_go_on_from_what_they_left(folder: Path, name: str, seed: int) -> None:
    engine = SwapEngine(folder, **{"blocks": 40, **SETUPS[name]})
    talks = [Talk(f"w{i}", 100 * seed + i) for i in range(8)]
    play(engine, talks)
    assert wrong(engine, talks) == []
    found = engine.host_kv()
    assert found["found_tokens"] > (100 if name == "small-pool" else 1000)
    assert found["kept_bytes"] == 0, "all workflows said that they are over"
    engine.assert_clean()


def test_wrong_bytes_would_be_noticed(folder: Path) -> None:
    engine = SwapEngine(folder, blocks=40)
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


def test_a_crowd_is_kept_although_one_after_another_needed_no_copies(folder: Path) -> None:
    computed = []
    for alone in (0, 15):
        engine = SwapEngine(folder, blocks=40, hexgen={"keep_kv": "auto"})
        for i in range(alone):
            play(engine, [Talk(f"alone{i}", 50 + i)])
        assert (engine.host_kv()["return_survival"] > 0.8) == bool(alone)
        before, talks = engine.worker.computed_tokens, [Talk(f"w{i}", i) for i in range(6)]
        play(engine, talks)
        assert wrong(engine, talks) == []
        computed.append(engine.worker.computed_tokens - before)
    assert computed[1] < 1.1 * computed[0]


def test_lone_calls_are_learned(folder: Path) -> None:
    engine = SwapEngine(folder, blocks=40)
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
    assert EngineOptions().keep_ended_kv


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
    engine = SwapEngine(folder, blocks=40)
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
    engine = SwapEngine(folder, blocks=40)
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
    engine = SwapEngine(folder, blocks=40)
    first, _ = two(engine)
    assert engine.scheduler.reset_prefix_cache()
    assert engine.host_kv()["kept_bytes"] == engine.host_kv()["used_bytes"] == 0
    first.call(engine)
    while engine.busy():
        engine.step()
    assert engine.host_kv()["found_tokens"] == 0
    assert wrong(engine, [first]) == []


def test_an_aborted_call_leaves_nothing(folder: Path) -> None:
    engine = SwapEngine(folder, blocks=40)
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
    engine = SwapEngine(folder, blocks=40)
    request = engine.add("r", [1, 2, 3], 5, sampling={"extra_args": extra})
    assert request.hexgen.plans == plans


def test_hints_for_the_kv_are_read(folder: Path) -> None:
    engine = SwapEngine(folder, blocks=40)
    request = engine.add("r", [1, 2, 3], 5)
    action = SimpleNamespace(payload={"kv_retention_ttl_seconds": 60})
    request.kv_hints = SimpleNamespace(actions=[action, SimpleNamespace(payload=None)])
    engine.scheduler.hexgen_book.open(request, 1000.0)
    assert request.hexgen.plans == Plans(keep_s=60.0)


def test_hashes_of_smaller_pieces_than_blocks_are_left_alone(folder: Path) -> None:
    """Taken for hashes of blocks, they would name the wrong ones."""
    engine = SwapEngine(folder, blocks=40)
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


def test_a_full_memory_still_has_room_for_a_head_that_others_hold_too(folder: Path) -> None:
    """What ended calls left fills it sooner or later; that is no reason to copy less."""
    engine = SwapEngine(folder, max_num_seqs=2, blocks=40, host_blocks=12)
    for i in range(4):
        meta = wire.CallMeta(workflow_id=f"w{i}", workflow_deadline_ms=36e6, stages_left=1)
        engine.add(f"ended {i}", [100 + i] * 60, 4, meta)
        engine.run()
    assert engine.keeper.pool.space.free == 0
    for name in ("one", "other"):
        engine.add(
            name, [5] * 96 + [ord(name[1])] * 30, 60, wire.CallMeta(workflow_deadline_ms=30e3)
        )
        engine.steps(4)
    engine.add("urgent", [3] * 40, 12, wire.CallMeta(workflow_deadline_ms=300.0))
    engine.steps(2)
    (copy,) = engine.keeper.pool.copies.values()
    assert (copy.first_block, copy.shared_blocks) == (0, 6)
    engine.run()
    engine.assert_clean()


BESIDE = {name: setup for name, setup in SETUPS.items() if "beside" in name}


def finding(folder: Path, **options: Any) -> tuple[SwapEngine, Talk]:
    """An engine that loads, for a call that no worker has seen, what an ended one left."""
    engine = SwapEngine(folder, blocks=40, **options)
    talk = Talk("a", 1)
    talk.call(engine)
    engine.run()
    flush(engine)
    name = talk.call(engine)
    while not engine.keeper.loads_under_way():
        engine.step()
    assert engine.scheduler.requests[name].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    return engine, talk


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("done", [False, True])
def test_a_new_call_that_was_being_loaded_begins_after_a_reset(
    folder: Path, name: str, done: bool
) -> None:
    """Workers have not heard of it: taken for a preempted one, it would be resumed there."""
    engine, talk = finding(folder, **BESIDE[name])
    call = engine.scheduler.requests["a.2"]
    if done:
        engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        engine.run()
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert (call.status, call.num_computed_tokens) == (RequestStatus.WAITING, 0)
    assert engine.free_blocks() == engine.setup.blocks - 1
    engine.run()
    assert wrong(engine, [talk]) == []
    engine.assert_clean()
    assert engine.scheduler.hexgen_stats()["preemptions"]["reset"] == 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_next_input_of_a_session_outlives_a_reset(folder: Path, async_scheduling: bool) -> None:
    """It holds KV while it waits to be sent, and was preempted before: workers need its prompt."""
    engine = SwapEngine(folder, max_num_seqs=1, async_scheduling=async_scheduling)
    engine.add("session", [7] * 20, 30, resumable=True)
    engine.steps(8)
    engine.add("urgent", [3] * 40, 4, wire.CallMeta(workflow_deadline_ms=300.0))
    while "session" not in engine.ended:
        engine.step()
    assert engine.displaced() == 1
    said = [*[7] * 20, *engine.tokens["session"][:-1], *[9] * 20]
    engine.add("session", [9] * 20, 30, resumable=True)  # as long: up to 0.28, no turn is longer
    assert engine.scheduler.requests["session"].num_computed_tokens
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.steps(80)
    assert engine.tokens["session"][30:] == expected(said, 30)
    engine.add("session", [2], 1, resumable=False)
    engine.run()
    engine.assert_clean()


class Lives:
    """Workflows that come back, and all that may happen to an engine meanwhile."""

    def __init__(self, engine: SwapEngine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.turns = {f"w{i}": 12 for i in range(8)}
        self.contexts: dict[str, list[int]] = {flow: [] for flow in self.turns}
        self.prompts: dict[str, list[int]] = {}  # of calls under way
        self.counts: dict[str, int] = {}
        self.before: dict[str, list[int]] = {}  # what they wrote with earlier weights
        self.resets = {"at once": 0, "keep": 0, "abort": 0}
        self.caught = 0  # resets while KV was being loaded

    def play(self) -> None:
        for flow in self.turns:
            self._call(flow)
        while self.prompts:
            self.engine.step()
            self._take_ended()
            loads = self.engine.keeper.loads_under_way()
            if self.rng.random() < (0.1 if loads else 0.02):
                self.caught += loads
                self._reset()
            if self.prompts and self.rng.random() < 0.01:
                self._abort(self.rng.choice(sorted(self.prompts)))
            if self.rng.random() < 0.02:
                self.engine.scheduler.reset_prefix_cache()  # refused while anybody holds KV
        self.engine.run()

    def _call(self, flow: str) -> None:
        left = self.turns[flow] = self.turns[flow] - 1
        context = self.contexts[flow]
        if len(context) > 350:
            context.clear()  # as agents do
        context += [self.rng.randrange(1000) for _ in range(self.rng.randint(10, 50))]
        name = f"{flow}.{left}"
        self.prompts[name], self.before[name] = list(context), []
        self.counts[name] = self.rng.randint(3, 25)
        deadline = self.rng.choice([None, 300.0, 5000.0, 60_000.0])
        meta = wire.CallMeta(
            workflow_id=flow, workflow_type="life", workflow_deadline_ms=deadline, stages_left=left
        )
        self.engine.add(name, list(context), self.counts[name], meta)

    def _over(self, name: str) -> None:
        flow = name.partition(".")[0]
        del self.prompts[name]
        if self.turns[flow]:
            self._call(flow)

    def _take_ended(self) -> None:
        for name in [n for n in self.prompts if n in self.engine.ended]:
            before, got = self.before[name], self.engine.tokens[name]
            weights, left = self.engine.worker.weights, self.counts[name] - len(before)
            assert got == before + expected([*self.prompts[name], *before], left, weights=weights)
            self.contexts[name.partition(".")[0]] += got
            self._over(name)

    def _abort(self, name: str) -> None:
        self.engine.abort(name)
        self._over(name)

    def _reset(self) -> None:
        """Change the weights, as a pause that keeps or aborts what runs does, or without one."""
        engine, kind = self.engine, min(self.resets, key=lambda kind: self.resets[kind])
        self.resets[kind] += 1
        if kind != "at once":
            states = {"keep": PauseState.PAUSED_ALL, "abort": PauseState.PAUSED_NEW}
            engine.scheduler.set_pause_state(states[kind])
            if kind == "abort":
                engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
            engine.run()
            for name in list(self.prompts) if kind == "abort" else ():
                self._over(name)
        assert engine.scheduler.reset_prefix_cache(
            reset_running_requests=True, reset_connector=True
        )
        assert engine.keeper.pool.used == 0
        engine.worker.weights += 1
        self.before |= {name: list(engine.tokens[name]) for name in self.prompts}
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETUPS)))
def test_lives_with_new_weights_in_between_are_exact(folder: Path, name: str, seed: int) -> None:
    engine = SwapEngine(folder, **{"blocks": 40, **SETUPS[name]})
    lives = Lives(engine, seed)
    lives.play()
    engine.assert_clean()
    assert min(lives.resets.values()) > 0
    assert engine.host_kv()["found_tokens"] > 0
    if name in BESIDE:
        assert lives.caught > 3
