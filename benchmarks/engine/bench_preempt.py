"""Drives a real engine whose KV cache is too small for its load, for ``bench preempt``.

The scheduler is looked into, so that ``$VLLM_ENABLE_V1_MULTIPROCESSING`` must be 0.

Time, the engine's included, is that of the device's work: on a GPU wall time; on a CPU the time
that this process, which computes in one thread, got of it. Neighbours then matter little.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from heapq import heappop, heappush
from time import perf_counter, process_time
from typing import Any, Final

import torch
from vllm import SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine

from benchmarks.engine import in_tree
from benchmarks.engine.preempt_load import (
    URGENT_EVERY,
    Case,
    LoadResult,
    Workflow,
    make_workflow,
    tokens,
)
from hexgen_vllm import wire
from hexgen_vllm.engine.swap.setup import choose_connector
from hexgen_vllm.errors import ConfigError

_NO_HOST: Final = {"host_kv_gib": 0.0}
MODES: Final[Mapping[str, Mapping[str, Any]]] = {
    "recompute": _NO_HOST,
    "swap": {"keep_kv": "always"},
    "auto": {"keep_kv": "auto"},
}


def check_device(device: str) -> None:
    """Check that this vLLM runs on ``device``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: it was built for something else, or there is no such device.
    """
    found = current_platform.device_type
    if found != device:
        raise ConfigError(f"--device {device}: this vLLM runs on {found or 'no device at all'}.")


def device_name(device: str) -> str:
    """Return what the figures were taken on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores"


def _clock() -> Callable[[], float]:
    return process_time if current_platform.device_type == "cpu" else perf_counter


