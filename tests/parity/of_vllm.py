"""One scenario through vLLM's own scheduler: what each step did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.engine.headless import (
    Setup,
    block_hasher,
    build_scheduler,
    make_request,
)
from hexgen_vllm import wire
from tests.parity.scenarios import BLOCK_SIZE, MAX_MODEL_LEN, EngineScenario
from tests.parity.simulated import Log, Step


def of_vllm(
    scenario: EngineScenario,
    folder: Path,
    *,
    policy: str = "fcfs",
    scheduler_class: type = Scheduler,
    hexgen: dict[str, Any] | None = None,
) -> Log:
    """Run vLLM's own scheduler with a model that writes the same token for ever."""
    model = scenario.model
    setup = Setup(
        blocks=model.blocks + 1,  # vLLM keeps one for itself
        block_size=BLOCK_SIZE,
        max_num_seqs=model.max_num_seqs,
        max_batched_tokens=model.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=model.prefix_caching,
        policy=policy,
        additional={} if hexgen is None else {"hexgen": hexgen},
    )
    return _Vllm(build_scheduler(scheduler_class, folder, setup), scenario, policy).run()


class _Vllm:
    def __init__(self, scheduler: Any, scenario: EngineScenario, policy: str) -> None:
        self.scheduler, self.cost, self.policy = scheduler, scenario.model.cost, policy
        self.waiting = list(reversed(scenario.arrivals))
        self.hasher = block_hasher(BLOCK_SIZE)
        self.now = 0.0
        self.log = Log([], {})
        self.left: dict[str, int] = {}
        scheduler.hexgen_clock = lambda: self.now

    def run(self) -> Log:
        scheduler = self.scheduler
        preempted: frozenset[str] = frozenset()
        while self.waiting or scheduler.has_unfinished_requests():
            if not scheduler.has_unfinished_requests():
                self.now = max(self.now, self.waiting[-1].at_s)
            self._add_arrived()
            output = scheduler.schedule()
            preempted |= frozenset(output.preempted_req_ids or ())
            if output.total_num_scheduled_tokens:
                tokens = dict(output.num_scheduled_tokens)
                self.log.steps.append(Step(tokens, preempted, self.now))
                preempted = frozenset()
                self.now += self._took_s(tokens)
            self._take_in(output)
        return self.log

    def _took_s(self, tokens: dict[str, int]) -> float:
        """Return the step's time; a chunk of one token costs what a decode costs."""
        n_decode = ctx_decode = n_prefill = 0
        prefill_ctx = 0.0
        for call_id, count in tokens.items():
            # num_computed_tokens is already what it will be after the step
            context = self.scheduler.requests[call_id].num_computed_tokens - count
            if count == 1:
                n_decode, ctx_decode = n_decode + 1, ctx_decode + context
            else:
                n_prefill += count
                prefill_ctx += count * (context + count / 2)
        return self.cost.step_s(n_decode, ctx_decode, n_prefill, prefill_ctx)

    def _add_arrived(self) -> None:
        while self.waiting and self.waiting[-1].at_s <= self.now:
            arrival = self.waiting.pop()
            meta = wire.CallMeta(
                workflow_deadline_ms=(arrival.deadline_s - self.now) * 1000,
                tail_ms=arrival.tail_s * 1000,
                expected_output_tokens=arrival.expected_tokens,
            )
            request = make_request(
                arrival.call_id,
                arrival.prompt(),
                arrival.output_tokens,
                self.hasher,
                sampling={"extra_args": wire.to_xargs(meta)},
                arrival_time=arrival.at_s,
                priority=round(arrival.deadline_s * 1e6) if self.policy == "priority" else 0,
            )
            self.scheduler.add_request(request)
            self._date_back(request, arrival.at_s)

    def _date_back(self, request: Any, arrived_s: float) -> None:
        """Let ours know the moment of arrival, which live comes from the wall clock."""
        if hasattr(request, "hexgen"):
            request.hexgen.arrived_s = arrived_s
            self.scheduler.hexgen_book.price(request)
            self.scheduler.waiting.rekey(request)

    def _take_in(self, output: Any) -> None:
        ids = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[i] for i in ids]
        # num_computed_tokens was advanced already; a whole prompt, or a decode, gives a token.
        done = [r.num_computed_tokens >= r.num_tokens for r in requests]
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[[7] if whole else [] for whole in done],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        for batch in self.scheduler.update_from_output(output, result).values():
            for one in batch.outputs:
                if one.finish_reason is not None:
                    self.log.ends_s[one.request_id] = self.now
