"""Pace control in a simulated engine; the decision is the live engine's own.

See :mod:`hexgen_vllm.policy.pace`. A call that is left out stays in the batch, but off the decode
clock.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from hexgen_vllm.policy.pace import (
    EVERY_STEPS,
    MOST_WAITING,
    LooseCall,
    PaceControl,
    Places,
    TightCall,
)
from hexgen_vllm.policy.service_rates import output_left
from hexgen_vllm.sim.engine.batch import Batch
from hexgen_vllm.sim.engine.sequence import Sequence

_ORDER: Final = attrgetter("rank", "key_s")


class Pacer:
    """Paces the calls without deadline of one engine."""

    def __init__(self, batch: Batch) -> None:
        model = batch.model
        self._batch, self._on = batch, batch.options.pace
        self.control = PaceControl(batch.options, model.max_num_seqs, model.max_num_batched_tokens)
        self._places = Places(batch.options, model.max_num_seqs)
        self._promoted_at = 0  # step of the last look
        self._next_step = 0
        self._members = (0, 0)
        self._mixed = False

    def steps_left(self) -> int:
        """Return for how many steps the present pace holds."""
        if not self._mixed:
            return 1 << 30
        return max(self._next_step - self._batch.clock.steps, 1)

    def promote(self) -> None:
        """Let the loose call that waits longest go first while too few of them run."""
        batch = self._batch
        if not (batch.queued and self._places.some):
            return
        steps, self._promoted_at = batch.clock.steps - self._promoted_at, batch.clock.steps
        if not batch.waiting.first(1)[0].has_deadline:
            return
        loose = [s for s in batch.waiting.unordered() if not (s.has_deadline or s.background)]
        if not loose or any(s.promoted for s in loose):
            return
        oldest = min(loose, key=attrgetter("arrived_s"))
        running = sum(not s.has_deadline for s in batch.running)
        if self._places.owes(running, oldest.expected_tokens, steps):
            oldest.promoted = True
            batch.rekey(oldest)

    def pace(self, now: float) -> None:
        """Leave out loose calls or take them in again."""
        batch = self._batch
        step, members = batch.clock.steps, (len(batch.running), batch.queued)
        if step < self._next_step and members == self._members and self._some_run():
            return
        waiting = batch.waiting.first(MOST_WAITING) if batch.queued else []
        tight = [s for s in batch.running if s.has_deadline]
        for sequence in tight:
            if sequence.paused:  # it was in the background when it was left out
                batch.resume(sequence)
        tight += [s for s in waiting if s.has_deadline]
        loose = [s for s in batch.running if not s.has_deadline]
        self._members, self._next_step = members, step + EVERY_STEPS
        cost = batch.pricing.cost
        known = self._on and cost is not None
        self._mixed = bool(known and tight and (loose or len(waiting) < batch.queued))
        if not self._mixed or cost is None:
            self._release(loose)
            return
        best = min(s.rank for s in tight)
        free = [s for s in loose if s.rank >= best]
        free.sort(key=_ORDER)
        plan = self.control.plan(
            [self._tight(s) for s in tight],
            [self._loose(s) for s in free],
            cost,
            batch.pricing.prefill_share or 0.0,
            now,
        )
        for sequence in free[: plan.keep]:
            if sequence.paused:
                batch.resume(sequence)
        for sequence in free[plan.keep :]:
            if not sequence.paused:
                batch.pause(sequence)
        entering = sum(s.has_deadline or s.promoted for s in waiting)
        most = batch.model.max_num_seqs
        batch.most_running = most if plan.admit else min(most, len(batch.running) + entering)
        batch.step_tokens = batch.model.max_num_batched_tokens
        if plan.prefill_tokens is not None:
            wanted = sum(s.tokens - s.computed for s in tight if not s.decoding)
            tokens = batch.clock.size + wanted + max(plan.prefill_tokens, 1)
            batch.step_tokens = min(batch.step_tokens, tokens)

    def _some_run(self) -> bool:
        """Return whether a running call is not left out: one may have been demoted since."""
        return not self._mixed or any(not s.paused for s in self._batch.running)

    def _release(self, loose: list[Sequence]) -> None:
        batch = self._batch
        for sequence in loose:
            if sequence.paused:
                batch.resume(sequence)
        batch.most_running = batch.model.max_num_seqs
        batch.step_tokens = batch.model.max_num_batched_tokens

    def _tight(self, s: Sequence) -> TightCall:
        tokens = self._batch.clock.tokens(s)
        done = tokens - s.prompt_tokens
        left = output_left(s.likely_most, done, s.most_tokens)
        likely = output_left(s.expected_tokens, done, s.most_tokens)
        prefill = 0 if s.decoding else s.tokens - s.computed
        return TightCall(
            s.deadline_s - s.tail_prefill_s,
            left + s.tail_tokens,
            tokens if s.decoding else s.computed,
            prefill,
            likely + s.tail_tokens,
        )

    def _loose(self, s: Sequence) -> LooseCall:
        tokens = self._batch.clock.tokens(s)
        decodes = s.decoding or (s.paused and s.computed >= s.tokens - 1 > 0)
        return LooseCall(tokens, 0 if decodes else s.tokens - s.computed)
