"""Time of vLLM's ``schedule()`` with our order and with its own, and the memory of a waiting call.

No model: a step's output is made up, one token for each call whose prompt is done. The batch is
full and the queue keeps its length: for each call that ends, a new one with a random deadline
arrives some steps later, so that queues are pushed and popped, and an urgent arrival finds the
batch full and makes room for itself. The sides take turns within each step of the benchmark, so
that a change of the machine's speed meets them all.
"""

from __future__ import annotations

import gc
import random
import statistics
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time
from typing import Any, Final

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.engine.headless import (
    Setup,
    block_hasher,
    build_scheduler,
    make_request,
)
from hexgen_vllm import wire
from hexgen_vllm.engine.scheduler import UrgencyScheduler

SIDES: Final = ("urgency", "priority", "fcfs")
_PROMPT: Final = 64
_OUTPUT: Final = (40, 360)
_DEADLINE_S: Final = (0.5, 60.0)
_PAUSE_STEPS: Final = (1, 20)
_WARM_UP: Final = 40
_BLOCK: Final = 16


@dataclass(frozen=True)
class Case:
    """One size of the benchmark."""

    waiting: int
    running: int = 256
    steps: int = 300
    seed: int = 0


@dataclass
class Side:
    """One scheduler under load, and its times in seconds."""

    name: str
    case: Case
    folder: Path
    schedule_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.case.seed)
        self._hasher = block_hasher(_BLOCK)
        self._added = self._step = 0
        self._due: Counter[int] = Counter()
        most = self.case.running * (_PROMPT + _OUTPUT[1]) // _BLOCK
        setup = Setup(
            blocks=int(1.2 * most),
            block_size=_BLOCK,
            max_num_seqs=self.case.running,
            max_batched_tokens=8192,
            async_scheduling=True,
            policy="priority" if self.name == "priority" else "fcfs",
        )
        cls = UrgencyScheduler if self.name == "urgency" else AsyncScheduler
        self.scheduler: Any = build_scheduler(cls, self.folder, setup)

    def add(self) -> None:
        """Let one call arrive."""
        rng, self._added = self._rng, self._added + 1
        deadline_s, output = rng.uniform(*_DEADLINE_S), rng.randint(*_OUTPUT)
        meta = wire.CallMeta(
            workflow_id=f"w{self._added}",
            workflow_deadline_ms=1000 * deadline_s,
            expected_output_tokens=output,
        )
        request = make_request(
            f"r{self._added}",
            [rng.randrange(2, 900) for _ in range(_PROMPT)],
            output,
            self._hasher,
            sampling={"extra_args": wire.to_xargs(meta)},
            # Ours would put it before the deadline, and has the deadline itself.
            priority=int(1000 * deadline_s) if self.name == "priority" else 0,
        )
        self.scheduler.add_request(request)

    def step(self) -> None:
        """Let due calls arrive, schedule a step, and make up its output."""
        self._step += 1
        for _ in range(self._due.pop(self._step, 0)):
            self.add()
        start = thread_time()
        output = self.scheduler.schedule()
        scheduled = thread_time()
        result = self._made_up(output)
        executed = thread_time()
        outputs = self.scheduler.update_from_output(output, result)
        self.update_s.append(thread_time() - executed)
        self.schedule_s.append(scheduled - start)
        for batch in outputs.values():
            for one in batch.outputs:
                if one.finish_reason is not None:
                    self._due[self._step + self._rng.randint(*_PAUSE_STEPS)] += 1

    def _made_up(self, output: Any) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        tokens = [[] if requests[i].is_prefill_chunk else [5] for i in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def fill(self) -> int:
        """Let all calls of the case arrive; return the bytes that a waiting one takes."""
        gc.collect()
        tracemalloc.start()
        for _ in range(self.case.waiting + self.case.running):
            self.add()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return held // (self.case.waiting + self.case.running)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Return times and memory of every side for one size."""
    sides = [Side(name, case, folder) for name in SIDES]
    memory = {side.name: side.fill() for side in sides}
    gc.collect()
    gc.freeze()  # as vLLM's engine core does when it has started
    for step in range(_WARM_UP + case.steps):
        turn = step % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            side.step()
    gc.unfreeze()
    ours = sides[0].scheduler.hexgen_stats()
    return {
        "waiting": case.waiting,
        "running": case.running,
        "schedule_us": {s.name: _microseconds(s.schedule_s) for s in sides},
        "update_us": {s.name: _microseconds(s.update_s) for s in sides},
        "bytes_per_waiting_call": memory,
        "displaced": ours["preemptions"]["displaced"],
    }


def _microseconds(times_s: Sequence[float]) -> dict[str, float]:
    kept = times_s[_WARM_UP:]
    return {
        "median": round(1e6 * statistics.median(kept), 1),
        "mean": round(1e6 * statistics.fmean(kept), 1),
    }
