"""A vLLM V1 engine in virtual time: :class:`Scheduler` decides what steps compute, this when.

Steps in which nothing changes but the length of every call are not simulated one by one: such a
stretch lasts until the first call ends, blocks run short, a waiting call may turn urgent, or a
new call comes. Cutting a stretch short changes nothing, so it is cut freely.

Steps vary around their cost if that is asked for, as those of devices do. Of a stretch all steps
vary alike, by as much as the mean of so many would; a stretch that is cut short varies too little.

With asynchronous scheduling a step is scheduled while the one before it is computed. What that
saves in time is in the step cost already; what it costs is that a call joins one step later. That
a call which stops by itself leaves its row one step later, too, is left out.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final, Protocol

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import HexgenError
from hexgen_vllm.policy.cost import CostFit
from hexgen_vllm.sim.engine.batch import Batch
from hexgen_vllm.sim.engine.scheduler import Scheduler
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.types import EngineReport

_NEVER: Final = math.inf
_LEAST_FACTOR: Final = 0.1  # of what a step costs


class StepObserver(Protocol):
    """Sees every stretch of equal steps, for timelines and comparisons."""

    def stepped(self, engine: SimEngine, start_s: float, steps: int) -> None:
        """Note that ``engine`` ran ``steps`` steps from ``start_s`` to now."""


class SimEngine:
    """One engine.

    A driver submits calls, and calls :meth:`step_ended` at :attr:`end_s`, which both may move.

    Attributes:
        model: what it is.
        batch: its calls.
        scheduler: what decides about them.
        end_s: when its present steps end; ``inf`` while it is idle.
        start_s: when they began.
        steps: their number; 0 while it is idle.
        slowdown: how many times longer than they cost steps take from the next one on.

    Args:
        model: what it is.
        options: order and displacement.
        stock: stock vLLM: ``fcfs``, or for any other order ``priority``; never displaces.
        observer: sees every step.
        fit: learns the step cost and is what is reported; without one the true cost is.
        noise: spread of step times, as a share of them, and what it is drawn from.
    """

    def __init__(
        self,
        model: EngineModel,
        options: EngineOptions,
        *,
        stock: bool = False,
        observer: StepObserver | None = None,
        fit: CostFit | None = None,
        noise: tuple[float, Random] | None = None,
    ) -> None:
        self.model, self._stock, self._observer = model, stock, observer
        self._fit, self._noise = fit, noise
        self.batch = Batch(model, options, stock=stock, fit=fit)
        self.scheduler = Scheduler(self.batch)
        self.slowdown = 1.0
        self.end_s = _NEVER
        self.steps = 0
        self.start_s = 0.0
        self._first_s = self._slope_s = 0.0  # a step without prefill, and its growth each step
        self._prefill_s = 0.0
        self._decoding = self._context = self._tokens = 0  # what is in a step
        self._area = 0.0
        # Calls that came after the next step had been scheduled, and when.
        self._late: list[tuple[Sequence, float]] = []

    def fits(self, sequence: Sequence) -> bool:
        """Return whether the KV cache can hold the whole call; vLLM refuses others."""
        return -(-sequence.total_tokens // self.model.block_size) <= self.model.blocks

    def submit(self, sequence: Sequence, now: float) -> None:
        """Take in a call that reaches the engine now; it must fit."""
        ahead = int(self.model.async_scheduling)
        if ahead and self.steps and self._steps_by(now) == self.steps:
            self._late.append((sequence, now))
            return
        self.scheduler.add(sequence, now)
        if not self.steps:
            self._begin(now)
        elif self.steps > 1 and self._may_matter(sequence):
            self.cut(now, ahead)

    def cut(self, now: float, ahead: int = 0) -> None:
        """End the present stretch ``ahead`` steps after the one that is being computed."""
        self.steps = self._steps_by(now) + ahead
        self.end_s = self.start_s + self._took_s(self.steps)

    def step_ended(self, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """End the present steps and begin the next.

        Returns:
            Calls whose first token came with the last step, and calls that ended with it.
        """
        batch, steps = self.batch, self.steps
        if self._observer is not None:
            self._observer.stepped(self, self.start_s, steps)
        took_s = now - self.start_s
        if self._fit is not None:
            batch.pricing.measured(
                steps, took_s, self._decoding, self._context, self._tokens, self._area
            )
        if batch.pricing.stepped(steps, took_s, self._prefill_s):
            batch.rekey_waiting()
        ended = self.scheduler.end(steps, now)
        self._begin(now)
        return ended

    def report(self) -> EngineReport:
        """Return the engine's telemetry as of the end of its last steps."""
        batch, ours, fit = self.batch, not self._stock, self._fit
        cost, error = self.model.cost, 0.0 if fit is None else fit.error()
        return EngineReport(
            cost=(cost if fit is None else fit.cost()) if ours else None,
            fit_error=error if ours else None,
            running=len(batch.running),
            waiting=batch.queued,
            kv_usage=batch.pool.usage(),
            preemptions=batch.preemptions,
            prefill_share=batch.pricing.prefill_share if ours else None,
        )

    def progressed(self, now: float) -> list[tuple[Sequence, int]]:
        """Return calls that wrote much since they were returned last, and their output tokens."""
        ahead = self._steps_by(now) - 1 if self.steps else 0
        return [
            (sequence, self.batch.clock.tokens(sequence) + ahead - sequence.prompt_tokens)
            for sequence in self.batch.clock.marked(ahead)
        ]

    def _begin(self, now: float) -> None:
        """Schedule the next step, and as many equal ones as can be told."""
        batch = self.batch
        self.steps, self.end_s = 0, _NEVER
        if not (batch.running or batch.queued):
            self._let_in()
        if not (batch.running or batch.queued):
            return
        plan = self.scheduler.schedule(now)
        while not plan.runs:
            if not batch.queued:
                return
            if not plan.single:
                raise HexgenError(f"engine {self.model.engine_id} cannot go on")
            plan = self.scheduler.schedule(now)
        self._launch(now)
        self.steps = 1 if plan.single or self._late else self._stretch(now)
        if self._noise is not None:
            spread, source = self._noise
            if self.steps > 1:
                spread /= math.sqrt(self.steps)
            self._scale(max(source.gauss(1.0, spread), _LEAST_FACTOR))
        self._let_in()
        self.end_s = now + self._took_s(self.steps)
        if not self.end_s > now:
            raise HexgenError(f"a step of engine {self.model.engine_id} takes no time")

    def _let_in(self) -> None:
        """Queue calls that could not be in the step that was just scheduled."""
        for sequence, arrived_s in self._late:
            self.scheduler.add(sequence, arrived_s)
        self._late.clear()

    def _launch(self, now: float) -> None:
        """Set what the next step takes."""
        batch, cost = self.batch, self.model.cost
        size, context = batch.clock.size, batch.clock.context
        if batch.missed:
            size -= len(batch.missed)
            context -= sum(batch.clock.tokens(s) - 1 for s in batch.missed)
        tokens, area = 0, 0.0
        for sequence in batch.chunks:
            chunk = sequence.chunk
            if chunk == 1:  # costs what a decode costs
                size += 1
                context += sequence.computed
            else:
                tokens += chunk
                area += chunk * (sequence.computed + chunk / 2)
        self.start_s = now
        self._decoding, self._context, self._tokens, self._area = size, context, tokens, area
        self._first_s = cost.step_s(size, context)
        self._slope_s = cost.c2 * size
        self._prefill_s = cost.p0 + cost.p1 * tokens + cost.p2 * area if tokens else 0.0
        if batch.copied and batch.keeper is not None:
            self._prefill_s += batch.keeper.seconds(batch.copied)
        if self.slowdown != 1.0:
            self._scale(self.slowdown)

    def _scale(self, factor: float) -> None:
        """Let the next step take ``factor`` times as long."""
        self._first_s *= factor
        self._slope_s *= factor
        self._prefill_s *= factor

    def _stretch(self, now: float) -> int:
        """Return how many steps will be as this one."""
        batch, clock = self.batch, self.batch.clock
        displacer, pacer = self.scheduler.displacer, self.scheduler.pacer
        steps = clock.steps_to_end()
        if steps > 1:
            steps = 1 + clock.steps_within(batch.pool.free, 1, steps - 1)
        if steps > 1 and batch.queued and displacer is not None:
            again_s, most = displacer.look_again(now)
            if most is not None:
                steps = max(1, min(steps, most))
            elif again_s < _NEVER:
                self.steps = steps
                steps = self._steps_by(again_s)
        if steps > 1 and pacer is not None:
            steps = max(1, min(steps, pacer.steps_left()))
        return steps

    def _took_s(self, steps: int) -> float:
        growth_s = self._slope_s * (steps * (steps - 1) / 2)
        return steps * self._first_s + growth_s + self._prefill_s

    def _steps_by(self, moment_s: float) -> int:
        """Return how many of the present steps have begun by ``moment_s``, at least 1."""
        if self.steps == 1:
            return 1
        elapsed = moment_s - self.start_s
        a, b = self._slope_s / 2, self._first_s - self._slope_s / 2
        # a·n² + b·n = elapsed, in the form that is exact for small a
        steps = 2 * elapsed / (b + math.sqrt(b * b + 4 * a * elapsed))
        return max(1, min(math.floor(steps) + 1, self.steps))

    def _may_matter(self, sequence: Sequence) -> bool:
        """Return whether the next step could differ because of a call that just came."""
        batch = self.batch
        if len(batch.running) < self.model.max_num_seqs:
            return batch.queued == 1 or batch.waiting.peek() is sequence
        return not self._stock and batch.waiting.peek() is sequence
