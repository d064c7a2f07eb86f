"""Pace control: calls without deadline decode only as fast as calls with one can bear.

A step takes longer the more calls decode in it, and every call in it waits for all of it. Where
the time of a step is what binds, not slots or memory, no order of waiting calls helps: a chat call
beside 200 batch calls writes a token every 40 ms instead of every 8. So calls without deadline
(*loose* ones; those with one are *tight*) are left out of steps. They keep their KV on the device
and go on where they stopped.

Formula, over the tight calls i, running and waiting:

    s0 = step time of the tight calls alone
    t_i = 0.9 (D_i - F_i - now) (1 - rho) - P
    s* = min over i of  max(1.05 s0, 1.3 s0 + (t_i - 1.3 s0 n80_i) / n50_i)

with D the deadline, F the prefills that follow the call, n the tokens that it and what follows it
will still write, one after the other, at two quantiles, P the seconds of prefill that tight calls
still need, and rho the share of busy time that prefill takes. So a call always keeps the time for
an answer of the longer kind at 1.3 s0, and the rest of its time is spread over the answer that is
likely. (The n are taken to be :data:`EVERY_STEPS` larger, for as many steps a plan holds; else a
call whose length is known would end at its deadline, neither sooner nor later.) What follows it is
paced by the same s*, not priced at the speed of the moment, which pace
control has made itself.

Loose calls run in the order of the queue while the predicted step time stays within s*. Their
prefills take at most a quarter of the time that the tightest call keeps beyond 1.3 s0 a token,
and none is admitted while any is left out. Where steps run as CUDA graphs, a batch is padded to
the next captured size, so that the number that runs is rounded down to one, unless that would
take tight calls out.

Cost: O(running calls + :data:`MOST_WAITING` waiting ones), every :data:`EVERY_STEPS` steps, and
only while calls of both kinds are there.

What it starves: loose calls, by at most ``interactive_share``: of the turns that they would have
had (one per call and step) they get at least the other part. A share saved up is used in the
order of the queue, so that the oldest goes on first. The turns that they lost are counted
(``batch_tokens_given_up``).

Do not use it where all calls have deadlines: it does nothing there, and leaving those with most
slack out of steps was measured to lower what is on time (70 to 62 %).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.types import StepCost

EVERY_STEPS: Final = 4
MOST_WAITING: Final = 32
_SAFETY: Final = 0.9
_LEAST_PACE: Final = 1.05
_SURE_PACE: Final = 1.3
_PREFILL_PART: Final = 0.25
_LEAST_CHUNK: Final = 128
_LEAST_DECODE_SHARE: Final = 0.1


class TightCall(NamedTuple):
    """A call with a deadline.

    Attributes:
        due_s: D - F, absolute seconds.
        output_left: tokens that it and what follows it will still write, at a high quantile.
        context: tokens whose KV it holds.
        prefill_left: prompt tokens still to compute.
        likely_left: tokens as ``output_left``, but at the median of its own.
    """

    due_s: float
    output_left: int
    context: int
    prefill_left: int
    likely_left: int


Tight = tuple[float, int, int, int, int]
"""A :class:`TightCall`, or a plain tuple of the same: it is made for every call of the batch."""


class LooseCall(NamedTuple):
    """A running call without deadline.

    Attributes:
        context: tokens whose KV it holds.
        prefill_left: prompt tokens still to compute; 0 if it decodes.
    """

    context: int
    prefill_left: int


class Pace(NamedTuple):
    """What the loose calls may do in a step.

    Attributes:
        keep: so many of them run, the first in order.
        admit: new ones may be admitted.
        prefill_tokens: prompt tokens that they may compute; ``None`` is no bound.
        step_s: s*, seconds; ``inf`` is no bound.
    """

    keep: int
    admit: bool
    prefill_tokens: int | None
    step_s: float


def step_bound(
    calls: Sequence[Tight], base_s: float, pending_s: float, prefill_share: float, now: float
) -> tuple[float, float]:
    """Return s*, and the seconds that prefills of others may take of the tightest call's slack.

    Args:
        calls: the tight calls.
        base_s: s0.
        pending_s: P.
        prefill_share: rho, 0 to 1.
        now: the present moment.
    """
    limit_s = spare_s = math.inf
    floor_s = _LEAST_PACE * base_s
    sure_s = _SURE_PACE * base_s
    share = _SAFETY * (1.0 - prefill_share)
    for due_s, left, _, _, likely in calls:
        beyond_s = share * (due_s - now) - pending_s - (left + EVERY_STEPS) * sure_s
        own_s = sure_s + beyond_s / (likely + EVERY_STEPS)
        # Not min(): this is done for every call of the batch.
        if own_s < limit_s:  # noqa: PLR1730
            limit_s = own_s
        if beyond_s < spare_s:  # noqa: PLR1730
            spare_s = beyond_s
    return max(limit_s, floor_s), max(spare_s, 0.0)


def reachable_token_s(
    cost: StepCost, tight: int, context: int, prefill_share: float, usual_s: float
) -> float:
    """Return the seconds of an output token once loose calls have made way.

    Args:
        cost: the engine's step cost.
        tight: calls with a deadline in the batch.
        context: tokens whose KV they hold.
        prefill_share: rho, 0 to 1.
        usual_s: seconds of an output token in the usual step.
    """
    alone_s = cost.step_s(max(tight, 1), context)
    return min(alone_s / max(1.0 - prefill_share, _LEAST_DECODE_SHARE), usual_s)


def captured(tight: int, keep: int, sizes: Sequence[int]) -> int:
    """Return how many loose decodes run, so that the batch is of a captured size.

    Args:
        tight: tight decodes, which run in any case.
        keep: loose decodes that may run.
        sizes: batch sizes captured as CUDA graphs, ascending; empty where there are none.
    """
    whole = tight + keep
    if not keep or not sizes or whole > sizes[-1]:
        return keep
    below = sizes[bisect_right(sizes, whole) - 1] if whole >= sizes[0] else 0
    return below - tight if below > tight else keep


class PaceControl:
    """Decides, every few steps, how many loose calls run.

    Attributes:
        given_up: turns that loose calls lost so far: tokens that they would have written.

    Args:
        options: its limits.
        slots: calls in a full batch.
        max_tokens: tokens of a step.
        sizes: see :func:`captured`.
    """

    def __init__(
        self, options: EngineOptions, slots: int, max_tokens: int, sizes: Sequence[int] = ()
    ) -> None:
        self._share = 1.0 - options.interactive_share
        self._slots, self._max_tokens, self._sizes = slots, max_tokens, tuple(sorted(sizes))
        self._credit = 0.0
        self.given_up = 0

    def rest(self) -> None:
        """Note that calls of only one kind run, so that no share is saved up."""
        self._credit = 0.0

    def plan(
        self,
        tight: Sequence[Tight],
        loose: Sequence[LooseCall],
        cost: StepCost,
        prefill_share: float,
        now: float,
        steps: int = EVERY_STEPS,
    ) -> Pace:
        """Return what loose calls may do in the coming ``steps`` steps.

        Args:
            tight: calls with a deadline, running and waiting.
            loose: running calls without, in the order in which they are to run.
            cost: the engine's step cost.
            prefill_share: share of busy time that prefill takes, 0 to 1.
            now: the present moment.
            steps: for how many steps it holds.
        """
        if not tight:
            self.rest()
            return Pace(len(loose), True, None, math.inf)
        decodes = min(len(tight), self._slots)
        context = sum([computed for _, _, computed, _, _ in tight])
        base_s = cost.step_s(decodes, context)
        pending_s = cost.p1 * sum([prefill for _, _, _, prefill, _ in tight])
        limit_s, spare_s = step_bound(tight, base_s, pending_s, prefill_share, now)
        tokens = int(min(_PREFILL_PART * spare_s / max(cost.p1, 1e-9), self._max_tokens))
        chunk = tokens if tokens >= _LEAST_CHUNK else 0
        fits = self._fitting(loose, cost, limit_s - base_s, chunk)
        if fits < len(loose):
            fits = captured(decodes, fits, self._sizes)
        keep = max(fits, self._floor(len(loose), fits, steps))
        if loose and not context:
            keep = max(keep, 1)  # no tight call runs: somebody must
        self.given_up += (len(loose) - keep) * steps
        return Pace(keep, keep == len(loose) and chunk > 0, chunk, limit_s)

    def _fitting(
        self, loose: Sequence[LooseCall], cost: StepCost, room_s: float, chunk: int
    ) -> int:
        """Return how many loose calls, from the first on, fit into ``room_s`` of a step."""
        for count, (context, prefill_left) in enumerate(loose):
            if prefill_left:
                if not chunk:
                    return count
                continue  # bounded by the tokens of the step
            room_s -= cost.c1 + cost.c2 * context
            if room_s < 0.0:
                return count
        return len(loose)

    def _floor(self, loose: int, fits: int, steps: int) -> int:
        """Return how many loose calls run in any case, out of the share saved up."""
        if fits >= loose:
            self._credit = 0.0
            return loose
        self._credit += self._share * loose * steps
        least = min(int(self._credit / steps), loose)
        self._credit = max(self._credit - max(least, fits) * steps, 0.0)
        return least


class Places:
    """The share of places in the batch that loose calls have, however many tight ones wait.

    Each step in which fewer loose calls run than ``(1 - interactive_share) * slots`` owes them the
    difference. Once the debt is as long as the answer of the one that waits longest is expected to
    be, it goes first. So it waits at most ``answer / ((1 - interactive_share) * slots)`` steps,
    and then for a place to become free.
    """

    def __init__(self, options: EngineOptions, slots: int) -> None:
        self._places = (1.0 - options.interactive_share) * slots
        self._debt = 0.0

    @property
    def some(self) -> bool:
        """Whether loose calls have any share."""
        return self._places > 0.0

    def owes(self, running: int, answer_tokens: int, steps: int = 1) -> bool:
        """Return whether the loose call that waits longest is to go first.

        Args:
            running: loose calls in the batch.
            answer_tokens: output tokens expected of the one that waits longest.
            steps: since the last time.
        """
        self._debt = max(self._debt + (self._places - running) * steps, 0.0)
        if self._debt < answer_tokens or running >= self._places:
            return False
        self._debt = 0.0
        return True
