"""Who computes what in the next step of a simulated engine: vLLM V1's scheduling, without time.

Running calls first, in order, each with its tokens out of the step's budget and its blocks out of
the pool; the last of them is preempted when blocks run out. Then, if nobody was preempted,
waiting calls while budget, slots and blocks last, each with what the prefix cache has of it, and
only if its whole prompt fits. Order and displacement are the live scheduler's policies.

Waiting calls are in vLLM's own order, or in ours by key. Calls of demoted workflows stay behind all
others, but not for ever.

In a step in which KV blocks or tokens are short, calls are served one by one, as vLLM does. Whoever
finds no block for its tokens takes those of the last call in the order, of itself at last. What a
victim had been given in this step goes back to the budget.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Final, NamedTuple

from hexgen_vllm.sim.engine.batch import Batch
from hexgen_vllm.sim.engine.displacer import SimDisplacer
from hexgen_vllm.sim.engine.pacer import Pacer
from hexgen_vllm.sim.engine.sequence import Sequence
from hexgen_vllm.sim.engine.waiting_queue import Demoted

_TIGHT_KEY: Final = attrgetter("paused", "rank", "key_s")  # who is left out gives way first
_KEY: Final = attrgetter("rank", "key_s")


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
            batch.running.sort(key=_TIGHT_KEY)
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


class Plan(NamedTuple):
    """The next step: whether there is one, and whether the one after it will be different."""

    runs: bool
    single: bool


class Scheduler:
    """Schedules the steps of one engine.

    Attributes:
        displacer: makes room for urgent calls; ``None`` in a stock engine.
        pacer: leaves calls without deadline out of steps; ``None`` in a stock engine.

    Args:
        batch: the engine's calls.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.displacer = None if batch.stock else SimDisplacer(batch)
        self.pacer = None if batch.stock else Pacer(batch)
        self._demoted = Demoted(batch.options.background_max_wait_s)
        self._tight = False  # the present step was scheduled call by call

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a call."""
        batch = self._batch
        sequence.arrived_s = now
        if not batch.stock:
            self._demoted.add(sequence, now)
        batch.pricing.price(sequence, sequence.tokens, 0)
        batch.push(sequence)

    def schedule(self, now: float) -> Plan:
        """Decide what the next step computes."""
        batch, held = self._batch, list[Sequence]()
        batch.begin_step(now)
        for sequence in self._demoted.aged(now):
            if sequence not in batch.running:
                batch.rekey(sequence)
        batch.demote_late(now)
        if self.pacer is not None:
            self.pacer.promote()
        if batch.queued and self.displacer is not None:
            held = self.displacer.displace(now)
        if self.pacer is not None:
            self.pacer.pace(now)
        budget, preempted = self._schedule_running()
        if not preempted and budget > 0 and batch.queued:
            batch.admit(budget)
        for sequence in held:
            batch.push_back(sequence)
        chunks = bool(batch.chunks)
        runs = chunks or batch.clock.size > len(batch.missed)
        return Plan(runs, chunks or preempted or bool(held) or bool(batch.missed))

    def end(self, steps: int, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """Account for ``steps`` steps that ended; return calls that started and that finished."""
        batch = self._batch
        clock, started = batch.clock, list[Sequence]()
        if steps > 1:
            batch.pool.take(clock.blocks(1, steps - 1))
        clock.advance(steps)
        for sequence in batch.missed:
            clock.missed(sequence)
        finished = []
        for sequence in batch.chunks:
            sequence.computed += sequence.chunk
            if sequence.computed == sequence.tokens:
                batch.end_prefill(sequence, now, started)
                if not sequence.decoding:
                    finished.append(sequence)
        finished.extend(clock.ended())
        if len(finished) > 1:
            finished = self._in_output_order(finished)
        for sequence in finished:
            batch.end(sequence, now)
        batch.evicted = []
        return started, finished

    def _in_output_order(self, finished: list[Sequence]) -> list[Sequence]:
        """Return calls that end together in the order in which vLLM frees their blocks."""
        batch = self._batch
        if batch.stock:
            return [s for s in batch.running if s in finished]
        for sequence in finished:
            batch.pricing.price(sequence, sequence.tokens, sequence.tokens - 1)
        if self._tight:
            return sorted(finished, key=_KEY)
        return sorted(finished, key=lambda s: (s in batch.chunks, s.rank, s.key_s))

    def _schedule_running(self) -> tuple[int, bool]:
        """Give running calls their tokens; return the budget left and whether any was preempted."""
        batch = self._batch
        clock, pool, budget = batch.clock, batch.pool, batch.step_tokens
        self._tight = False
        if not batch.prefilling:
            blocks = clock.blocks(0, 1)
            if clock.size <= budget and blocks <= pool.free:
                pool.take(blocks)
                return budget - clock.size, False
        elif pool.free >= clock.size + len(batch.prefilling) + budget // batch.model.block_size + 1:
            pool.take(clock.blocks(0, 1))
            budget -= clock.size
            for sequence in self._in_order(batch.prefilling):
                budget -= batch.give_chunk(sequence, budget)
            return budget, False
        self._tight = True
        return TightStep(batch).schedule(budget)

    def _in_order(self, calls: list[Sequence]) -> list[Sequence]:
        batch = self._batch
        if batch.stock or len(calls) < 2:
            return calls
        batch.reprice()
        return sorted(calls, key=_KEY)
