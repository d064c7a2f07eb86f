"""The scheduler's half of keeping KV in host memory: whose, where, and when it goes back.

A preempted call's blocks are saved in the step that frees them. When it is admitted again, what
the prefix cache still holds stays where it is and the rest is loaded, the partly filled last block
included. Leading blocks that other running calls hold may be left out of the copy: they survive
with those. If they are gone nevertheless, it is of no use and the call is computed again.

How many tokens. The KV of ``num_computed_tokens`` tokens is there once the step in flight has
ended, and workers save after it. Of drafted tokens in it some may be rejected; their KV is saved
too and never loaded, because a load ends before the last token that the call really has.

Ended calls. What a call leaves when it ends is found by the hashes of its blocks in vLLM's prefix
cache until new calls take the blocks. If its workflow may come back after that, the blocks are
saved in the step that may give them away, like those of a preempted call, and found by hash by any
call that comes with the prefix. They go when their workflow says that it is over, or for what is
worth more. Calls that come back teach how often and how soon that happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hexgen_vllm.engine.swap.ledger import SwapLedger
from hexgen_vllm.engine.swap.messages import (
    Load,
    Save,
    SwapMeta,
)
from hexgen_vllm.engine.swap.pool import (
    Extent,
    HostCopy,
    HostPool,
    KeptPrefix,
    Owner,
    TailKey,
)
from hexgen_vllm.policy.retention import (
    ASSUMED_BYTES_PER_S,
    BESIDE_FROM_S,
    CopyRates,
    Held,
    RecomputeRates,
    leaves_head,
    pays_to_keep,
    weigh,
)
from hexgen_vllm.policy.returns import CallKind, End, Plans
from hexgen_vllm.policy.service_rates import ServiceRates


class EndedCall(NamedTuple):
    """What is known of a call that has ended.

    Attributes:
        kind: what it was.
        plans: what was said of what follows.
        workflow_id: whose it was.
        latest_start_s: when the workflow's next call must begin, absolute seconds.
        usage: share of the device's KV that calls hold, this one too.
    """

    kind: CallKind
    plans: Plans
    workflow_id: str
    latest_start_s: float
    usage: float


class Leaving(NamedTuple):
    """A block that an ended call leaves: which of its blocks, and what it is found by."""

    place: int
    name: Any


class KvMatch(NamedTuple):
    """What a call has found of ended ones: from which block, and which records.

    The last one may not be full; it is found by ``tail``.
    """

    first: int
    tokens: int
    records: list[int]
    tail: TailKey | None


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
        self.beside_from_s = BESIDE_FROM_S if beside else None
        self._block_size, self._block_bytes, self._keep = block_size, block_bytes, keep
        self._saves: dict[str, Save] = {}
        self._loads: list[Load] = []
        self._matched: dict[str, KvMatch] = {}  # by calls to be admitted
        self._expected: dict[str, End] = {}  # what calls came back for
        self._beside: set[str] = set()  # loads beside the forward pass that are under way
        self._abandoned: set[str] = set()  # of these, those that nobody waits for any more
        self._fence = self._renew = False
        self._leaving_bytes, self._leaving_s = 0.0, 0.0  # saves on their way, and as of when

    # Asked by the scheduler.

    def redo_s(self, tokens: int, shared: int, rates: ServiceRates) -> float:
        """Return the seconds that preempting a call costs the engine.

        Args:
            tokens: tokens whose KV it holds.
            shared: how many of them other running calls hold, too.
            rates: how fast the engine computes.
        """
        held = Held(tokens, shared, self._block_bytes / self._block_size)
        decision = weigh(held, self._again(rates), self._copying(), self._keep)
        fits = self._blocks(tokens - shared) <= self.pool.space.capacity
        return decision.redo_s if fits else decision.recompute_s

    def preempting(
        self, request: Any, owner: Owner, blocks: Sequence[Any], rates: ServiceRates, now: float
    ) -> int:
        """Plan the copy of a call whose blocks are about to be freed, if that pays.

        Args:
            request: the call.
            owner: its state, or what stands for it.
            blocks: its KV blocks.
            rates: how fast the engine computes.
            now: the scheduler's clock, seconds.

        Returns:
            The tokens whose KV will be there again without computing, 0 if none are kept.
        """
        tokens = 0 if request.skip_reading_prefix_cache else request.num_computed_tokens
        held_blocks = blocks[: self._blocks(tokens)]
        shared = _leading_shared(held_blocks)
        own = tokens - shared * self._block_size
        if own <= 0:
            return 0
        held = Held(tokens, tokens - own, self._block_bytes / self._block_size)
        again, copying = self._again(rates), self._copying(self._leaving(now))
        # What ended calls left may give way to a shared head, copies of others must not.
        roomy = len(held_blocks) <= self.pool.space.free + len(self.pool.kept)
        by_rates = self._keep == "auto" and leaves_head(held, again, copying)
        for first in dict.fromkeys((0, shared) if roomy and not by_rates else (shared,)):
            decision = weigh(held, again, copying, self._keep, whole=not first)
            if not decision.keep:
                self.ledger.refused(own, decision.reason)
                return 0
            saves_s = decision.recompute_s
            copy = HostCopy(request.request_id, owner, tokens, first, shared, saves_s)
            if self._store(copy, held_blocks[first:], now):
                return int(tokens)
        self.ledger.refused(own, "full")
        return 0

    def _store(self, copy: HostCopy, blocks: Sequence[Any], now: float) -> bool:
        tokens = copy.tokens - copy.first_block * self._block_size
        evicted = self.pool.put(copy, len(blocks), now)
        if evicted is None:
            return False
        self._evicted(evicted)
        ids = tuple(block.block_id for block in blocks)
        self._saves[copy.request_id] = Save(ids, copy.extents)
        self._left(tokens, len(blocks), now)
        return True

    def _left(self, tokens: int, blocks: int, now: float) -> None:
        self.ledger.saved(tokens, blocks)
        self._leaving_bytes = self._leaving(now) + blocks * self._block_bytes
        self._leaving_s = now

    def _evicted(self, evicted: Sequence[HostCopy | KeptPrefix]) -> None:
        for other in evicted:
            if isinstance(other, HostCopy):
                self._end(other)
                self.ledger.dropped(other, "evicted")
            else:
                self._saves.pop(_name_of(other), None)

    def ended(
        self, request: Any, call: EndedCall, blocks: Sequence[Any], rates: ServiceRates, now: float
    ) -> None:
        """Plan the copy of what an ended call leaves, if that pays; its blocks are freed next.

        Args:
            request: the call, answered.
            call: what is known of it.
            blocks: its KV blocks.
            rates: how fast the engine computes.
            now: the scheduler's clock, seconds.
        """
        pool, size = self.pool, self._block_size
        tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        hashes = list(request.block_hashes[: tokens // size])
        if not hashes or self._otherwise_hashed(request):
            return
        end = End(call.kind, now, call.plans, len(hashes) * size, call.usage)
        if call.plans.follows is False:
            self._workflow_over(call.workflow_id, hashes)
            return
        pool.returns.ended(hashes[-1], end, now)
        used = list(dict.fromkeys(pool.kept[h].prefix for h in hashes if h in pool.kept))
        for prefix in used:
            if prefix.workflow_id != call.workflow_id:
                prefix.workflow_id = None
            prefix.end, prefix.latest_start_s = end, call.latest_start_s
        tail = () if request.mm_features else tuple(request.all_token_ids[end.tokens : tokens])
        key = TailKey(hashes[-1])
        known = pool.kept.get(key)
        if known is not None and known.prefix.tail[: len(tail)] == tail:
            tail = ()  # all of it is there
        parts = [Leaving(i, h) for i, h in enumerate(hashes) if h not in pool.kept]
        again = replace(self._again(rates), survival=self.ledger.returns.share(call.usage))
        if self._wants(parts, tail, tokens, pool.returns.chance(end, now), again, now):
            self._leave(end, call, (parts, blocks, used), again, now)
            if tail:
                if known is not None:
                    self._drop(known.prefix)
                rest = [Leaving(len(hashes), key)]
                self._leave(end, call, (rest, blocks, used), again, now, tail)
        pool.used_again(used)

    def _wants(
        self,
        parts: Sequence[Leaving],
        tail: tuple[int, ...],
        tokens: int,
        chance: float,
        again: RecomputeRates,
        now: float,
    ) -> bool:
        """Return whether blocks and a tail that no copy has are worth one."""
        size = self._block_size
        last = tokens if tail or not parts else (parts[-1].place + 1) * size
        lost, each = len(parts) * size + len(tail), self._block_bytes / size
        copying = self._copying(self._leaving(now))
        return pays_to_keep(lost, last, chance, again, copying, each, self._keep)

    def _leave(
        self,
        end: End,
        call: EndedCall,
        left: tuple[Sequence[Leaving], Sequence[Any], list[KeptPrefix]],
        again: RecomputeRates,
        now: float,
        tail: tuple[int, ...] = (),
    ) -> None:
        """Plan the copy of blocks that an ended call leaves, if there is room for them."""
        parts, blocks, used = left
        if not parts:
            return
        tokens = len(tail) or len(parts) * self._block_size
        saves_s = again.seconds(tokens, parts[-1].place * self._block_size + tokens)
        hashes = tuple(part.name for part in parts)
        prefix = KeptPrefix(end, call.workflow_id, call.latest_start_s, saves_s, hashes, tail=tail)
        evicted = self.pool.keep(prefix, used, now)
        if evicted is None:
            return
        self._evicted(evicted)
        ids = tuple(blocks[part.place].block_id for part in parts)
        self._saves[_name_of(prefix)] = Save(ids, _extents(prefix.records))
        self._left(tokens, len(parts), now)
        used.append(prefix)

    def _workflow_over(self, workflow_id: str | None, hashes: Sequence[Any]) -> None:
        """Let go of what only a workflow that is over would have come back for."""
        self.pool.returns.left(hashes)
        if workflow_id is None:
            return
        for prefix in list(self.pool.prefixes):
            if prefix.workflow_id == workflow_id:
                self._drop(prefix)

    def _drop(self, prefix: KeptPrefix) -> None:
        self.pool.let_go(prefix)
        self._saves.pop(_name_of(prefix), None)  # planned in this very step: never start it

    def _leaving(self, now: float) -> float:
        """Return how many bytes of earlier saves are still on their way to the host."""
        rate = self.ledger.out.rate() or ASSUMED_BYTES_PER_S
        return max(self._leaving_bytes - rate * max(now - self._leaving_s, 0.0), 0.0)

    def came(self, request: Any, now: float) -> None:
        """Learn whose KV a new call comes back for."""
        ends = self.pool.returns.wanted(request.block_hashes, now)
        if ends:
            self._expected[request.request_id] = max(ends, key=lambda end: end.tokens)

    # Asked by the connector.

    def restorable(self, request: Any, local: int) -> tuple[int, bool]:
        """Return how many tokens can be loaded, and whether beside the forward pass.

        Args:
            request: a call that is about to be admitted.
            local: its tokens that the prefix cache holds, whole blocks.
        """
        expected = self._expected.pop(request.request_id, None)
        if expected is not None:
            self.ledger.returns.observe(expected.usage, min(local / expected.tokens, 1.0))
        copy = self.pool.copies.get(request.request_id)
        if copy is None:
            return self._found(request, local)
        copy.local = local
        if local < copy.first_block * self._block_size:
            self._end(copy)
            self.ledger.headless(copy)
            return self._found(request, local)
        tokens = min(copy.tokens, request.num_tokens - 1) - local
        return (tokens, self._runs_beside(copy.request_id, tokens)) if tokens > 0 else (0, False)

    def _found(self, request: Any, local: int) -> tuple[int, bool]:
        """Return how many tokens other calls have left beyond ``local``; see :meth:`restorable`."""
        self._matched.pop(request.request_id, None)
        if (
            not self.pool.kept
            or request.skip_reading_prefix_cache
            or self._otherwise_hashed(request)
        ):
            return 0, False
        size, wanted = self._block_size, request.num_tokens - 1
        first = local // size
        records = self.pool.found(request.block_hashes[first : wanted // size])
        tokens, key = len(records) * size, None
        full = first + len(records)
        if full:  # and what was left in a block that was not full
            key = TailKey(request.block_hashes[full - 1])
            tail = self._common_tail(request, key, full * size, wanted)
            if tail:
                records.append(self.pool.kept[key].record)
                tokens += tail
        if not tokens:
            return 0, False
        self._matched[request.request_id] = KvMatch(first, tokens, records, key)
        return tokens, self._runs_beside(request.request_id, tokens)

    def _otherwise_hashed(self, request: Any) -> bool:
        """Return whether vLLM hashes smaller pieces than blocks: they do not name ours."""
        return len(request.block_hashes) > request.num_tokens // self._block_size

    def _common_tail(self, request: Any, key: TailKey, start: int, wanted: int) -> int:
        """Return how many tokens of a block that is not full the request begins it with, too."""
        kept = self.pool.kept.get(key)
        if kept is None or request.mm_features:
            return 0
        tail = kept.prefix.tail
        count, most = 0, min(len(tail), wanted - start)
        mine = request.all_token_ids[start : start + most] if most > 0 else ()
        for token, other in zip(mine, tail, strict=False):
            if token != other:
                break
            count += 1
        return count

    def allocated(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        """Plan the load of ``tokens`` tokens into the blocks of a call; its copy ends here."""
        copy = self.pool.copies.get(request.request_id)
        if copy is None:
            self._load_found(request, block_ids, tokens)
            return
        first = copy.local // self._block_size
        last = self._blocks(copy.local + tokens) if tokens > 0 else first
        wanted = min(copy.tokens, request.num_tokens - 1)
        self.ledger.resumed(copy, wanted, max(tokens, 0), last - first)
        copy.owner.kept_tokens = 0
        if last > first:
            ids, extents = tuple(block_ids[first:last]), tuple(copy.records(first, last))
            beside = self._runs_beside(copy.request_id, tokens)
            if beside:
                self._beside.add(copy.request_id)
            self._loads.append(Load(request.request_id, ids, extents, beside))
        self.pool.load(request.request_id)

    def _load_found(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        match = self._matched.pop(request.request_id, None)
        if match is None or match.tokens != tokens:
            return
        beside = self._runs_beside(request.request_id, tokens)
        if beside:
            self._beside.add(request.request_id)
        ids = tuple(block_ids[match.first : match.first + len(match.records)])
        self._loads.append(Load(request.request_id, ids, _extents(match.records), beside))
        if tokens % self._block_size and match.tail is not None:
            self.pool.load_tail(match.tail)
        self.ledger.found(tokens, len(ids))

    def forget(self, request_id: str, why: str = "finished") -> None:
        """Drop the copy of a call, if there is one."""
        self._matched.pop(request_id, None)
        self._expected.pop(request_id, None)
        copy = self.pool.copies.get(request_id)
        if copy is not None:
            self._end(copy)
            self.ledger.dropped(copy, why)

    def forget_all(self, why: str) -> None:
        """Drop all copies, and have workers trust nothing that they keep in device memory."""
        self._renew = True
        for request_id in list(self.pool.copies):
            self.forget(request_id, why)
        for prefix in list(self.pool.prefixes):
            self._drop(prefix)
        self.pool.returns.forget()
        self._matched.clear()

    def cancel_saves(self) -> None:
        """Drop the copies that this step would make: their blocks are written before."""
        for prefix in list(self.pool.prefixes):
            if _name_of(prefix) in self._saves:
                self._drop(prefix)
        for request_id in list(self._saves):
            self.forget(request_id, "overwritten")

    def loads_under_way(self) -> bool:
        """Return whether workers still load beside the forward pass, as far as they have said."""
        return bool(self._beside)

    def loaded(self, request_ids: set[str]) -> set[str]:
        """Note that loads beside the forward pass are done; return those that are waited for."""
        self._beside -= request_ids
        wanted = request_ids - self._abandoned
        self._abandoned -= request_ids
        return wanted

    def abandon_loads(self) -> set[str]:
        """Let go of loads that are under way: their blocks may be given away at once.

        They cannot be stopped. So the next step begins, on the workers' side, when they are over,
        and nobody is told.

        Returns:
            The requests that they were for.
        """
        given_up = self._beside - self._abandoned
        self._abandoned |= given_up
        self._fence |= bool(given_up)
        return given_up

    def end_step(self) -> SwapMeta:
        """Return what this step copies; the next one starts empty."""
        copies = bool(self._saves or self._loads)
        meta = SwapMeta(
            list(self._saves.values()), self._loads, self._fence, self._renew and copies
        )
        self._saves, self._loads, self._fence = {}, [], False
        self._renew = self._renew and not copies
        self.pool.step_ends()
        return meta

    def stats(self) -> dict[str, Any]:
        """Return the state of the pool and the ledger as plain JSON values."""
        return {
            "capacity_bytes": self.pool.space.capacity * self._block_bytes,
            "used_bytes": self.pool.used * self._block_bytes,
            "copies": len(self.pool.copies),
            "kept_bytes": len(self.pool.kept) * self._block_bytes,
            **self.ledger.stats(),
        }

    def _again(self, rates: ServiceRates) -> RecomputeRates:
        ledger = self.ledger
        return RecomputeRates(
            rates.prefill_token_s, rates.prefill_context_s, ledger.survival, ledger.head_risk
        )

    def _copying(self, leaving_bytes: float = 0.0) -> CopyRates:
        ledger = self.ledger
        return CopyRates(
            ledger.out.rate(),
            ledger.back.rate(),
            beside=self.beside_from_s is not None,
            staging_bytes=max(ledger.staging_bytes - leaving_bytes, 0.0),
            pack_bytes_per_s=ledger.pack_bytes_per_s,
        )

    def _runs_beside(self, request_id: str, tokens: int) -> bool:
        # Workers name a load by its request: while one is under way, there is no second.
        if self.beside_from_s is None or request_id in self._beside:
            return False
        num_bytes = self._blocks(tokens) * self._block_bytes
        return self._copying().in_s(num_bytes) >= self.beside_from_s

    def _blocks(self, tokens: int) -> int:
        return int(-(-tokens // self._block_size))

    def _end(self, copy: HostCopy) -> None:
        self.pool.drop(copy.request_id)
        self._saves.pop(copy.request_id, None)  # planned in this very step: never start it
        copy.owner.kept_tokens = 0


def _name_of(prefix: KeptPrefix) -> str:
    """Return what its save goes by, which no request id is."""
    return f" kept {prefix.records[0]}"


def _extents(records: Sequence[int]) -> tuple[Extent, ...]:
    """Return records as extents, neighbours joined."""
    found: list[Extent] = []
    for record in records:
        if found and sum(found[-1]) == record:
            found[-1] = Extent(found[-1].first, found[-1].size + 1)
        else:
            found.append(Extent(record, 1))
    return tuple(found)


def _leading_shared(blocks: Sequence[Any]) -> int:
    """Return how many blocks from the start other running calls hold, too."""
    for count, block in enumerate(blocks):
        if block.ref_cnt < 2:
            return count
    return len(blocks)
