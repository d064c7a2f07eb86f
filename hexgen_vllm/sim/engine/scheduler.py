"""Who computes what in the next step of a simulated engine: vLLM V1's scheduling, without time.

Running calls first, in order, each with its tokens out of the step's budget and its blocks out of
the pool; the last of them is preempted when blocks run out. Then, if nobody was preempted,
waiting calls while budget, slots and blocks last, each with what the prefix cache has of it, and
only if its whole prompt fits. Order and displacement are the live scheduler's policies.

Waiting calls are in vLLM's own order, or in ours by key. Calls of demoted workflows stay behind all
others, but not for ever.

KV of preempted calls is kept in host memory or computed again, by the live engine's rule. Host
memory is taken for unlimited and copies for as fast out as in; both hold up the step that
they are part of. The device's prefix cache is taken to have lost what was preempted by the time
it is wanted, which the live engine learns instead.

In a step in which KV blocks or tokens are short, calls are served one by one, as vLLM does. Whoever
finds no block for its tokens takes those of the last call in the order, of itself at last. What a
victim had been given in this step goes back to the budget.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.cost import CostFit, ServiceRates
from hexgen_vllm.policy.order import LateWatch, demotes
from hexgen_vllm.policy.retention import CopyRates, Held, RecomputeRates, Retention, weigh
from hexgen_vllm.policy.urgency import UrgencyHeap
from hexgen_vllm.sim.engine.cost import DecodeClock, Pricing
from hexgen_vllm.sim.engine.displacing import SimDisplacer
from hexgen_vllm.sim.engine.kept import KeptRuns
from hexgen_vllm.sim.engine.pacing import Pacer
from hexgen_vllm.sim.engine.prefix_cache import BlockPool
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence

_TIGHT_KEY: Final = attrgetter("paused", "rank", "key_s")  # who is left out gives way first
_KEY: Final = attrgetter("rank", "key_s")
_REACH_EVERY_STEPS: Final = 32


class Demoted:
    """Demoted calls of one engine, in order of arrival.

    As in the live engine, a call that has waited for as long as it may is ordered among the
    others from then on, as if that moment were its deadline.

    Args:
        most_s: seconds that a call may wait.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._calls: deque[tuple[float, Sequence]] = deque()  # when they age, oldest first

    @property
    def ages_s(self) -> float:
        """When the next call ages; ``inf`` if there is none."""
        return self._calls[0][0] if self._calls else float("inf")

    def add(self, sequence: Sequence, now: float) -> None:
        """Note a call that arrives; only a demoted one counts."""
        if sequence.background:
            self._calls.append((now + self._most_s, sequence))

    def aged(self, now: float) -> list[Sequence]:
        """End the demotion of calls that have waited long enough, and return them."""
        found = []
        while self.ages_s <= now:
            deadline_s, sequence = self._calls.popleft()
            if sequence.tokens < sequence.total_tokens:  # it has not ended
                sequence.background = False
                sequence.deadline_s, sequence.tail_s = deadline_s, 0.0
                found.append(sequence)
        return found


