"""From a simulated engine's state to the values that the displacement policy decides on.

The counterpart of the live engine's displacer; search and decision are the same code.
"""

from __future__ import annotations

from collections.abc import Sequence as TypingSequence
from operator import attrgetter
from typing import Final

from hexgen_vllm.policy.preemption import RunningView
from hexgen_vllm.policy.victims import VictimSearch, ending, running_view
from hexgen_vllm.sim.engine.batch import Batch
from hexgen_vllm.sim.engine.prefix_cache import Hit, Link
from hexgen_vllm.sim.engine.sequence import Sequence

_KEY: Final = attrgetter("rank", "key_s")


class SimDisplacer:
    """Makes room in a batch for urgent waiting calls."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._options = batch, batch.options
        self._search: VictimSearch[Sequence] = VictimSearch(self, batch.options)

    def displace(self, now: float) -> list[Sequence]:
        """Preempt running calls for waiting ones; return them, not queued yet."""
        victims = self._search.victims(now, self._batch.clock.steps)
        for victim in victims:
            self._batch.displace(victim)
        return victims

    def look_again(self, now: float) -> tuple[float, int | None]:
        """Return when, or after how many steps, a queue that waits on may be worth a look."""
        return self._search.look_again(now, self._batch.clock.steps)

    # What the search asks.

    def heads(self, most: int) -> list[Sequence]:
        """Return the waiting calls that are next, in the queue's order."""
        return self._batch.waiting.first(most) if self._batch.queued else []

    def standing(self, call: Sequence) -> Sequence:
        """Return the state of a call."""
        return call

    def worst(self) -> tuple[int, bool]:
        """Return the largest rank in the batch, and whether all of it has deadlines."""
        calls = self._batch.running
        due = all(c.has_deadline or c.promoted for c in calls)
        return max((c.rank for c in calls), default=0), due

    def size(self) -> int:
        """Return the number of running calls."""
        return len(self._batch.running)

    def ordered(self) -> list[Sequence]:
        """Put the batch into the queue's order and return it."""
        self._batch.reprice()
        self._batch.running.sort(key=_KEY)
        return self._batch.running

    def room(self) -> tuple[int, int]:
        """Return the slots and blocks that are free after what the batch takes in this step."""
        batch = self._batch
        size = batch.model.block_size
        growth = batch.clock.blocks(0, 1)
        growth += sum(-(-s.tokens // size) - s.holding.blocks for s in batch.prefilling)
        free = batch.pool.free - batch.watermark_blocks - growth
        return batch.model.max_num_seqs - len(batch.running), free

    def needs(self, head: Sequence, free: int) -> tuple[int, tuple[Link, ...]]:
        """Return the blocks that ``head`` takes, and those that it would share."""
        most = -(-head.tokens // self._batch.model.block_size)
        if most <= free:
            return most, ()
        hit = self._hit(head)
        chain = head.holding.chain
        shared = tuple(
            k._replace(end=min(k.end, hit.blocks)) for k in chain if k.first < hit.blocks
        )
        return most - (hit.blocks - hit.idle), shared

    def endings(self) -> list[tuple[float, int]]:
        """Return in how many seconds each running call should end, and roughly its blocks."""
        return [self._ending(sequence) for sequence in self._batch.running]

    def _hit(self, head: Sequence) -> Hit:
        size = self._batch.model.block_size
        return self._batch.pool.lookup(head.holding.chain, (head.tokens - 1) // size)

    def _ending(self, sequence: Sequence) -> tuple[float, int]:
        """Return in how many seconds a call should end, and roughly the blocks it holds."""
        batch = self._batch
        tokens = batch.clock.tokens(sequence)
        computed = tokens - 1 if sequence.decoding else sequence.computed
        done, most = tokens - sequence.prompt_tokens, sequence.most_tokens
        seconds = ending(sequence, batch.pricing.rates, tokens - computed, done, most)
        return seconds, computed // batch.model.block_size

    def view(self, call: Sequence, shared: tuple[Link, ...]) -> RunningView:
        """Return ``call`` as a victim; what the head would take over is not released."""
        batch, sequence = self._batch, call
        size, tokens = batch.model.block_size, batch.clock.tokens(sequence)
        computed = tokens - 1 if sequence.decoding else sequence.computed
        blocks = max(-(-computed // size), 1)
        own = batch.pool.exclusive(sequence.holding, blocks, shared)
        lost = computed * own.held // blocks
        rates, keeper = batch.pricing.rates, batch.keeper
        redo_s = rates.prefill_s(lost)
        if keeper is not None:
            redo_s = keeper.weigh(computed, computed - lost, rates).redo_s
        return running_view(
            sequence,
            tokens - sequence.prompt_tokens,
            sequence.most_tokens,
            redo_s=redo_s,
            lost_tokens=lost,
            blocks_released=own.released,
        )

    def leaves_tokens(self, victims: TypingSequence[Sequence]) -> bool:
        """Return whether the step's token budget reaches beyond what stays in the batch."""
        wanted = sum(
            1 if s.decoding else s.tokens - s.computed
            for s in self._batch.running
            if s not in victims
        )
        return wanted < self._batch.model.max_num_batched_tokens
