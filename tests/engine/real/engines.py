"""A real vLLM engine in this process: real model, real KV cache, real scheduler."""

from __future__ import annotations

import time
from typing import Any

from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from hexgen_vllm.wire import CallMeta, to_xargs

STEP_S = 0.02


class Clock:
    """Time of the scheduler under test: it passes with each step, however slow the machine is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def await_grammars(scheduler: Any) -> None:
    """Wait until vLLM's threads have compiled the grammars of all calls.

    Steps without a token would pass until then, and the clock with them, the more the busier the
    machine is.
    """
    for request in list(scheduler.requests.values()):
        structured = request.structured_output_request
        while structured is not None and not structured.is_grammar_ready:
            time.sleep(0.001)


class RealEngine:
    """An engine, and the tokens, texts and reasons that came out of it."""

    def __init__(self, model: str, scheduler_class: str | type | None, **more: Any) -> None:
        # `more` wins: the tests of one feature change what they need.
        args: dict[str, Any] = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "block_size": 32,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.2,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "seed": 0,
            **more,
        }
        if scheduler_class is not None:
            args["scheduler_cls"] = scheduler_class
        self.engine = LLMEngine.from_engine_args(EngineArgs(**args))
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.scheduler.hexgen_clock = self.clock = Clock()
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.ended: list[str] = []

    def add(
        self, name: str, prompt: list[int], most: int, meta: CallMeta | None = None, **params: Any
    ) -> None:
        """Send a greedy call; it writes ``most`` tokens unless ``params`` stop it before."""
        sampling = SamplingParams(
            max_tokens=most,
            temperature=0.0,
            **{"ignore_eos": True, **params},
            extra_args=to_xargs(meta) if meta is not None else None,
        )
        request = {"type": "token", "prompt_token_ids": prompt}
        # From the future, so of age 0: real delays must not leak into the clock of the test.
        self.engine.add_request(name, request, sampling, arrival_time=time.time() + 3600.0)
        await_grammars(self.scheduler)

    def abort(self, name: str) -> None:
        """Abort a call as a client that goes away does."""
        self.engine.abort_request([name])
        self.ended.append(name)
        self.reasons[name] = "abort"

    def alive(self) -> list[str]:
        """Return the calls that have not ended."""
        output = self.engine.output_processor
        return sorted(state.external_req_id for state in output.request_states.values())

    def step(self) -> None:
        """Compute one step and take in what came out."""
        self.clock.now += STEP_S
        for out in self.engine.step():
            self.tokens[out.request_id] = list(out.outputs[0].token_ids)
            if out.finished:
                self.ended.append(out.request_id)
                self.reasons[out.request_id] = str(out.outputs[0].finish_reason)

    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_unfinished_requests():
                self.step()

    def run(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_unfinished_requests():
            self.step()
        # The last aborts and finished ids are told to the worker in a step without tokens.
        core = self.engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            core.step_fn()

    def running(self) -> list[str]:
        return [r.request_id.rsplit("-", 1)[0] for r in self.scheduler.running]

    def assert_clean(self) -> None:
        """No call is left, and every KV block is free."""
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

    def close(self) -> None:
        """Free what the engine holds, so that the next one can start in this process."""
        self.engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
