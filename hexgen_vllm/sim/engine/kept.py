"""KV in the host memory of a simulated engine: of preempted calls, and of ended ones.

Both by the live engine's rules. Of preempted calls whole sequences are kept; of ended ones, runs of
blocks.

Blocks are known by the runs that prompts are made of (:class:`Link`). Whether they are copied, for
how likely they are wanted again, and what gives way are decided by what decides in the live engine
(:mod:`hexgen_vllm.policy.returns`, :mod:`hexgen_vllm.policy.retention`). Kinds of calls are not
told apart here: that something follows is known by the predicted tail.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.retention import (
    CopyRates,
    Held,
    RecomputeRates,
    Retention,
    ReturnSurvival,
    StoredCopy,
    choose_evictions,
    pays_to_keep,
    weigh,
)
from hexgen_vllm.policy.returns import UNSAID, CallKind, End, Plans, Returns
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.sim.engine.prefix_cache import BlockPool, Link
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence

_KIND: Final = CallKind("default", "default")
_GOES_ON: Final = Plans(follows=True)


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


class KeptRun:
    """Blocks ``[first, end)`` of a run that are in host memory."""

    __slots__ = ("end", "ended", "first", "latest_start_s", "saves_s")

    def __init__(
        self, first: int, end: int, ended: End, latest_start_s: float, saves_s: float
    ) -> None:
        self.first, self.end, self.ended = first, end, ended
        self.latest_start_s, self.saves_s = latest_start_s, saves_s


class KeptRuns:
    """Host memory of one engine for what ended calls leave.

    Args:
        blocks: how many it holds.
        block_size: tokens of a block.
        tokens_per_s: rate of copying each way.
        keep: ``auto``, ``always`` or ``never``.

    Attributes:
        returns: how likely that is wanted.
        survival: share of it that the prefix cache still held when it was wanted.
    """

    def __init__(self, blocks: int, block_size: int, tokens_per_s: float, keep: str) -> None:
        self.returns = Returns()
        self.survival = ReturnSurvival()
        self._free, self._block_size, self._keep = blocks, block_size, keep
        self._copy = CopyRates(tokens_per_s, tokens_per_s)
        self._runs: dict[int, KeptRun] = {}

    def came(self, chain: tuple[Link, ...], cached: int, now: float) -> None:
        """Learn from a call that is admitted, of which ``cached`` blocks are on the device."""
        ends = self.returns.wanted([link.key for link in chain], now)
        for end in ends:
            share = min(cached * self._block_size / max(end.tokens, 1), 1.0)
            self.survival.observe(end.usage, share)

    def found(self, chain: tuple[Link, ...], cached: int, most: int) -> int:
        """Return how many leading blocks of a prompt are on the device or here."""
        have = cached
        for key, _, end in chain:
            upto = min(end, most)
            if have < upto:
                run = self._runs.get(key)
                if run is None or run.first > have:
                    break
                have = max(have, min(run.end, upto))
                if have < upto:
                    break
        return have

    def ended(
        self,
        chain: tuple[Link, ...],
        blocks: int,
        *,
        follows: bool,
        latest_start_s: float,
        usage: float,
        rates: ServiceRates,
        now: float,
    ) -> int:
        """Keep what an ended call leaves if that pays; return the blocks that are copied.

        Args:
            chain: what its sequence is made of.
            blocks: its full blocks.
            follows: whether its workflow goes on.
            latest_start_s: when the next call must begin.
            usage: share of the device's KV that calls hold, this one too.
            rates: how fast the engine computes.
            now: the present.
        """
        links = [link for link in chain if link.first < blocks]
        if not links:
            return 0
        plans = _GOES_ON if follows else UNSAID
        end = End(_KIND, now, plans, blocks * self._block_size, usage)
        self.returns.ended(links[-1].key, end, now)
        missing: list[tuple[Link, int, int]] = []
        for link in links:
            upto, run = min(link.end, blocks), self._runs.get(link.key)
            if run is not None:
                run.ended, run.latest_start_s = end, latest_start_s
            have = link.first if run is None else run.end
            if have < upto:
                missing.append((link, have, upto))
        size = self._block_size
        lost = sum(upto - have for _, have, upto in missing)
        survival = self.survival.share(usage)
        again = RecomputeRates(rates.prefill_token_s, rates.prefill_context_s, survival)
        chance = self.returns.chance(end, now)
        last = missing[-1][2] if missing else 0
        if not pays_to_keep(lost * size, last * size, chance, again, self._copy, 1.0, self._keep):
            return 0
        saves_s = again.seconds(lost * size, last * size)
        newcomer = StoredCopy(saves_s, lost, latest_start_s, chance)
        if not self._make_room(newcomer, {link.key for link in links}, now):
            return 0
        for link, have, upto in missing:
            run = self._runs.get(link.key)
            part_s = saves_s * (upto - have) / lost
            if run is None:
                self._runs[link.key] = KeptRun(link.first, upto, end, latest_start_s, part_s)
            else:
                run.end, run.saves_s = upto, run.saves_s + part_s
        self._free -= lost
        return lost

    def _make_room(self, newcomer: StoredCopy, spared: set[int], now: float) -> bool:
        short = newcomer.blocks - self._free
        if short <= 0:
            return True
        keys = [key for key in self._runs if key not in spared]
        stored = []
        for key in keys:
            run = self._runs[key]
            chance = self.returns.chance(run.ended, now)
            stored.append(StoredCopy(run.saves_s, run.end - run.first, run.latest_start_s, chance))
        chosen = choose_evictions(stored, newcomer, short, now)
        if chosen is None:
            return False
        for i in chosen:
            run = self._runs.pop(keys[i])
            self._free += run.end - run.first
        return True


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
