"""Whether the KV of a preempted call is kept in host memory, and which copy gives way when full.

Formula. A call that is preempted holds the KV of n tokens. The first s of them are held by other
running calls as well and stay on the device. Of the rest a share q, the head, is expected to be
found in the prefix cache when the call comes back. With k bytes of KV per token, c tokens copied:

    lost        = (n - s) * (1 - q)
    recompute_s = lost * (token_s + context_s * (n - lost / 2))
    copy_s      = held_s(c * k, lost * k) + 2 * overhead_s

Both are seconds that the engine does nothing else. Where copies hold up the forward pass,
``held_s(out, in) = out / out_rate + in / in_rate``. Where they run beside it, a save holds it up
while it is packed into the device's staging memory, and for what finds no room there; a load that
takes less than 2 ms is waited for, any other is not, and both are unpacked:

    held_s(out, in) = out / pack_rate + max(0, out - staging) / out_rate
                    + in / pack_rate  + (in / in_rate if that is less than 2 ms)

The copy is made if
``recompute_s > 1.2 * copy_s`` (strict), so that rates which drift do not make it flicker.

The shared head is left out of the copy (c = n - s) if that saves more than it risks: should the
others let go of it in the meantime, all n tokens are computed again. With the risk r of that:
``r * n * (token_s + context_s * n / 2) < held_s(n * k, 0) - held_s((n - s) * k, 0)``, else c = n.

The KV of a call that has ended is copied if its workflow may come back for it, with the chance P of
:mod:`hexgen_vllm.policy.returns`, and the prefix cache may not hold it until then:
``P * (1 - q) * recompute_s > 1.2 * (held_s(c * k, 0) + P * (1 - q) * held_s(0, c * k))``, with c
the tokens that no copy has yet and q the share that was found there when calls came back that had
ended with the KV cache as full (:class:`ReturnSurvival`).

A copy in a bounded pool is worth the seconds it saves per block, times the chance that it is wanted
(1 for a preempted call), and less the longer its call or its workflow may wait:
``P * saves_s / blocks * 10 s / (10 s + slack)``, with at most 990 s of slack. A new copy that finds
no room evicts those of least worth, each of which must be worth strictly less than it; if that is
not enough, the new one is refused and nobody is evicted.

Inputs are measured by the engine: the prefill rate by its step-cost fit, the bandwidths by its
copies, q and r by what it finds when calls come back. An unknown bandwidth counts as 4 GB/s, a
slow bus: the first copies tell the real one.

Cost: deciding is constant time, eviction O(n log n) in the copies held, on preemption only.

What it can starve: a call with much slack may lose its copy again and again to more urgent ones;
it is then computed again, as without a pool. Do not use it where host memory is dear, or where the
prefix cache holds all that is ever preempted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

ASSUMED_BYTES_PER_S: Final = 4e9
"""Bandwidth assumed until a copy was measured."""

BESIDE_FROM_S: Final = 0.002
"""A load of this many seconds or more runs beside the forward pass, where it can."""

_GAIN: Final = 1.2
_OVERHEAD_S: Final = 2e-4
_URGENCY_HORIZON_S: Final = 10.0
_MOST_SLACK_S: Final = 990.0
_LEVELS: Final = 4  # the last one: less than an eighth is free
_WEIGHT: Final = 0.1


@dataclass(frozen=True, slots=True)
class Held:
    """The KV that a call would lose.

    Attributes:
        tokens: tokens whose KV is there.
        shared: how many of them, from the start, other running calls hold too.
        token_bytes: bytes of KV per token, on all devices of the engine together.
    """

    tokens: int
    shared: int
    token_bytes: float


@dataclass(frozen=True, slots=True)
class RecomputeRates:
    """How fast KV is computed again.

    Attributes:
        token_s: seconds per token.
        context_s: seconds per token and token of context before it.
        survival: share of unshared KV that the prefix cache still holds when it is wanted, 0 to 1.
        head_risk: how often shared KV is gone by then, 0 to 1.
    """

    token_s: float
    context_s: float = 0.0
    survival: float = 0.0
    head_risk: float = 1.0

    def seconds(self, tokens: float, end: int) -> float:
        """Return the time of computing ``tokens`` tokens, the last of which is token ``end``."""
        return tokens * (self.token_s + self.context_s * (end - tokens / 2))


@dataclass(frozen=True, slots=True)
class CopyRates:
    """How fast KV is copied.

    Attributes:
        out_bytes_per_s: to host memory; ``None`` while unknown.
        in_bytes_per_s: back to the device; ``None`` while unknown.
        beside: copies run beside the forward pass.
        staging_bytes: device memory that is free for saves to pass through.
        pack_bytes_per_s: how fast they get there; ``None`` counts as no time.
    """

    out_bytes_per_s: float | None = None
    in_bytes_per_s: float | None = None
    beside: bool = False
    staging_bytes: float = 0.0
    pack_bytes_per_s: float | None = None

    def in_s(self, num_bytes: float) -> float:
        """Return the seconds until a load of so many bytes is done."""
        return num_bytes / (self.in_bytes_per_s or ASSUMED_BYTES_PER_S)

    def stall_s(self, bytes_out: float, bytes_in: float) -> float:
        """Return the seconds by which copies of so many bytes hold the forward pass up."""
        in_s = self.in_s(bytes_in)
        if self.beside:
            bytes_out, packed = max(bytes_out - self.staging_bytes, 0.0), bytes_out + bytes_in
            in_s = in_s if in_s < BESIDE_FROM_S else 0.0
            if self.pack_bytes_per_s is not None:
                in_s += packed / self.pack_bytes_per_s
        return bytes_out / (self.out_bytes_per_s or ASSUMED_BYTES_PER_S) + in_s


class Retention(NamedTuple):
    """The decision: whether to keep the KV, what either way costs in seconds, and why."""

    keep: bool
    recompute_s: float
    copy_s: float
    reason: str

    @property
    def redo_s(self) -> float:
        """Seconds that the engine spends to bring the call back to where it was."""
        return self.copy_s if self.keep else self.recompute_s


def leaves_head(held: Held, again: RecomputeRates, copy: CopyRates) -> bool:
    """Return whether the shared head is better left out of a copy."""
    risk_s = again.head_risk * again.seconds(held.tokens, held.tokens)
    whole, own = held.tokens * held.token_bytes, (held.tokens - held.shared) * held.token_bytes
    return risk_s < copy.stall_s(whole, 0.0) - copy.stall_s(own, 0.0)


def weigh(
    held: Held, again: RecomputeRates, copy: CopyRates, keep: str = "auto", *, whole: bool = False
) -> Retention:
    """Decide whether to copy ``held`` to host memory or to compute it again.

    Args:
        held: what would be lost.
        again: how fast it is computed.
        copy: how fast it is copied.
        whole: whether the shared head is copied, too.
        keep: ``auto``, or ``always`` or ``never`` to overrule the rates.

    The reason is ``faster`` or ``slower`` (a copy is), ``always``, ``never``, or ``nothing``: the
    device keeps all there is.
    """
    own = held.tokens - held.shared
    if own <= 0:
        return Retention(False, 0.0, 0.0, "nothing")
    lost = own * (1.0 - again.survival)
    recompute_s = again.seconds(lost, held.tokens)
    copied = held.tokens if whole else own
    copy_s = copy.stall_s(copied * held.token_bytes, lost * held.token_bytes) + 2 * _OVERHEAD_S
    if keep != "auto":
        return Retention(keep == "always", recompute_s, copy_s, keep)
    pays = recompute_s > _GAIN * copy_s
    return Retention(pays, recompute_s, copy_s, "faster" if pays else "slower")


def pays_to_keep(
    tokens: int,
    end: int,
    chance: float,
    again: RecomputeRates,
    copy: CopyRates,
    token_bytes: float,
    keep: str = "auto",
) -> bool:
    """Decide whether KV of a call that has ended is copied to host memory.

    Args:
        tokens: tokens that no copy has yet, the last of which is token ``end``.
        end: see above.
        chance: that they are wanted again.
        again: how fast they are computed; its ``survival`` is that of ended calls.
        copy: how fast they are copied.
        token_bytes: bytes of KV per token.
        keep: ``auto``, or ``always`` or ``never`` to overrule the rates.
    """
    if tokens <= 0 or chance <= 0.0 or keep == "never":
        return False
    wanted = chance * (1.0 - again.survival)
    copied = tokens * token_bytes
    copy_s = copy.stall_s(copied, 0.0) + wanted * copy.stall_s(0.0, copied) + 2 * _OVERHEAD_S
    return keep == "always" or wanted * again.seconds(tokens, end) > _GAIN * copy_s


class ReturnSurvival:
    """How much of ended calls' KV the device still held when it was wanted.

    Learned apart for each time that the free share of the cache halves: what outlives a lone call
    says nothing of a crowd. Where nothing is known, nothing is taken to survive.

    Attributes:
        mean: of all alike.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self._shares = [0.0] * _LEVELS

    def observe(self, usage: float, share: float) -> None:
        """Learn that ``share`` was found of what a call left when ``usage`` of all KV was held."""
        level = _level(usage)
        self._shares[level] += _WEIGHT * (share - self._shares[level])
        self.mean += _WEIGHT * (share - self.mean)

    def share(self, usage: float) -> float:
        """Return the share expected of what a call leaves while ``usage`` of all KV is held."""
        return self._shares[_level(usage)]