class Bed:
    """One engine.

    Args:
        case: what is run.
        blocks: size of the KV cache.
        mode: one of ``MODES``, or ``None`` for stock vLLM.
    """

    def __init__(self, case: Case, blocks: int, mode: str | None) -> None:
        self.case = case
        args = EngineArgs(
            model=case.model,
            dtype=case.dtype,
            skip_tokenizer_init=True,
            enforce_eager=current_platform.device_type == "cpu",
            block_size=case.block_size,
            num_gpu_blocks_override=blocks,
            max_model_len=(case.tight_blocks - 1) * case.block_size,
            max_num_seqs=case.in_flight + 1,
            disable_log_stats=True,
        )
        if mode is not None:
            options = {"host_kv_gib": case.host_kv_gib, **MODES.get(mode, _NO_HOST)}
            if mode == "recompute, LRU":
                options["evict_finished_first"] = False
            args.scheduler_cls = "hexgen_vllm.UrgencyScheduler"
            args.additional_config = {"hexgen": options}
            choose_connector(args, options)
            if mode in in_tree.MODES:
                args.kv_transfer_config = in_tree.transfer_config(mode, case.host_kv_gib)
        self._llm = LLMEngine.from_engine_args(args)
        self._core = self._llm.engine_core.engine_core
        self.scheduler: Any = self._core.scheduler
        self._clock, self._skipped_s = _clock(), 0.0
        self.scheduler.hexgen_clock = self._now
        self.computed_tokens = 0

    def _now(self) -> float:
        """Return the time of the engine's work and of thinking that it waited for, seconds."""
        return self._clock() + self._skipped_s

    def close(self) -> None:
        """Stop the engine."""
        self._llm.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def leaked_blocks(self) -> int:
        """Return the KV blocks that are still taken, on the device and in host memory."""
        while self.scheduler.has_requests():
            self._core.step_fn()
        pool = self.scheduler.kv_cache_manager.block_pool
        leaked = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        keeper = getattr(self.scheduler, "hexgen_keeper", None)
        return int(leaked + (keeper.pool.used if keeper is not None else 0))

    def simulated(self) -> dict[str, Any] | None:
        """Return what the simulator needs to know of this engine, ``None`` of stock vLLM."""
        meter = getattr(self.scheduler, "hexgen_meter", None)
        cost = meter.fit.cost() if meter is not None else None
        if cost is None or self.scheduler.hexgen_keeper is None:
            return None
        keeper, size = self.scheduler.hexgen_keeper, self.case.block_size
        kept = keeper.stats()
        rates = [kept[name] for name in ("save_bytes_per_s", "restore_bytes_per_s") if kept[name]]
        block_bytes = kept["capacity_bytes"] / keeper.pool.space.capacity
        return {
            "cost": cost,
            "max_num_seqs": self.scheduler.max_num_running_reqs,
            "max_num_batched_tokens": self.scheduler.max_num_scheduled_tokens,
            "kv_tokens": (self.scheduler.kv_cache_config.num_blocks - 1) * size,
            "block_size": size,
            "kv_copy_tokens_per_s": statistics.fmean(rates) / block_bytes * size if rates else None,
            "host_kv_tokens": keeper.pool.space.capacity * size,
        }

    # The load.

    def lone_s(self) -> float:
        """Return the time of a workflow alone, warmed up."""
        return min(self._play(1, 1, 1e6).took_s for _ in range(4))

    def play(self, lone_s: float) -> LoadResult:
        """Run the load with deadlines in multiples of ``lone_s``."""
        return self._play(self.case.workflows, self.case.in_flight, lone_s)

    def _play(self, workflows: int, in_flight: int, lone_s: float) -> LoadResult:
        result, begin, skipped_s = LoadResult(), self._now(), self._skipped_s
        alive: dict[str, Workflow] = {}
        thinking: list[tuple[float, str]] = []
        todo = iter(range(workflows))
        while self._admit(alive, in_flight, todo, lone_s, result, begin):
            self._come_back(alive, thinking)
            start = self._now()
            outputs = self._step()
            now = self._now()
            result.steps_s.append(now - start)
            for output in outputs:
                if not output.finished:
                    continue
                workflow = alive[output.request_id.rpartition(".")[0]]
                written = list(output.outputs[0].token_ids)
                result.written[output.request_id] = written
                workflow.context += written
                if workflow.calls:
                    heappush(thinking, (now + workflow.thinks.pop(0), workflow.name))
                else:
                    del alive[workflow.name]
                    result.ended(workflow, now)
        result.took_s = self._now() - begin - (self._skipped_s - skipped_s)
        return result

    def _come_back(self, alive: dict[str, Workflow], thinking: list[tuple[float, str]]) -> None:
        """Send the calls of those who have thought; with nothing else to do, wait for the first."""
        if thinking and not self._llm.has_unfinished_requests():
            self._skipped_s += max(thinking[0][0] - self._now(), 0.0)
        while thinking and thinking[0][0] <= self._now():
            self._call(alive[heappop(thinking)[1]])

    def _step(self) -> Any:
        """Do a step; ``computed_tokens`` counts what is computed in it."""
        schedule = self.scheduler.schedule

        def counted(*arguments: Any, **more: Any) -> Any:
            output = schedule(*arguments, **more)
            self.computed_tokens += output.total_num_scheduled_tokens
            return output

        self.scheduler.schedule = counted
        try:
            return self._llm.step()
        finally:
            self.scheduler.schedule = schedule

    def _admit(
        self,
        alive: dict[str, Workflow],
        in_flight: int,
        todo: Iterator[int],
        lone_s: float,
        result: LoadResult,
        begin: float,
    ) -> bool:
        """Keep as many workflows in flight as wanted; return whether there are any."""
        while len(alive) < in_flight and (number := next(todo, None)) is not None:
            workflow = make_workflow(self.case, number, lone_s, self._now())
            alive[workflow.name] = workflow
            result.started_s.append(self._now() - begin)
            self._call(workflow)
        return bool(alive)

    def _call(self, workflow: Workflow) -> None:
        prompt, writes = workflow.calls.pop(0)
        workflow.context += prompt
        left = len(workflow.calls)
        left_s = max(workflow.deadline_s - self._now(), 1e-3)
        tail_s = left * workflow.stage_s
        self._add(f"{workflow.name}.{left}", workflow.context, writes, left_s, tail_s, left)

    def _add(
        self,
        name: str,
        prompt: list[int],
        writes: int,
        left_s: float,
        tail_s: float = 0.0,
        left: int = 0,
    ) -> None:
        meta = wire.CallMeta(
            workflow_id=name.partition(".")[0],
            workflow_deadline_ms=1000 * left_s,
            expected_output_tokens=writes,
            tail_ms=1000 * tail_s,
            stages_left=left,
            workflow_final=not left,
        )
        params = SamplingParams(
            temperature=0.0,
            max_tokens=writes,
            ignore_eos=True,
            detokenize=False,
            extra_args=wire.to_xargs(meta),
        )
        self._llm.add_request(name, {"type": "token", "prompt_token_ids": list(prompt)}, params)

    # Resuming one call.

    def resume_s(self, context: int) -> float:
        """Return the time from the end of an urgent call to the next token of its victim.

        The urgent call takes all of the KV cache, so that nothing of the victim's ``context``
        tokens survives there.
        """
        times = [self._resume_s(context, repeat) for repeat in range(self.case.repeats + 1)]
        return statistics.median(times[1:])  # the first one warms up

    def _resume_s(self, context: int, repeat: int) -> float:
        rng = random.Random(f"{self.case.seed}/{context}/{repeat}")
        self.scheduler.reset_prefix_cache()
        whole = (self.scheduler.kv_cache_config.num_blocks - 1) * self.case.block_size
        self._add("victim", tokens(rng, context - 8), 40, 1e4)
        while self._written("victim") < 8:
            self._llm.step()
        self._add("urgent", tokens(rng, whole - 8), 2, 0.1)
        while "urgent" in self._alive():
            self._llm.step()
        start, had = self._now(), self._written("victim")
        while self._written("victim") <= had:
            self._llm.step()
        took_s = self._now() - start
        while self._llm.has_unfinished_requests():
            self._llm.step()
        return took_s

    def _alive(self) -> dict[str, Any]:
        return {r.request_id.rpartition("-")[0]: r for r in self.scheduler.requests.values()}

    def _written(self, name: str) -> int:
        request = self._alive().get(name)
        return request.num_output_tokens if request is not None else 1 << 30


