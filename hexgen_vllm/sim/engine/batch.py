"""The calls of a simulated engine, running and waiting, and what moves them.

Who moves when is for :mod:`hexgen_vllm.sim.engine.scheduler` to say.

KV of preempted calls is kept in host memory or computed again, by the live engine's rule. Host
memory is taken for unlimited and copies for as fast out as in; both hold up the step that
they are part of. The device's prefix cache is taken to have lost what was preempted by the time
it is wanted, which the live engine learns instead.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.cost import CostFit
from hexgen_vllm.policy.order import LateWatch, demotes
from hexgen_vllm.policy.returns import WorkflowKv
from hexgen_vllm.sim.engine.decode_clock import DecodeClock
from hexgen_vllm.sim.engine.kept import keeper_of, kept_of
from hexgen_vllm.sim.engine.prefix_cache import BlockPool
from hexgen_vllm.sim.engine.pricing import Pricing
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.sim.engine.waiting_queue import ArrivalQueue, KeyQueue, WaitingQueue

_REACH_EVERY_STEPS: Final = 32


class Batch:
    """The calls of one engine: what is in the batch, what waits, and how a call moves between them.

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
        step_tokens: tokens of the present step at most.
        most_running: calls in the batch at most, in the present step.
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
        self.keeper = keeper_of(model, options)
        self.kept = kept_of(model, options)
        self._workflow_kv: WorkflowKv | None = None
        if options.evict_finished_first and model.prefix_caching and not stock:
            self._workflow_kv = WorkflowKv(model.blocks)
        self._now = 0.0
        self._leaving = 0  # tokens of ended calls that the next step copies
        self.step_tokens = model.max_num_batched_tokens
        self.most_running = model.max_num_seqs
        self._late: LateWatch[Sequence] | None = None
        if not stock and demotes(options):
            self._late = LateWatch()
        self._next_reach = 0
        self._admitted = 0

    def begin_step(self, now: float) -> None:
        """Forget what the last step computed."""
        self.chunks, self.missed, self.copied = [], [], self._leaving
        self._leaving, self._now = 0, now

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

    def push(self, sequence: Sequence) -> None:
        """Queue a call that arrives."""
        if self._workflow_kv is not None:
            keys = [link.key for link in sequence.holding.chain]
            self._workflow_kv.used(keys, sequence.workflow_id)
        self.waiting.push(sequence)
        self.queued += 1
        self._watch(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """Queue a call that lost its place."""
        self.waiting.push_back(sequence)
        self.queued += 1
        self._watch(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running call out and queue it again."""
        self._evict(sequence)
        self.push_back(sequence)

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

    def admit(self, budget: int) -> None:
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
        loaded, sequence.loaded_tokens = sequence.loaded_tokens, 0
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = max(there, loaded)
            self.pricing.admitted(sequence.prompt_tokens, sequence.cached_tokens)
        sequence.computed = max(there, min(sequence.saved_tokens, sequence.tokens - 1))
        sequence.saved_tokens = 0
        self.copied += sequence.computed - cached
        sequence.computed = max(sequence.computed, loaded)

    def end_prefill(self, sequence: Sequence, now: float, started: list[Sequence]) -> None:
        """Give a call the token that ends its prefill; add it to ``started`` if it is its first."""
        self.prefilling.remove(sequence)
        sequence.tokens += 1
        if sequence.first_token_s is None:
            sequence.first_token_s = now
            started.append(sequence)
        if sequence.tokens < sequence.total_tokens:
            self.clock.join(sequence)

    def end(self, sequence: Sequence, now: float) -> None:
        """Take out a call that has all its tokens."""
        size, computed = self.model.block_size, sequence.total_tokens - 1
        if self.kept is not None:  # its workflow may want the KV again
            self._leaving += size * self.kept.ended(
                sequence.holding.chain,
                computed // size,
                follows=sequence.tail_s > 0.0,
                latest_start_s=sequence.deadline_s - sequence.tail_s,
                usage=self.pool.usage(),
                rates=self.pricing.rates,
                now=now,
            )
        self.running.remove(sequence)
        sequence.holding.blocks = -(-computed // size)
        self.pool.drop(sequence.holding, computed // size)
        if self._workflow_kv is not None and sequence.final and sequence.workflow_id is not None:
            self.pool.let_go(self._workflow_kv.over(sequence.workflow_id))

    def demote_late(self, now: float) -> None:
        """Put waiting calls that cannot be on time any more behind those that can."""
        watch = self._late
        if watch is None:
            return
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

    def _watch(self, sequence: Sequence) -> None:
        if self._late is not None and sequence.has_deadline:
            self._late.add(sequence, self.pricing.late_from_s(sequence))

    def rekey_waiting(self) -> None:
        """Price what waits at the rates in force."""
        if self.by_arrival:
            return
        for sequence in self.waiting.unordered():
            self.rekey(sequence)

    def rekey(self, sequence: Sequence) -> None:
        """Price a waiting call, and move it to its key."""
        self.pricing.price(sequence, sequence.tokens, sequence.saved_tokens)
        self.waiting.rekey(sequence)