def _level(usage: float) -> int:
    free = max(1.0 - usage, 2.0**-_LEVELS)
    return min(int(-math.log2(free)), _LEVELS - 1) if free < 1.0 else 0


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """A copy in the pool, or one that asks for room.

    Attributes:
        saves_s: seconds of computing that it saves.
        blocks: its size, at least 1.
        latest_start_s: L of its call, absolute seconds.
        chance: that it is wanted again.
    """

    saves_s: float
    blocks: int
    latest_start_s: float
    chance: float = 1.0


def worth(copy: StoredCopy, now: float) -> float:
    """Return the seconds saved per block, weighted by how soon the call wants it."""
    slack_s = min(max(copy.latest_start_s - now, 0.0), _MOST_SLACK_S)
    urgency = _URGENCY_HORIZON_S / (_URGENCY_HORIZON_S + slack_s)
    return copy.chance * copy.saves_s / copy.blocks * urgency


def choose_evictions(
    stored: Sequence[StoredCopy], newcomer: StoredCopy, short: int, now: float
) -> tuple[int, ...] | None:
    """Return the indices of the copies that give way to ``newcomer``, least worth first.

    Args:
        stored: what is in the pool.
        newcomer: what asks for room.
        short: blocks that must become free.
        now: the present, seconds.

    Returns:
        ``None`` if all copies of less worth together are not enough.
    """
    limit = worth(newcomer, now)
    order = sorted((worth(copy, now), i) for i, copy in enumerate(stored))
    taken: list[int] = []
    for value, i in order:
        if short <= 0 or value >= limit:
            break
        taken.append(i)
        short -= stored[i].blocks
    if short > 0:
        return None
    return _spared(stored, taken, -short)


def _spared(stored: Sequence[StoredCopy], taken: list[int], spare: int) -> tuple[int, ...]:
    """Give back copies that the others make unnecessary, most worth first."""
    kept: list[int] = []
    for i in reversed(taken):
        if stored[i].blocks <= spare:
            spare -= stored[i].blocks
        else:
            kept.append(i)
    return tuple(reversed(kept))
