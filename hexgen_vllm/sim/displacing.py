"""From a simulated engine's state to the values that the displacement policy decides on.

The counterpart of the live engine's displacer; the decision itself is the same function.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from hexgen_vllm.policy.preemption import (
    Candidate,
    RunningView,
    choose_victims,
    urgent,
)
from hexgen_vllm.policy.service import output_left
from hexgen_vllm.sim.sequence import Sequence

if TYPE_CHECKING:
    from hexgen_vllm.sim.batch import Batch

_KEY: Final = attrgetter("key_s")
_MOST_VIEWS: Final = 32
_NO_LIMIT: Final = 1 << 30


class Displacer:
    """Makes room in a batch for the most urgent waiting call."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._options = batch, batch.options
        self._enabled = self._options.displace and self._options.max_displacements > 0

    def displace(self, now: float) -> list[Sequence]:
        """Preempt running calls for the head of the queue; return them, not queued yet."""
        batch = self._batch
        if not (self._enabled and batch.waiting and batch.running):
            return []
        head = batch.waiting.peek()
        if not urgent(head.latest_start_s, self._options, now):
            return []
        wanted = self._wanted(head)
        if wanted is None:
            return []
        victims = self._victims(wanted, now)
        if victims and not self._leaves_tokens(victims):
            return []
        for victim in victims:
            batch.displace(victim)
        return victims

    def look_again_s(self, now: float) -> float:
        """Return when a waiting head that is not admitted may be urgent enough, else ``inf``."""
        if not self._enabled:
            return math.inf
        head = self._batch.waiting.peek()
        urgent_from_s = head.latest_start_s - self._options.displace_slack_s
        return urgent_from_s if urgent_from_s > now else math.inf

    def _wanted(self, head: Sequence) -> Candidate | None:
        """Return what ``head`` lacks, ``None`` when it lacks nothing."""
        batch = self._batch
        size, pool = batch.model.block_size, batch.pool
        slots_short = 1 - (batch.model.max_num_seqs - len(batch.running))
        hit = pool.lookup(head.holding.chain, (head.tokens - 1) // size)
        growth = batch.clock.blocks(0, 1)
        growth += sum(-(-s.tokens // size) - s.holding.blocks for s in batch.prefilling)
        whole = -(-head.tokens // size) - (hit.blocks - hit.idle)
        blocks_short = whole + batch.watermark_blocks + growth - pool.free
        if slots_short <= 0 and blocks_short <= 0:
            return None
        return Candidate(head.key_s, head.latest_start_s, slots_short, blocks_short)

    def _victims(self, wanted: Candidate, now: float) -> list[Sequence]:
        batch = self._batch
        batch.reprice()
        batch.running.sort(key=_KEY)
        able = self._able(wanted)
        chosen, _ = choose_victims(wanted, [self._view(s) for s in able], self._options, now)
        return [able[i] for i in chosen]

    def _able(self, wanted: Candidate) -> list[Sequence]:
        """Return the running calls with the most slack that may be victims, cheaply judged."""
        options = self._options
        least_s = wanted.latest_start_s + options.displace_gap_s
        able: list[Sequence] = []
        for sequence in reversed(self._batch.running):
            if sequence.key_s <= wanted.key_s or len(able) >= _MOST_VIEWS:
                break
            if _uncredited_start_s(sequence) > least_s and (
                sequence.displacements < options.max_displacements
            ):
                able.append(sequence)
        return able

    def _view(self, sequence: Sequence) -> RunningView:
        batch = self._batch
        size, tokens = batch.model.block_size, batch.clock.tokens(sequence)
        computed = tokens - 1 if sequence.decoding else sequence.computed
        blocks = max(-(-computed // size), 1)
        own = batch.pool.exclusive(sequence.holding, blocks)
        lost = computed * own // blocks
        return RunningView(
            key_s=sequence.key_s,
            latest_start_s=_uncredited_start_s(sequence),
            redo_s=batch.pricing.rates.prefill_s(lost),
            lost_tokens=lost,
            blocks_released=own,
            output_left=output_left(
                sequence.expected_tokens, tokens - sequence.prompt_tokens, _NO_LIMIT
            ),
            displacements=sequence.displacements,
        )

    def _leaves_tokens(self, victims: list[Sequence]) -> bool:
        """Return whether the step's token budget reaches beyond what stays in the batch."""
        wanted = sum(
            1 if s.decoding else s.tokens - s.computed
            for s in self._batch.running
            if s not in victims
        )
        return wanted < self._batch.model.max_num_batched_tokens


def _uncredited_start_s(sequence: Sequence) -> float:
    """Return L without credit for progress, or equal deadlines would displace each other."""
    return min(sequence.latest_start_s, sequence.queued_start_s)
