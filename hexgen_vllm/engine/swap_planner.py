"""The scheduler's half of keeping KV in host memory: whose, where, and when it goes back.

A preempted call's blocks are saved in the step that frees them. When it is admitted again, what
the prefix cache still holds stays where it is and the rest is loaded, the partly filled last block
included. Leading blocks that other running calls hold are not saved: they survive with those. If
they are gone nevertheless, the copy is of no use and the call is computed again.

How many tokens. The KV of ``num_computed_tokens`` tokens is there once the step in flight has
ended, and workers save after it. Of drafted tokens in it some may be rejected; their KV is saved
too and never loaded, because a load ends before the last token that the call really has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hexgen_vllm.engine.host_pool import HostCopy, HostPool
from hexgen_vllm.engine.requests import ServiceRates
from hexgen_vllm.engine.swap_ledger import SwapLedger
from hexgen_vllm.engine.swap_messages import Load, Save, SwapMeta
from hexgen_vllm.policy.retention import CopyRates, Held, RecomputeRates, Retention, weigh

_BESIDE_FROM_S: Final = 0.002


class SwapPlanner:
    """Decides what is copied in each step.

    Args:
        pool: the books of the host memory.
        block_size: tokens per block.
        block_bytes: bytes per block on all workers together.
        keep: ``auto``, ``always`` or ``never``, see :func:`hexgen_vllm.policy.retention.weigh`.
        beside: whether workers can load beside the forward pass.

    Attributes:
        ledger: what was copied, and how fast.
        beside_from_s: a load that takes this long runs beside the forward pass, which costs its
            call a step or two; ``None`` is never.
    """

    def __init__(
        self, pool: HostPool, *, block_size: int, block_bytes: int, keep: str, beside: bool
    ) -> None:
        self.pool = pool
        self.ledger = SwapLedger(block_size, block_bytes)
        self.beside_from_s = _BESIDE_FROM_S if beside else None
        self._block_size, self._block_bytes, self._keep = block_size, block_bytes, keep
        self._saves: dict[str, Save] = {}
        self._loads: list[Load] = []

    # Asked by the scheduler.

    def redo_s(self, tokens: int, shared: int, rates: ServiceRates) -> float:
        """Return the seconds that preempting a call costs the engine.

        Args:
            tokens: tokens whose KV it holds.
            shared: how many of them other running calls hold, too.
            rates: how fast the engine computes.
        """
        decision = self._weigh(tokens, shared, rates)
        fits = self._blocks(tokens - shared) <= self.pool.space.capacity
        return decision.redo_s if fits else decision.recompute_s

    def preempting(
        self, request: Any, blocks: Sequence[Any], rates: ServiceRates, now: float
    ) -> int:
        """Plan the copy of a call whose blocks are about to be freed, if that pays.

        Args:
            request: the call.
            blocks: its KV blocks.
            rates: how fast the engine computes.
            now: the scheduler's clock, seconds.

        Returns:
            The tokens whose KV will be there again without computing, 0 if none are kept.
        """
        tokens = 0 if request.skip_reading_prefix_cache else request.num_computed_tokens
        last = self._blocks(tokens)
        first = _leading_shared(blocks[:last])
        own = tokens - first * self._block_size
        if own <= 0:
            return 0
        decision = self._weigh(tokens, tokens - own, rates)
        if not decision.keep:
            self.ledger.refused(own, decision.reason)
            return 0
        copy = HostCopy(request.request_id, request.hexgen, tokens, first, decision.recompute_s)
        if not self._store(copy, last - first, now):
            self.ledger.refused(own, "full")
            return 0
        ids = tuple(block.block_id for block in blocks[first:last])
        self._saves[request.request_id] = Save(ids, copy.extents)
        self.ledger.saved(own, last - first)
        return int(tokens)

    def _store(self, copy: HostCopy, blocks: int, now: float) -> bool:
        evicted = self.pool.put(copy, blocks, now)
        for other in evicted or ():
            self._gone(other, "evicted")
        return evicted is not None

    # Asked by the connector.

    def restorable(self, request: Any, local: int) -> tuple[int, bool]:
        """Return how many tokens can be loaded, and whether beside the forward pass.

        Args:
            request: a call that is about to be admitted.
            local: its tokens that the prefix cache holds, whole blocks.
        """
        copy = self.pool.copies.get(request.request_id)
        if copy is None:
            return 0, False
        if local < copy.first_block * self._block_size:
            self.forget(request.request_id, "headless")
            return 0, False
        copy.local = local
        tokens = min(copy.tokens, request.num_tokens - 1) - local
        return (tokens, self._runs_beside(tokens)) if tokens > 0 else (0, False)

    def allocated(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        """Plan the load of ``tokens`` tokens into the blocks of a call; its copy ends here."""
        copy = self.pool.copies.get(request.request_id)
        if copy is None:
            return
        first = copy.local // self._block_size
        last = self._blocks(copy.local + tokens) if tokens > 0 else first
        wanted = min(copy.tokens, request.num_tokens - 1)
        self.ledger.resumed(copy, wanted, max(tokens, 0), last - first)
        copy.call.kept_tokens = 0
        if last > first:
            ids, extents = tuple(block_ids[first:last]), tuple(copy.records(first, last))
            beside = self._runs_beside(tokens)
            self._loads.append(Load(request.request_id, ids, extents, beside))
        self.pool.load(request.request_id)

    def forget(self, request_id: str, why: str = "finished") -> None:
        """Drop the copy of a call, if there is one."""
        copy = self.pool.drop(request_id)
        if copy is not None:
            self._gone(copy, why)

    def forget_all(self, why: str) -> None:
        """Drop all copies."""
        for request_id in list(self.pool.copies):
            self.forget(request_id, why)

    def end_step(self) -> SwapMeta:
        """Return what this step copies; the next one starts empty."""
        meta = SwapMeta(list(self._saves.values()), self._loads)
        self._saves, self._loads = {}, []
        self.pool.step_ends()
        return meta

    def stats(self) -> dict[str, Any]:
        """Return the state of the pool and the ledger as plain JSON values."""
        return {
            "capacity_bytes": self.pool.space.capacity * self._block_bytes,
            "used_bytes": self.pool.used * self._block_bytes,
            "copies": len(self.pool.copies),
            **self.ledger.stats(),
        }

    def _weigh(self, tokens: int, shared: int, rates: ServiceRates) -> Retention:
        held = Held(tokens, shared, self._block_bytes / self._block_size)
        again = RecomputeRates(rates.prefill_token_s, rates.prefill_context_s, self.ledger.survival)
        copy = CopyRates(
            self.ledger.out.rate(), self.ledger.back.rate(), self.beside_from_s is not None
        )
        return weigh(held, again, copy, self._keep)

    def _runs_beside(self, tokens: int) -> bool:
        if self.beside_from_s is None:
            return False
        num_bytes = self._blocks(tokens) * self._block_bytes
        rates = CopyRates(in_bytes_per_s=self.ledger.back.rate())
        return rates.copy_s(0, num_bytes) >= self.beside_from_s

    def _blocks(self, tokens: int) -> int:
        return int(-(-tokens // self._block_size))

    def _gone(self, copy: HostCopy, why: str) -> None:
        self._saves.pop(copy.request_id, None)  # planned in this very step: never start it
        copy.call.kept_tokens = 0
        self.ledger.dropped(copy, why)


def _leading_shared(blocks: Sequence[Any]) -> int:
    """Return how many blocks from the start other running calls hold, too."""
    for count, block in enumerate(blocks):
        if block.ref_cnt < 2:
            return count
    return len(blocks)
