"""A step in which KV blocks or tokens are short: calls are served one by one, as vLLM does.

Whoever finds no block for its tokens takes those of the last call in the order, of itself at
last. What a victim had been given in this step goes back to the budget.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final

from hexgen_vllm.sim.sequence import Sequence

if TYPE_CHECKING:
    from hexgen_vllm.sim.batch import Batch

_KEY: Final = attrgetter("paused", "rank", "key_s")  # who is left out gives way first


class TightStep:
    """Schedules the running calls of one step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._served: list[Sequence] = []
        self._given: dict[int, int] = {}  # tokens, by identity of the call

    def schedule(self, budget: int) -> tuple[int, bool]:
        """Give tokens; return the budget left and whether any call was preempted."""
        batch, served, given = self._batch, self._served, self._given
        if not batch.stock:
            batch.reprice()
            batch.running.sort(key=_KEY)
        before = batch.preemptions
        while len(served) < len(batch.running) and budget > 0:
            sequence = batch.running[len(served)]
            if sequence.paused:
                break
            back = self._make_room(sequence, budget)
            if sequence not in batch.running:
                budget += back
                break
            given[id(sequence)] = tokens = self._serve(sequence, budget)
            budget += back - tokens  # what came back is for those after it, as in vLLM
            served.append(sequence)
        batch.missed = [s for s in batch.running if s.decoding and id(s) not in given]
        return budget, batch.preemptions > before

    def _make_room(self, sequence: Sequence, budget: int) -> int:
        """Preempt until ``sequence`` has its blocks, itself at last; return tokens given back."""
        batch, back = self._batch, 0
        while self._blocks_for(sequence, budget) > batch.pool.free:
            victim = self._last()
            if victim in self._served:
                self._served.remove(victim)
                back += self._given.pop(id(victim))
                if victim.decoding:  # it has the block of this step already
                    size, tokens = batch.model.block_size, batch.clock.tokens(victim)
                    victim.holding.blocks = -(-tokens // size)
            batch.preempt(victim)
            if victim is sequence:
                break
        return back

    def _last(self) -> Sequence:
        """Return the running call that gives way first."""
        batch = self._batch
        if batch.stock and not batch.by_arrival:
            return max(batch.running, key=lambda s: (s.rank, s.key_s, s.arrived_s))
        return batch.running[-1]

    def _blocks_for(self, sequence: Sequence, budget: int) -> int:
        batch = self._batch
        size = batch.model.block_size
        if sequence.decoding:
            return int((batch.clock.tokens(sequence) - 1) % size == 0)
        end = min(sequence.computed + budget, sequence.tokens)
        return -(-end // size) - sequence.holding.blocks

    def _serve(self, sequence: Sequence, budget: int) -> int:
        if sequence.decoding:
            self._batch.pool.take(self._blocks_for(sequence, budget))
            return 1
        return self._batch.give_chunk(sequence, budget)
