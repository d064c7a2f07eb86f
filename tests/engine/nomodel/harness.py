"""vLLM's real scheduler with a fake model whose KV cache is a chain of hashes.

The KV of a position is a hash of all tokens up to it, and the next token is a function of the last
KV. Before each step the worker checks the KV of every position that the step attends to: a block
freed too early, a token lost or computed twice, a stale block table, each shows at once.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from benchmarks.engine.headless import (
    Setup,
    block_hasher,
    build_scheduler,
    make_request,
)
from hexgen_vllm import wire

PRIME = (1 << 61) - 1


def chain(before: int, position: int, token: int) -> int:
    return (before * 1_000_003 + position * 7_919 + token * 104_729 + 12_345) % PRIME


def next_token(kv: int) -> int:
    return 2 + kv % 997


def expected(prompt: list[int], count: int, weights: int = 0) -> list[int]:
    """The tokens that an undisturbed run writes."""
    kv = weights
    for position, token in enumerate(prompt):
        kv = chain(kv, position, token)
    out: list[int] = []
    for _ in range(count):
        out.append(next_token(kv))
        kv = chain(kv, len(prompt) + len(out) - 1, out[-1])
    return out


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    computed: int
    prompt: int

    def write(self, output: list[int]) -> None:
        """Have ``output`` follow the prompt: all that Model Runner V1 takes of a resumed call."""
        self.tokens[self.prompt :] = output


@dataclass
class FakeWorker:
    """What a GPU worker would hold: block tables, tokens, and the KV cache itself.

    ``weights`` may change between steps: KV from before is wrong from then on.
    """

    blocks: int
    block_size: int
    told_tokens: bool = False  # what was sampled comes back from the scheduler: it is not kept here
    weights: int = 0
    errors: list[str] = field(default_factory=list)
    computed_tokens: int = 0

    def __post_init__(self) -> None:
        self.kv = [0] * (self.blocks * self.block_size)
        self.sequences: dict[str, Sequence] = {}

    def slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.blocks[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def execute(self, output: Any) -> ModelRunnerOutput:
        self._take_in(output)
        ids = list(output.num_scheduled_tokens)
        sampled = [self._run(i, n) for i, n in output.num_scheduled_tokens.items()]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _take_in(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self.sequences.pop(request_id, None)
        for new in output.scheduled_new_reqs:  # Model Runner V2 sends resumed ones here, too
            tokens = list(getattr(new, "prefill_token_ids", None) or new.prompt_token_ids)
            blocks = list(new.block_ids[0])
            prompt = len(new.prompt_token_ids)
            self.sequences[new.req_id] = Sequence(tokens, blocks, new.num_computed_tokens, prompt)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            sequence, blocks = self.sequences[request_id], cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                sequence.blocks = list(blocks[0])
                if request_id in cached.all_token_ids:
                    tokens, written = cached.all_token_ids[request_id], cached.num_output_tokens[i]
                    sequence.write(tokens[len(tokens) - written :])
            elif blocks is not None:
                sequence.blocks += blocks[0]
            sequence.computed = cached.num_computed_tokens[i]
            if self.told_tokens:
                told = cached.new_token_ids[i]
                sequence.tokens += told[len(sequence.tokens) - sequence.computed :]

    def _run(self, request_id: str, count: int) -> list[int]:
        sequence = self.sequences[request_id]
        self.computed_tokens += count
        kv, start = self.weights, sequence.computed
        for position in range(start):
            kv = chain(kv, position, sequence.tokens[position])
            if self.kv[self.slot(sequence, position)] != kv:
                self.errors.append(f"{request_id}: KV of position {position} of {start} is wrong")
                break
        if start + count > len(sequence.tokens):
            self.errors.append(f"{request_id}: position {start + count} has no token yet")
            return []
        for position in range(start, start + count):
            kv = chain(kv, position, sequence.tokens[position])
            self.kv[self.slot(sequence, position)] = kv
        if start + count < len(sequence.tokens):
            return []
        if not self.told_tokens:
            sequence.tokens.append(next_token(kv))
        return [next_token(kv)]


class Clock:
    """Virtual time of a device: 5 ms a step, 0.5 ms a sequence, 8,000 prompt tokens a second."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, output: Any) -> None:
        counts = output.num_scheduled_tokens.values()
        prefill = sum(n for n in counts if n > 1)
        self.now += 0.005 + 0.0005 * len(counts) + prefill / 8000


class FakeEngine:
    """Steps a scheduler as vLLM's engine core does, one or two steps in flight.

    Time is virtual: it passes with each step, and the same calls give the same run.
    """

    def __init__(self, scheduler_class: type, folder: Path, setup: Setup) -> None:
        self.setup = setup
        self.clock = Clock()
        self.scheduler = build_scheduler(scheduler_class, folder, setup)
        self.scheduler.hexgen_clock = self.clock
        told = setup.pipeline > 1 and not setup.async_scheduling
        self.worker = FakeWorker(setup.blocks, setup.block_size, told)
        self.hasher = block_hasher(setup.block_size)
        self.depth = setup.pipeline + setup.async_scheduling
        self.in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        meta: wire.CallMeta | None = None,
        sampling: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        """Add a call; ``sampling`` goes to its SamplingParams, ``changes`` to the Request."""
        params = dict(sampling or {})
        if meta is not None:
            params["extra_args"] = wire.to_xargs(meta)
        # Before the epoch of the wall clock: the call counts as having arrived now.
        changes.setdefault("arrival_time", 0.0)
        request = make_request(
            request_id, prompt, max_tokens, self.hasher, sampling=params, **changes
        )
        self.tokens.setdefault(request_id, [])
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.ended.append(request_id)

    def busy(self) -> bool:
        return bool(self.scheduler.has_requests() or self.in_flight)

    def step(self) -> None:
        """Schedule and execute one step; take in the oldest output once enough are in flight."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append((output, self.worker.execute(output)))
            if len(self.in_flight) < self.depth and output.total_num_scheduled_tokens:
                return
        if self.in_flight:
            self.take_output()

    def take_output(self) -> None:
        output, result = self.in_flight.popleft()
        self.clock.spend(output)
        for batch in self.scheduler.update_from_output(output, result).values():
            for one in batch.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.ended.append(one.request_id)

    def run(self, most_steps: int = 100_000) -> None:
        """Step until nothing is left."""
        for _ in range(most_steps):
            if not self.busy():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def ids(self, queue: Any) -> list[str]:
        return [request.request_id for request in queue]

    def running(self) -> list[str]:
        return self.ids(self.scheduler.running)

    def waiting(self) -> list[str]:
        return self.ids(self.scheduler.waiting)

    def displaced(self) -> int:
        return int(self.scheduler.hexgen_counters.preemptions["displaced"])

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def assert_clean(self) -> None:
        """Nothing wrong was read, nothing is left, every block is free."""
        assert not self.worker.errors, self.worker.errors[:3]
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.free_blocks() == self.setup.blocks - 1


def prompt(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(2, 900) for _ in range(rng.randint(least, most))]