@contextmanager
def bed(case: Case, blocks: int, mode: str | None) -> Iterator[Bed]:
    """Start an engine, and stop it again."""
    made = Bed(case, blocks, mode)
    try:
        yield made
    finally:
        made.close()


def undisturbed(case: Case) -> tuple[float, dict[str, list[int]]]:
    """Return the time of a lone workflow, and what all write with room for everything."""
    with bed(case, case.ample_blocks, None) as engine:
        lone_s = engine.lone_s()
        return lone_s, engine.play(lone_s).written


def run_mode(
    case: Case, mode: str, lone_s: float, want: dict[str, list[int]], *, resume: bool = True
) -> dict[str, Any]:
    """Return the figures of one mode, the times of resuming calls only if ``resume``."""
    with bed(case, case.tight_blocks, mode) as engine:
        engine.lone_s()  # warms up, and teaches the engine its step cost
        before = engine.scheduler.hexgen_stats()
        engine.computed_tokens = 0
        load = engine.play(lone_s)
        computed, stats = engine.computed_tokens, engine.scheduler.hexgen_stats()
        times = case.contexts if resume else ()
        resume_ms = {c: round(1000 * engine.resume_s(c), 2) for c in times}
        leaked = engine.leaked_blocks()
    urgent = -(-case.workflows // URGENT_EVERY)
    again = stats["recomputed_tokens"] - before["recomputed_tokens"]
    kept = stats["host_kv"] or {"restored_tokens": 0, "cached_tokens": 0}
    restored = kept["restored_tokens"]
    return {
        "restored_fraction": round(restored / max(restored + again, 1), 4),
        "tokens_identical": all(load.written[name] == want[name] for name in want),
        "leaked_blocks": leaked,
        "resume_ms": resume_ms[max(resume_ms)] if resume_ms else None,
        "resume_ms_by_context": {str(c): ms for c, ms in resume_ms.items()},
        "computed_tokens": computed,
        "recomputed_tokens": again,
        "restored_tokens": restored,
        "preemptions": stats["preemptions"],
        "step_ms": round(1000 * statistics.fmean(load.steps_s), 3),
        "step_ms_p99": round(1000 * sorted(load.steps_s)[int(0.99 * len(load.steps_s))], 3),
        "on_time_fraction": round(load.on_time / case.workflows, 4),
        "urgent_on_time_fraction": round(load.urgent_on_time / urgent, 4),
        "seconds": round(load.took_s, 3),
        "host_kv": stats["host_kv"],
    }


def run_agents(
    case: Case, mode: str | None, lone_s: float, want: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the figures of agents of many turns; ``None`` is stock vLLM.

    ``engine`` is what :mod:`benchmarks.engine.react` simulates one by, ``None`` while unknown.
    """
    with bed(case, case.tight_blocks, mode) as engine:
        engine.lone_s()
        engine.computed_tokens = 0
        load = engine.play(lone_s)
        computed = engine.computed_tokens
        stats = engine.scheduler.hexgen_stats() if mode is not None else {"host_kv": None}
        leaked, simulated = engine.leaked_blocks(), engine.simulated()
    urgent = -(-case.workflows // URGENT_EVERY)
    return {
        # Each token that is written is computed once, but for the last one of a call.
        "prefill_tokens": computed - sum(len(written) - 1 for written in load.written.values()),
        "on_time_fraction": round(load.on_time / case.workflows, 4),
        "urgent_on_time_fraction": round(load.urgent_on_time / urgent, 4),
        "tokens_identical": all(load.written[name] == want[name] for name in want),
        "leaked_blocks": leaked,
        "seconds": round(load.took_s, 3),
        "started_s": load.started_s,
        "host_kv": stats["host_kv"],
        "engine": simulated,
    }
