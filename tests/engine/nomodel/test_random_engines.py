"""Engines of random kinds under random loads write what lone runs write. A few in every run; many:

RANDOM_ENGINES=300 python -m pytest --timeout=600 tests/engine/nomodel/test_random_engines.py
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.harness import chain, expected, next_token
from tests.engine.nomodel.swap_harness import SwapEngine, SwapWorkerDouble
from tests.engine.nomodel.test_mix import warm
from tests.engine.nomodel.test_pausing import Mixture

ENGINES = int(os.environ.get("RANDOM_ENGINES", "6"))
CALLS = 24


class DraftingWorker(SwapWorkerDouble):
    """Checks drafted tokens in the step that computes them, and drafts two in three right."""

    accepted = rejected = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rng = random.Random(self.blocks)

    def execute(self, output: Any) -> ModelRunnerOutput:
        self.drafts = output.scheduled_spec_decode_tokens
        return super().execute(output)

    def _run(self, request_id: str, count: int) -> list[int]:
        drafts = self.drafts.get(request_id, [])
        sequence = self.sequences[request_id]
        known = len(sequence.tokens)
        sequence.tokens += drafts
        first = super()._run(request_id, count)  # what follows if all of them were right
        if not drafts:
            return first
        del sequence.tokens[known:]
        kv = self.weights
        for position, token in enumerate(sequence.tokens):
            kv = chain(kv, position, token)
        written = [next_token(kv)]
        for draft in drafts:
            if draft != written[-1]:
                self.rejected += 1
                break
            self.accepted += 1
            kv = chain(kv, known + len(written) - 1, draft)
            written.append(next_token(kv))
        sequence.tokens += written
        return written

    def draft(self, count: int) -> DraftTokenIds:
        """Draft up to ``count`` tokens for every call."""
        ids, drafts = list(self.sequences), []
        for sequence in self.sequences.values():
            kv, made = self.weights, list[int]()
            for position, token in enumerate(sequence.tokens):
                kv = chain(kv, position, token)
            for _ in range(self.rng.randint(0, count)):
                right = self.rng.random() < 0.67
                made.append(next_token(kv) if right else self.rng.randrange(2, 900))
                kv = chain(kv, len(sequence.tokens) + len(made) - 1, made[-1])
            drafts.append(made)
        return DraftTokenIds(ids, drafts)


class DraftingEngine(SwapEngine):
    """Speculates as an engine core without asynchronous scheduling does."""

    DRAFTS = 3

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.scheduler.num_spec_tokens = self.DRAFTS
        connector = self.worker.connector
        self.worker = DraftingWorker(self.setup.blocks, self.setup.block_size)
        self.worker.attach(connector)

    def take_output(self) -> None:
        super().take_output()
        self.scheduler.update_draft_token_ids(self.worker.draft(self.DRAFTS))


class Everything(Mixture):
    """Calls of workflows, some of which end, and where there are no sessions, sleep."""

    def play(self, calls: int) -> None:
        add, rng = self.engine.add, self.rng

        def of_workflow(
            name: str,
            tokens: list[int],
            most: int,
            meta: CallMeta | None = None,
            *args: Any,
            **more: Any,
        ) -> Any:
            if name.startswith("r") and rng.random() < 0.7:
                meta = meta or CallMeta()
                meta.workflow_id, meta.workflow_final = f"w{rng.randrange(9)}", rng.random() < 0.3
            return add(name, tokens, most, meta, *args, **more)

        self.engine.add = of_workflow  # type: ignore[method-assign]
        super().play(calls)

    def _whole(self, name: str) -> bool:
        request = self.engine.scheduler.requests[name]
        drafts = isinstance(self.engine, DraftingEngine)
        return drafts and request.num_computed_tokens >= request.num_tokens

    def _pause(self) -> None:
        scheduler = self.engine.scheduler
        if self.sessions or self.rng.random() < 0.5:
            super()._pause()
            return
        scheduler.set_pause_state(PauseState.PAUSED_ALL)
        assert scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        self.engine.steps(3)
        scheduler.set_pause_state(PauseState.UNPAUSED)


def drawn(seed: int) -> dict[str, Any]:
    """Return an engine; whether it drafts is ``drafts``."""
    rng = random.Random(seed)
    drafts = rng.random() < 0.4
    overlaps = not drafts and rng.random() < 0.6
    return {
        "drafts": drafts,
        "blocks": rng.choice((45, 60, 90)),
        "max_num_seqs": rng.choice((4, 8, 12)),
        "max_batched_tokens": rng.choice((48, 128, 256)),
        "prefix_caching": rng.random() < 0.75,
        "async_scheduling": overlaps,
        "v2_runner": overlaps and rng.random() < 0.5,
        "beside": not drafts and rng.random() < 0.4,
        "host_blocks": rng.choice((2, 12, 60, 400)),
        "policy": rng.choice(("fcfs", "priority")),
        "hexgen": {
            "keep_kv": rng.choice(("always", "auto", "never")),
            "keep_ended_kv": rng.random() < 0.75,
            "evict_finished_first": rng.random() < 0.75,
            "order": rng.choice(("due", "slack", "edf", "paper", "fcfs")),
        },
    }


def played(folder: Path, seed: int) -> tuple[SwapEngine, Everything]:
    kind = drawn(seed)
    engine = (DraftingEngine if kind.pop("drafts") else SwapEngine)(folder, **kind)
    warm(engine)
    load = Everything(engine, seed)
    return engine, load


@pytest.mark.parametrize("seed", range(ENGINES))
def test_tokens_are_those_of_lone_runs(folder: Path, seed: int) -> None:
    _, load = played(folder, seed)
    load.play(CALLS)
    load.check()


def test_among_them_are_all_kinds() -> None:
    """What the numbers above are worth: of 300 engines, each kind has at least 80."""
    kinds = [drawn(seed) for seed in range(300)]
    for name in ("drafts", "prefix_caching", "async_scheduling", "v2_runner", "beside"):
        assert 60 < sum(kind[name] for kind in kinds) < 260, name


def test_drafts_are_accepted_and_rejected(folder: Path) -> None:
    engine = DraftingEngine(folder, blocks=60)
    load = Everything(engine, 1)
    load.play(CALLS)
    load.check()
    worker = engine.worker
    assert isinstance(worker, DraftingWorker)
    assert min(worker.accepted, worker.rejected) > 50


class Sure(random.Random):
    """Drafts as much as it may, and right."""

    def randint(self, a: int, b: int) -> int:
        return b

    def random(self) -> float:
        return 0.0


def test_the_end_of_a_turn_within_accepted_drafts_is_no_kv_of_the_next(folder: Path) -> None:
    engine = DraftingEngine(folder, blocks=60)
    assert isinstance(engine.worker, DraftingWorker)
    engine.worker.rng = Sure()
    first, second = [7] * 20, [9] * 20
    request = engine.add("session", first, 3, resumable=True)
    engine.run()
    out = expected(first, 3)
    # From 0.33 on, no more is drafted than a turn may write; then its last token is dropped.
    kept = out if request.num_computed_tokens >= request.num_tokens else out[:-1]
    engine.add("session", second, 3, resumable=True)
    engine.run()
    assert engine.worker.errors == []
    assert engine.tokens["session"] == out + expected(first + kept + second, 3)


def test_a_corrupted_copy_is_noticed(folder: Path) -> None:
    """The negative control: each engine that loads a copy reads what was made wrong."""
    noticed = 0
    for seed in [s for s in range(40) if drawn(s)["hexgen"]["keep_kv"] == "always"][:6]:
        engine, load = played(folder, seed)
        restore = engine.worker.swap.load

        def corrupted(loads: Any, engine: SwapEngine = engine, restore: Any = restore) -> None:
            engine.worker.swap.memory[:] = 7
            restore(loads)

        engine.worker.swap.load = corrupted  # type: ignore[method-assign]
        with contextlib.suppress(AssertionError):
            load.play(CALLS)
        kept = engine.host_kv()
        assert bool(engine.worker.errors) == bool(kept["restored_tokens"] + kept["found_tokens"])
        noticed += bool(engine.worker.errors)
    assert noticed >= 3
