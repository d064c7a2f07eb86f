"""Whatever the order and whoever is displaced: every call ends, with the tokens of a lone run."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine, FakeWorker, expected, prompt

CALLS = 200
MOST_DISPLACEMENTS = 3


class Load:
    """Random calls: shared prefixes, deadlines, wrong estimates, stop tokens, aborts."""

    def __init__(self, engine: FakeEngine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.shared = prompt(self.rng, 48, 48)
        self.want: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.requests: list[Any] = []

    def add(self, name: str) -> None:
        rng = self.rng
        tokens = prompt(rng, 4, 120)
        if rng.random() < 0.3:
            tokens = self.shared + tokens
        count = rng.randint(1, 60)
        self.want[name] = want = expected(tokens, count)
        sampling: dict[str, Any] = {}
        if rng.random() < 0.15:
            sampling["stop_token_ids"] = [stop := rng.choice(want)]
            del want[want.index(stop) + 1 :]
        request = self.engine.add(
            name, tokens, count, self.meta(count), sampling, priority=rng.randint(-2, 2)
        )
        self.requests.append(request)

    def meta(self, count: int) -> CallMeta:
        rng = self.rng
        return CallMeta(
            workflow_deadline_ms=rng.choice([None, 50.0, 400.0, 1500.0, 5000.0, 30000.0]),
            tail_ms=rng.choice([None, 0.0, 300.0, 2000.0]),
            expected_output_tokens=rng.choice([None, count, 1, 500]),
            background=rng.random() < 0.1 or None,
        )

    def abort_one(self) -> None:
        alive = sorted(self.engine.scheduler.requests)
        if alive:
            name = self.rng.choice(alive)
            self.aborted.add(name)
            self.engine.abort(name)

    def play(self) -> None:
        for i in range(CALLS):
            self.add(f"r{i}")
            if i > 8:
                self.engine.steps(self.rng.randint(0, 4))
            if self.rng.random() < 0.05:
                self.abort_one()
        self.engine.run()

    def check(self) -> None:
        self.engine.assert_clean()
        assert sorted(self.engine.ended) == sorted(self.want)
        got = self.engine.tokens
        assert [n for n in self.want if n not in self.aborted and got[n] != self.want[n]] == []
        for name in self.aborted:
            assert got[name] == self.want[name][: len(got[name])]


STOCK: list[tuple[type, dict[str, Any]]] = [
    (Scheduler, {}),
    (Scheduler, {"pipeline": 2}),
    (AsyncScheduler, {"async_scheduling": True}),
]


@pytest.mark.parametrize(("scheduler_class", "setup"), STOCK)
def test_stock_vllm_passes_the_same_test(
    build: Build, scheduler_class: type, setup: dict[str, Any]
) -> None:
    load = Load(build(scheduler_class, blocks=24, **setup), seed=0)
    load.play()
    load.check()


SETUPS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "sync-no-prefix-cache": {"prefix_caching": False},
    "async-no-prefix-cache": {"async_scheduling": True, "prefix_caching": False},
    "sync-v2-runner": {"v2_runner": True},
    "async-v2-runner": {"async_scheduling": True, "v2_runner": True},
    "async-policy-priority": {"async_scheduling": True, "policy": "priority"},
    "pipeline": {"pipeline": 2},
    "long-pipeline": {"pipeline": 4, "prefix_caching": False},
    "pipeline-small-budget": {"pipeline": 2, "max_batched_tokens": 48},
    "async-pipeline": {"pipeline": 2, "async_scheduling": True, "v2_runner": True},
    "small-budget": {"async_scheduling": True, "max_batched_tokens": 48},
    "roomy": {"async_scheduling": True, "blocks": 120, "max_num_seqs": 4},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SETUPS)
def test_tokens_are_those_of_a_lone_run(build: Build, name: str, seed: int) -> None:
    engine = build(**{"blocks": 24, **SETUPS[name]})
    load = Load(engine, seed)
    load.play()
    load.check()
    assert engine.displaced() > 0
    # What has no deadline, or cannot be on time any more, gives way without a bound.
    calls = [request.hexgen for request in load.requests if request.hexgen.has_deadline]
    assert max((call.displacements for call in calls), default=0) <= MOST_DISPLACEMENTS


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("order", ["paper", "edf", "fcfs"])
def test_every_order_is_exact(build: Build, order: str, async_scheduling: bool) -> None:
    engine = build(blocks=24, async_scheduling=async_scheduling, hexgen={"order": order})
    load = Load(engine, seed=2)
    load.play()
    load.check()


def test_the_same_calls_give_the_same_run(build: Build) -> None:
    runs = []
    for _ in range(2):
        engine = build(blocks=24, async_scheduling=True)
        Load(engine, seed=3).play()
        runs.append((engine.ended, engine.clock.now, engine.scheduler.hexgen_stats()))
    assert runs[0] == runs[1]


class StaleWorker(FakeWorker):
    """Goes on with the blocks that a preempted call had before."""

    def _take_in(self, output: Any) -> None:
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        before = {i: self.sequences[i].blocks for i in resumed}
        super()._take_in(output)
        for i, blocks in before.items():
            now = self.sequences[i].blocks
            self.sequences[i].blocks = blocks[: len(now)] + now[len(blocks) :]


def test_the_harness_sees_wrong_kv(build: Build) -> None:
    engine = build(blocks=24)
    engine.worker = StaleWorker(24, engine.setup.block_size)
    Load(engine, seed=0).play()
    assert len(engine.worker.errors) > 50
