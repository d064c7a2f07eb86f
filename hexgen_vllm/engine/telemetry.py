"""What the engine measures of itself: step times, the fit over them, counters, a snapshot.

A step's time is up to the moment its output is processed: from the end of the step before it if
calls were in the batch all the time, because what the process does between two steps delays them
as much as the steps do; from its own start if the engine was idle. That is right with and without
overlapping steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import Any, Final

from hexgen_vllm.policy.cost import CostFit, StepShape, is_sampled
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.types import SLACK_BOUNDS_S, slack_counts

_WEIGHT: Final = 0.05
_DECAY: Final = 0.99


def step_shape(output: Any) -> StepShape:
    """Return what the step of a ``SchedulerOutput`` contains.

    A chunk of one prompt token costs what a decode costs and counts as one. Drafted tokens count
    with the sequence that verifies them.
    """
    cached, scheduled = output.scheduled_cached_reqs, output.num_scheduled_tokens
    contexts = cached.num_computed_tokens
    chunks = [(scheduled[r.req_id], r.num_computed_tokens) for r in output.scheduled_new_reqs]
    n_decode, ctx_decode, n_prefill, prefill_ctx = len(contexts), sum(contexts), 0, 0.0
    new_tokens = sum([tokens for tokens, _ in chunks])
    if output.total_num_scheduled_tokens - new_tokens > n_decode:  # not the usual step
        drafts = output.scheduled_spec_decode_tokens
        for req_id, context in zip(cached.req_ids, contexts, strict=True):
            tokens = scheduled[req_id]
            if tokens > 1 + len(drafts.get(req_id, ())):
                chunks.append((tokens, context))
                n_decode -= 1
                ctx_decode -= context
    for tokens, context in chunks:
        n_prefill += tokens
        prefill_ctx += tokens * (context + tokens / 2)
    return StepShape(n_decode, ctx_decode, n_prefill, prefill_ctx)


class StepMeter:
    """Times steps and learns their cost.

    Attributes:
        fit: the step-cost fit.
        steps: non-empty steps seen.
    """

    def __init__(self) -> None:
        self.fit = CostFit()
        self.steps = 0
        self._open: deque[tuple[Any, float]] = deque()
        self._last_end_s = 0.0
        # Running means over steps that decoded: sequences, their context, prompt tokens, their
        # context, and output tokens per sequence (more than one with speculation).
        self._usual = [0.0, 0.0, 0.0, 0.0, 1.0]
        self._uncached = 1.0
        self._busy_s = self._prefill_s = 0.0

    def started(self, output: Any, now: float, busy: bool = False) -> None:
        """Note that the step of ``output`` began to be prepared at ``now``.

        Args:
            output: the scheduled step.
            now: seconds.
            busy: calls have been in the batch since the step before it.
        """
        if output.total_num_scheduled_tokens:
            self._open.append((output, self._last_end_s if busy and self.steps else now))

    def finished(self, output: Any, sampled: list[list[int]] | None, now: float) -> None:
        """Note that the output of a step is here, and learn from how long it took."""
        start_s = self._started_s(output) if output.total_num_scheduled_tokens else None
        if start_s is None:
            return
        step_s = max(now - max(start_s, self._last_end_s), 0.0)
        self._last_end_s = now
        self.steps += 1
        shape = step_shape(output)
        if is_sampled(self.steps - 1, 1, shape.n_prefill > 0, step_s):
            self.fit.observe(shape, step_s)
        self._count(shape, step_s)
        if shape.n_decode:
            drafted = bool(output.scheduled_spec_decode_tokens)
            self._follow(shape, _output_tokens(sampled) / shape.n_decode if drafted else 1.0)

    def admitted(self, tokens: int, cached: int) -> None:
        """Note that a prompt of ``tokens`` was admitted with ``cached`` of them in the cache."""
        if tokens:
            self._uncached += _WEIGHT * (1.0 - cached / tokens - self._uncached)

    def rates(self, chunk: int) -> ServiceRates | None:
        """Return the service rates that the fit implies, ``None`` while it is unknown."""
        cost = self.fit.cost()
        if cost is None:
            return None
        n_decode, ctx_decode, n_prefill, prefill_ctx, per_step = self._usual
        step_s = cost.step_s(max(n_decode, 1.0), ctx_decode, n_prefill, prefill_ctx)
        return ServiceRates.fitted(cost, chunk, step_s / max(per_step, 1.0), self._uncached)

    def prefill_share(self) -> float | None:
        """Return the share of recent busy time that prefill took, 0 to 1; ``None`` if idle."""
        return self._prefill_s / self._busy_s if self._busy_s > 0 else None

    def _started_s(self, output: Any) -> float | None:
        while self._open:
            first, start_s = self._open.popleft()
            if first is output:
                return start_s
        return None

    def _count(self, shape: StepShape, step_s: float) -> None:
        cost = self.fit.cost() if shape.n_prefill and shape.n_decode else None
        share = float(shape.n_prefill > 0)
        if shape.n_prefill and shape.n_decode:
            share = shape.n_prefill / (shape.n_prefill + shape.n_decode)
            if cost is not None:
                whole = cost.step_s(
                    shape.n_decode, shape.ctx_decode, shape.n_prefill, shape.prefill_ctx
                )
                without = cost.step_s(shape.n_decode, shape.ctx_decode)
                share = 1.0 - without / whole if whole > 0 else share
        self._busy_s = _DECAY * self._busy_s + step_s
        self._prefill_s = _DECAY * self._prefill_s + share * step_s

    def _follow(self, shape: StepShape, per_sequence: float) -> None:
        now = (shape.n_decode, shape.ctx_decode, shape.n_prefill, shape.prefill_ctx, per_sequence)
        self._usual = [u + _WEIGHT * (n - u) for u, n in zip(self._usual, now, strict=True)]


def _output_tokens(sampled: list[list[int]] | None) -> int:
    return sum(map(len, sampled)) if sampled else 0


class Counters:
    """What happened since start.

    Attributes:
        preemptions: preemptions by cause: ``displaced`` for an urgent call, ``kv`` because the
            KV cache was full, ``reset`` because it was emptied.
        recomputed_tokens: tokens computed again after a preemption.
        let_go_blocks: blocks of workflows that were over, to be evicted before all others.
    """

    def __init__(self) -> None:
        self.preemptions = {"displaced": 0, "kv": 0, "reset": 0}
        self.recomputed_tokens = 0
        self.let_go_blocks = 0


def snapshot(scheduler: Any, now: float) -> dict[str, Any]:
    """Return the telemetry of an :class:`UrgencyScheduler` as plain JSON values.

    ``None`` means unknown, and for ``host_kv`` that no host memory is set aside. The slack
    histogram covers running and waiting calls.
    """
    meter: StepMeter = scheduler.hexgen_meter
    counters: Counters = scheduler.hexgen_counters
    cost = meter.fit.cost()
    running, waiting = scheduler.get_request_counts()
    calls = (r.hexgen for r in scheduler.requests.values() if not r.is_finished())
    keeper = scheduler.hexgen_keeper
    return {
        "order": scheduler.hexgen_options.order,
        "cost": asdict(cost) if cost is not None else None,
        "fit_error": meter.fit.error(),
        "steps": meter.steps,
        "running": running,
        "waiting": waiting,
        "kv_usage": scheduler.kv_cache_manager.usage,
        "kv_tokens": scheduler.kv_cache_config.num_blocks * scheduler.block_size,
        "max_num_seqs": scheduler.max_num_running_reqs,
        "max_num_batched_tokens": scheduler.scheduler_config.max_num_batched_tokens,
        "preemptions": dict(counters.preemptions),
        "recomputed_tokens": counters.recomputed_tokens,
        "let_go_blocks": counters.let_go_blocks,
        "host_kv": keeper.stats() if keeper is not None else None,
        "bad_metadata": scheduler.hexgen_book.bad_metadata,
        "batch_tokens_given_up": scheduler.hexgen_given_up,
        "lengths": scheduler.hexgen_book.outlooks.lengths(),
        "length_error": scheduler.hexgen_book.outlooks.error,
        "prefill_share": meter.prefill_share(),
        "slack_bounds_s": list(SLACK_BOUNDS_S),
        "slack_counts": slack_counts(call.latest_start_s - now for call in calls),
    }