class Keeper:
    """Decides about one engine's preempted calls.

    Args:
        tokens_per_s: KV copied each way.
        keep: ``auto``, ``always`` or ``never``.
        block_size: tokens of a KV block.
    """

    def __init__(self, tokens_per_s: float, keep: str, block_size: int) -> None:
        self._rate, self._keep, self._block_size = tokens_per_s, keep, block_size
        self._copy = CopyRates(tokens_per_s, tokens_per_s)

    def keep(self, sequence: Sequence, pool: BlockPool, rates: ServiceRates) -> int:
        """Let a call that is preempted keep its KV if that pays; return the tokens to copy."""
        tokens = sequence.computed
        blocks = max(-(-tokens // self._block_size), 1)
        own = tokens * pool.exclusive(sequence.holding, blocks, ()).held // blocks
        if not self.weigh(tokens, tokens - own, rates).keep:
            return 0
        sequence.saved_tokens = tokens
        return own

    def weigh(self, tokens: int, shared: int, rates: ServiceRates) -> Retention:
        """Return what becomes of ``tokens`` tokens of KV, ``shared`` of them held by others."""
        again = RecomputeRates(rates.prefill_token_s, rates.prefill_context_s)
        return weigh(Held(tokens, shared, 1.0), again, self._copy, self._keep)

    def seconds(self, tokens: int) -> float:
        """Return the time of copying ``tokens`` tokens one way."""
        return tokens / self._rate


def keeper_of(model: EngineModel, options: EngineOptions) -> Keeper | None:
    """Return the keeper of an engine, ``None`` where KV is always computed again."""
    rate = model.kv_copy_tokens_per_s
    return None if rate is None else Keeper(rate, options.keep_kv, model.block_size)


def kept_of(model: EngineModel, options: EngineOptions) -> KeptRuns | None:
    """Return the host memory of an engine for ended calls, ``None`` where none is kept."""
    rate, blocks = model.kv_copy_tokens_per_s, model.host_kv_tokens // model.block_size
    if rate is None or not blocks or not (options.keep_ended_kv and model.prefix_caching):
        return None
    return KeptRuns(blocks, model.block_size, rate, options.keep_kv)


class WaitingQueue(Protocol):
    """What an engine asks of its queue."""

    def push(self, sequence: Sequence) -> None:
        """Add a call that arrives."""

    def push_back(self, sequence: Sequence) -> None:
        """Add a call that lost its place in the batch."""

    def peek(self) -> Sequence:
        """Return the next call; the queue must not be empty."""

    def pop(self) -> Sequence:
        """Take out the next call; the queue must not be empty."""

    def rekey(self, sequence: Sequence) -> None:
        """Move a queued call to its present key."""

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next, in order."""

    def unordered(self) -> list[Sequence]:
        """Return what is queued, in no particular order."""

    def __contains__(self, sequence: object) -> bool:
        """Return whether a call is queued."""


class ArrivalQueue:
    """Stock vLLM, ``fcfs``: in order of arrival, calls that lost their place in front."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()

    def push(self, sequence: Sequence) -> None:
        """Add a call at the end."""
        self._queue.append(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """Add a call in front."""
        self._queue.appendleft(sequence)

    def pop(self) -> Sequence:
        """Take out the next call."""
        return self._queue.popleft()

    def peek(self) -> Sequence:
        """Return the next call."""
        return self._queue[0]

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._queue

    def rekey(self, sequence: Sequence) -> None:
        """Do nothing: keys do not count."""

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next."""
        return list(islice(self._queue, most))

    def unordered(self) -> list[Sequence]:
        """Return what is queued."""
        return list(self._queue)


class KeyQueue:
    """By key, then arrival, over the live engine's own heap."""

    def __init__(self) -> None:
        self._heap: UrgencyHeap[Sequence] = UrgencyHeap()

    def peek(self) -> Sequence:
        """Return the next call."""
        return self._heap.peek()

    def pop(self) -> Sequence:
        """Take out the next call."""
        return self._heap.pop()

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next, in order."""
        return self._heap.first(most)

    def unordered(self) -> list[Sequence]:
        """Return what is queued."""
        return self._heap.unordered()

    def push(self, sequence: Sequence) -> None:
        """Add a call."""
        sequence.queued_start_s = sequence.latest_start_s
        self._heap.push(sequence, sequence.key_s, sequence.arrived_s, sequence.rank)

    def push_back(self, sequence: Sequence) -> None:
        """Add a call that lost its place."""
        self.push(sequence)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._heap

    def rekey(self, sequence: Sequence) -> None:
        """Move a queued call to its present key."""
        sequence.queued_start_s = sequence.latest_start_s
        self._heap.rekey(sequence, sequence.key_s, sequence.rank)


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


class Batch:
    """The calls of one engine.

    Attributes:
        model: what the engine is.
        options: order and displacement.
        stock: it is stock vLLM.
        by_arrival: it serves first come, first served, as stock vLLM does.
        running: the batch, in vLLM's order.
        prefilling: those of it that do not decode yet.
        waiting: calls not in the batch.
        queued: their number.
        pool: KV blocks.
        clock: decoding calls.
        pricing: keys.
        chunks: calls that compute prompt tokens in the present step.
        missed: decoding calls that get no token in it.
        evicted: calls preempted for it.
        copied: tokens whose KV goes to the host or comes back in it.
        preemptions: preemptions so far.
        pacer: leaves calls without deadline out of steps; ``None`` in a stock engine.
        step_tokens: tokens of the present step at most.
        most_running: calls in the batch at most, in the present step.
        displacer: makes room for urgent calls; ``None`` in a stock engine.
        keeper: copies KV of preempted calls to the host; ``None`` where it is computed again.
        kept: KV of ended calls on the host; ``None`` where none is kept.

    Args:
        model: what the engine is.
        options: order and displacement.
        stock: stock vLLM: ``fcfs``, or for any other order ``priority``; never displaces.
        fit: learns the step cost; without one it is known.
    """

    def __init__(
        self,
        model: EngineModel,
        options: EngineOptions,
        *,
        stock: bool = False,
        fit: CostFit | None = None,
    ) -> None:
        self.model, self.options, self.stock = model, options, stock
        self.by_arrival = stock and options.order == "fcfs"
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.waiting: WaitingQueue = ArrivalQueue() if self.by_arrival else KeyQueue()
        self.queued = 0
        self.pool = BlockPool(model.blocks, caching=model.prefix_caching)
        self.clock = DecodeClock(model.block_size)
        self.pricing = Pricing(options, model.cost, model.max_num_batched_tokens, fit)
        self.chunks: list[Sequence] = []
        self.missed: list[Sequence] = []
        self.evicted: list[Sequence] = []
        self.copied = 0
        self.preemptions = 0
        self.watermark_blocks = int(model.watermark * model.blocks)
        self.displacer = None if stock else SimDisplacer(self)
        self.keeper = keeper_of(model, options)
        self.kept = kept_of(model, options)
        self._now = 0.0
        self._leaving = 0  # tokens of ended calls that the next step copies
        self.pacer = None if stock else Pacer(self)
        self.step_tokens = model.max_num_batched_tokens
        self.most_running = model.max_num_seqs
        self._late: LateWatch[Sequence] | None = None
        if not stock and demotes(options):
            self._late = LateWatch()
        self._next_reach = 0
        self._demoted = Demoted(options.background_max_wait_s)
        self._admitted = 0
        self._tight = False  # the present step was scheduled call by call

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a call."""
        sequence.arrived_s = now
        if not self.stock:
            self._demoted.add(sequence, now)
        self.pricing.price(sequence, sequence.tokens, 0)
        self._push(sequence)

    def schedule(self, now: float) -> Plan:
        """Decide what the next step computes."""
        self.chunks, self.missed, self.copied = [], [], self._leaving
        self._leaving, self._now = 0, now
        held: list[Sequence] = []
        for sequence in self._demoted.aged(now):
            if sequence not in self.running:
                self.rekey(sequence)
        if self._late is not None:
            self._demote_late(self._late, now)
        if self.pacer is not None:
            self.pacer.promote()
        if self.queued and self.displacer is not None:
            held = self.displacer.displace(now)
        if self.pacer is not None:
            held += self.pacer.pace(now)
        budget, preempted = self._schedule_running()
        if not preempted and budget > 0 and self.queued:
            self._schedule_waiting(budget)
        for sequence in held:
            self._push_back(sequence)
        chunks = bool(self.chunks)
        runs = chunks or self.clock.size > len(self.missed)
        return Plan(runs, chunks or preempted or bool(held) or bool(self.missed))

    def end(self, steps: int, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """Account for ``steps`` steps that ended; return calls that started and that finished."""
        clock = self.clock
        started: list[Sequence] = []
        if steps > 1:
            self.pool.take(clock.blocks(1, steps - 1))
        clock.advance(steps)
        for sequence in self.missed:
            clock.missed(sequence)
        finished = []
        for sequence in self.chunks:
            sequence.computed += sequence.chunk
            if sequence.computed == sequence.tokens:
                self._end_prefill(sequence, now, started)
                if not sequence.decoding:
                    finished.append(sequence)
        finished.extend(clock.ended())
        if len(finished) > 1:
            finished = self._in_output_order(finished)
        for sequence in finished:
            self._leave(sequence, now)
            self._remove(sequence)
        self.evicted = []
        return started, finished

    def _in_output_order(self, finished: list[Sequence]) -> list[Sequence]:
        """Return calls that end together in the order in which vLLM frees their blocks."""
        if self.stock:
            return [s for s in self.running if s in finished]
        for sequence in finished:
            self.pricing.price(sequence, sequence.tokens, sequence.tokens - 1)
        if self._tight:
            return sorted(finished, key=_KEY)
        return sorted(finished, key=lambda s: (s in self.chunks, s.rank, s.key_s))

    # Running calls

    def _schedule_running(self) -> tuple[int, bool]:
        """Give running calls their tokens; return the budget left and whether any was preempted."""
        clock, pool, budget = self.clock, self.pool, self.step_tokens
        self._tight = False
        if not self.prefilling:
            blocks = clock.blocks(0, 1)
            if clock.size <= budget and blocks <= pool.free:
                pool.take(blocks)
                return budget - clock.size, False
        elif pool.free >= clock.size + len(self.prefilling) + budget // self.model.block_size + 1:
            pool.take(clock.blocks(0, 1))
            budget -= clock.size
            for sequence in self._in_order(self.prefilling):
                budget -= self.give_chunk(sequence, budget)
            return budget, False
        self._tight = True
        return TightStep(self).schedule(budget)

    def _in_order(self, calls: list[Sequence]) -> list[Sequence]:
        if self.stock or len(calls) < 2:
            return calls
        self.reprice()
        return sorted(calls, key=_KEY)

    def give_chunk(self, sequence: Sequence, budget: int) -> int:
        """Let ``sequence`` compute prompt tokens in this step; return how many."""
        sequence.chunk = chunk = min(sequence.tokens - sequence.computed, budget)
        if chunk:
            size, end = self.model.block_size, sequence.computed + chunk
            self.pool.grow(sequence.holding, -(-end // size))
            self.pool.register(sequence.holding, end // size)
            self.chunks.append(sequence)
        return chunk

    def reprice(self) -> None:
        """Set the keys of the batch to what is left of each call."""
        clock, price = self.clock, self.pricing.price
        for sequence in self.running:
            tokens = clock.tokens(sequence)
            price(sequence, tokens, tokens - 1 if sequence.decoding else sequence.computed)

    # Calls come and go

    def _schedule_waiting(self, budget: int) -> None:
        """Admit waiting calls while there is budget, a slot, and room for their whole prompt."""
        waiting, size, pool = self.waiting, self.model.block_size, self.pool
        while budget > 0 and self.queued and len(self.running) < self.most_running:
            sequence = waiting.peek()
            hit = pool.lookup(sequence.holding.chain, (sequence.tokens - 1) // size)
            needed = -(-sequence.tokens // size) - hit.blocks + hit.idle
            if needed + (self.watermark_blocks if self.running else 0) > pool.free:
                return
            waiting.pop()
            self.queued -= 1
            pool.adopt(sequence.holding, hit.blocks)
            self._admitted += 1
            sequence.number = self._admitted
            self._restore(sequence, hit.blocks)
            self.running.append(sequence)
            self.prefilling.append(sequence)
            budget -= self.give_chunk(sequence, budget)

    def _restore(self, sequence: Sequence, blocks: int) -> None:
        """Note what of an admitted call's KV is there, from the cache or the host."""
        size, kept = self.model.block_size, self.kept
        cached = there = blocks * size
        if kept is not None:
            chain = sequence.holding.chain
            if sequence.cached_tokens < 0:
                kept.came(chain, blocks, self._now)
            there = kept.found(chain, blocks, (sequence.tokens - 1) // size) * size
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = there
            self.pricing.admitted(sequence.prompt_tokens, there)
        sequence.computed = max(there, min(sequence.saved_tokens, sequence.tokens - 1))
        sequence.saved_tokens = 0
        self.copied += sequence.computed - cached

    def preempt(self, sequence: Sequence) -> None:
        """Take a running call out and queue it again."""
        self._evict(sequence)
        self._push_back(sequence)

    def _push_back(self, sequence: Sequence) -> None:
        self.waiting.push_back(sequence)
        self.queued += 1
        self._watch(sequence)

    def _push(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)
        self.queued += 1
        self._watch(sequence)

    def _watch(self, sequence: Sequence) -> None:
        if self._late is not None and sequence.has_deadline:
            self._late.add(sequence, self.pricing.late_from_s(sequence))

    def _demote_late(self, watch: LateWatch[Sequence], now: float) -> None:
        """Put waiting calls that cannot be on time any more behind those that can."""
        if self.clock.steps >= self._next_reach:
            self._next_reach = self.clock.steps + _REACH_EVERY_STEPS
            tight = [s for s in self.running if s.has_deadline]
            self.pricing.reach(len(tight), sum(self.clock.tokens(s) for s in tight))
        for sequence in watch.late(now):
            if not sequence.has_deadline or sequence not in self.waiting:
                continue
            from_s = self.pricing.late_from_s(sequence)
            if now > from_s:
                sequence.late = True
                self.rekey(sequence)
            else:
                watch.add(sequence, from_s)  # the engine has become faster since

    def displace(self, sequence: Sequence) -> None:
        """Take a running call out for a more urgent one; it is not queued yet."""
        sequence.displacements += 1
        self._evict(sequence)

    def _evict(self, sequence: Sequence) -> None:
        """Preempt a running call; what it computed is dropped or goes to the host."""
        size, holding, started = self.model.block_size, sequence.holding, 0
        self.running.remove(sequence)
        self.evicted.append(sequence)
        if sequence in self.chunks:  # vLLM has given its blocks their hashes already
            self.chunks.remove(sequence)
            started = sequence.chunk
        if sequence.decoding:
            self.clock.leave(sequence)
            holding.blocks = max(holding.blocks, -(-sequence.computed // size))
        elif sequence.paused:
            sequence.paused = False
        else:
            self.prefilling.remove(sequence)
        if self.keeper is not None:
            self.copied += self.keeper.keep(sequence, self.pool, self.pricing.rates)
        self.pool.drop_keeping(holding, (sequence.computed + started) // size)
        sequence.computed = 0
        self.preemptions += 1
        self.pricing.price(sequence, sequence.tokens, sequence.saved_tokens)

    def pause(self, sequence: Sequence) -> None:
        """Leave a running call out of steps; its KV stays."""
        sequence.paused = True
        if sequence.decoding:
            self.clock.leave(sequence)
            holding = sequence.holding
            holding.blocks = max(holding.blocks, -(-sequence.computed // self.model.block_size))
        else:
            self.prefilling.remove(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a call that was left out take part in steps again."""
        sequence.paused = False
        if sequence.computed >= sequence.tokens - 1 and sequence.first_token_s is not None:
            self.clock.join(sequence)
        else:
            self.prefilling.append(sequence)

    def _end_prefill(self, sequence: Sequence, now: float, started: list[Sequence]) -> None:
        self.prefilling.remove(sequence)
        sequence.tokens += 1
        if sequence.first_token_s is None:
            sequence.first_token_s = now
            started.append(sequence)
        if sequence.tokens < sequence.total_tokens:
            self.clock.join(sequence)

    def _leave(self, sequence: Sequence, now: float) -> None:
        """Have the KV of a call that ends copied to the host if its workflow may want it."""
        if self.kept is None:
            return
        size = self.model.block_size
        self._leaving += size * self.kept.ended(
            sequence.holding.chain,
            (sequence.total_tokens - 1) // size,
            follows=sequence.tail_s > 0.0,
            latest_start_s=sequence.deadline_s - sequence.tail_s,
            rates=self.pricing.rates,
            now=now,
        )

    def _remove(self, sequence: Sequence) -> None:
        size, computed = self.model.block_size, sequence.total_tokens - 1
        self.running.remove(sequence)
        sequence.holding.blocks = -(-computed // size)
        self.pool.drop(sequence.holding, computed // size)

    def rekey_waiting(self) -> None:
        """Price what waits at the rates in force."""
        if self.by_arrival:
            return
        for sequence in self.waiting.unordered():
            self.rekey(sequence)

    def rekey(self, sequence: Sequence) -> None:
        self.pricing.price(sequence, sequence.tokens, sequence.saved_tokens)
        self.waiting.rekey(sequence)
