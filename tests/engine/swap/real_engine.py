"""A real engine on the CPU, in this process, under a load that does not fit its KV cache."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

from hexgen_vllm.engine.swap.connector import HostKVConnector
from tests.engine.real.engines import await_grammars

BLOCK = 32  # the CPU's attention wants multiples of 32
CALLS = 36
BATCH = 12
LONGEST = 320
SHARED = 96
REGEX = r"SELECT [a-h]{5,30} FROM [a-h]{1,20}"
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Call:
    """One call of the load; every third has structured output, every third repeats itself."""

    name: str
    prompt: list[int]
    writes: int
    deadline_ms: float
    structured: bool

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.writes,
            ignore_eos=not self.structured,
            detokenize=self.structured,
            structured_outputs=StructuredOutputsParams(regex=REGEX) if self.structured else None,
            extra_args={"hexgen_workflow_deadline_ms": self.deadline_ms},
        )


def calls(seed: int = 0) -> list[Call]:
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(2, 1000) for _ in range(count)]

    shared, made = tokens(SHARED), []
    for i in range(CALLS):
        prompt = tokens(rng.randint(16, 120))
        if i % 3 == 1:
            prompt = (prompt[:12] * 20)[: len(prompt)]
        if rng.random() < 0.3:
            prompt = shared + prompt
        deadline_ms = 1500.0 if i >= BATCH and i % 2 else 300_000.0
        made.append(Call(f"r{i}", prompt, rng.randint(30, 90), deadline_ms, i % 3 == 0))
    return made


def fifth_of_the_load(load: list[Call]) -> int:
    """KV blocks for a fifth of what a full batch of the longest calls would hold at its end."""
    needs = sorted(-(-(len(c.prompt) + c.writes) // BLOCK) for c in load)[-BATCH:]
    return sum(needs) // 5 + 1


class Clock:
    """Virtual seconds: a step takes 20 ms."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """One LLMEngine and what it wrote."""

    def __init__(self, model: Path, blocks: int, **changes: Any) -> None:
        args = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "gpu_memory_utilization": 0.2,
            "num_gpu_blocks_override": blocks,
            "block_size": BLOCK,
            "max_model_len": LONGEST,
            "max_num_seqs": BATCH,
            "distributed_executor_backend": "uni",
            **changes,
        }
        self.llm = LLMEngine.from_engine_args(EngineArgs(**args))
        self.vllm_config = self.llm.vllm_config
        self.core = self.llm.engine_core.engine_core  # type: ignore[attr-defined]
        self.scheduler = self.core.scheduler
        self.clock = Clock()
        self.scheduler.hexgen_clock = self.clock
        self.written: dict[str, list[int]] = {}

    @property
    def connector(self) -> HostKVConnector:
        """The worker's half."""
        found = get_kv_transfer_group()
        assert isinstance(found, HostKVConnector)
        return found

    def host_kv(self) -> dict[str, Any]:
        found: dict[str, Any] = self.scheduler.hexgen_stats()["host_kv"]
        return found

    def add(self, call: Call) -> None:
        prompt: Any = {"type": "token", "prompt_token_ids": call.prompt}
        # From the future, so of age 0: real delays must not leak into the clock of the test.
        self.llm.add_request(call.name, prompt, call.params(), arrival_time=time.time() + 3600.0)
        await_grammars(self.scheduler)

    def step(self) -> None:
        self.clock.now += 0.02
        for output in self.llm.step():
            if output.finished:
                self.written[output.request_id] = list(output.outputs[0].token_ids)

    def run(self) -> None:
        while self.llm.has_unfinished_requests():
            self.step()

    def play(self, load: list[Call]) -> None:
        """Let a batch come at once and the others one by one, then run to the end."""
        for i, call in enumerate(load):
            self.add(call)
            for _ in range(3 if i >= BATCH else 0):
                self.step()
        self.run()

    def leaked_blocks(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def assert_clean(self) -> None:
        self.step_out()
        assert not self.scheduler.requests
        assert self.leaked_blocks() == 0
        assert self.host_kv()["copies"] == 0
        kept = self.host_kv()
        assert kept["used_bytes"] == kept["kept_bytes"]

    def step_out(self) -> None:
        """Let the worker hear of what ended last."""
        while self.scheduler.has_requests():
            self.core.step_fn()

    def close(self) -> None:
        self.llm.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()


@contextmanager
def running(model: Path, blocks: int, **changes: Any) -> Iterator[Engine]:
    engine = Engine(model, blocks, **changes)
    try:
        yield engine
    finally:
        engine.close()


def swapping(**options: Any) -> dict[str, Any]:
    """The arguments of an engine that keeps KV in host memory, as a user gives them."""
    hexgen = {"host_kv_gib": 0.1, "keep_kv": "always", **options}
    return {
        "scheduler_cls": "hexgen_vllm.UrgencyScheduler",
        "additional_config": {"hexgen": hexgen},
    }
