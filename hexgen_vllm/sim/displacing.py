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
    wait_for_room,
)
from hexgen_vllm.policy.service import output_left
from hexgen_vllm.sim.prefix_cache import Hit, Link
from hexgen_vllm.sim.sequence import Sequence

if TYPE_CHECKING:
    from hexgen_vllm.sim.batch import Batch

_KEY: Final = attrgetter("key_s")
_MOST_VIEWS: Final = 32
_QUIET_STEPS: Final = 4  # as in the live engine, after a look in vain


class Displacer:
    """Makes room in a batch for the most urgent waiting call."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._options = batch, batch.options
        self._enabled = self._options.displace and self._options.max_displacements > 0
        self._quiet: tuple[Sequence, int] | None = None
        self._looked_at = 0  # step of the last look in vain

    def displace(self, now: float) -> list[Sequence]:
        """Preempt running calls for the head of the queue; return them, not queued yet."""
        batch = self._batch
        if not (self._enabled and batch.queued and batch.running):
            return []
        head = batch.waiting.peek()
        if not urgent(head.latest_start_s, self._options, now) or self._look_is_vain(head):
            return []
        victims = self._victims(head, now)
        if not victims or not self._leaves_tokens(victims):
            self._quiet, self._looked_at = (head, len(batch.running)), batch.clock.steps
            return []
        for victim in victims:
            batch.displace(victim)
        return victims

    def look_again(self, now: float) -> tuple[float, int | None]:
        """Return when, or after how many steps, a head that waits on may be worth a look."""
        if not self._enabled:
            return math.inf, None
        head = self._batch.waiting.peek()
        if urgent(head.latest_start_s, self._options, now):
            return math.inf, _QUIET_STEPS + 1 - (self._batch.clock.steps - self._looked_at)
        urgent_from_s = head.latest_start_s - self._options.displace_slack_s
        return (urgent_from_s if urgent_from_s > now else math.inf), None

    def _look_is_vain(self, head: Sequence) -> bool:
        if self._quiet != (head, len(self._batch.running)):
            self._quiet = None
            return False
        if self._batch.clock.steps - self._looked_at <= _QUIET_STEPS:
            return True
        self._quiet = None
        return False

    def _hit(self, head: Sequence) -> Hit:
        size = self._batch.model.block_size
        return self._batch.pool.lookup(head.holding.chain, (head.tokens - 1) // size)

    def _wanted(self, head: Sequence) -> Candidate | None:
        """Return what ``head`` lacks, ``None`` when it lacks nothing."""
        batch = self._batch
        size, pool = batch.model.block_size, batch.pool
        slots_short = 1 - (batch.model.max_num_seqs - len(batch.running))
        hit = self._hit(head)
        growth = batch.clock.blocks(0, 1)
        growth += sum(-(-s.tokens // size) - s.holding.blocks for s in batch.prefilling)
        whole = -(-head.tokens // size) - (hit.blocks - hit.idle)
        blocks_short = whole + batch.watermark_blocks + growth - pool.free
        if slots_short <= 0 and blocks_short <= 0:
            return None
        wait_s = wait_for_room(slots_short, blocks_short, map(self._ending, batch.running))
        return Candidate(head.key_s, head.latest_start_s, slots_short, blocks_short, wait_s)

    def _ending(self, sequence: Sequence) -> tuple[float, int]:
        """Return in how many seconds a call should end, and roughly the blocks it holds."""
        batch = self._batch
        tokens = batch.clock.tokens(sequence)
        computed = tokens - 1 if sequence.decoding else sequence.computed
        left = output_left(
            sequence.expected_tokens, tokens - sequence.prompt_tokens, sequence.most_tokens
        )
        seconds = batch.pricing.rates.service_s(tokens - computed, left)
        return seconds, computed // batch.model.block_size

    def _victims(self, head: Sequence, now: float) -> list[Sequence]:
        batch, wanted = self._batch, self._wanted(head)
        if wanted is None:
            return []
        batch.reprice()
        batch.running.sort(key=_KEY)
        able = self._able(wanted)
        hit = self._hit(head).blocks
        taken = tuple(k._replace(end=min(k.end, hit)) for k in head.holding.chain if k.first < hit)
        views = [self._view(sequence, taken) for sequence in able]
        chosen, _ = choose_victims(wanted, views, self._options, now)
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

    def _view(self, sequence: Sequence, taken: tuple[Link, ...]) -> RunningView:
        batch = self._batch
        size, tokens = batch.model.block_size, batch.clock.tokens(sequence)
        computed = tokens - 1 if sequence.decoding else sequence.computed
        blocks = max(-(-computed // size), 1)
        own = batch.pool.exclusive(sequence.holding, blocks, taken)
        lost = computed * own.held // blocks
        rates, keeper = batch.pricing.rates, batch.keeper
        redo_s = rates.prefill_s(lost)
        if keeper is not None:
            redo_s = keeper.weigh(computed, computed - lost, rates).redo_s
        return RunningView(
            key_s=sequence.key_s,
            latest_start_s=_uncredited_start_s(sequence),
            redo_s=redo_s,
            lost_tokens=lost,
            blocks_released=own.released,
            output_left=output_left(
                sequence.expected_tokens, tokens - sequence.prompt_tokens, sequence.most_tokens
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
