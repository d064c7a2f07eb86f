"""What a client's word is worth: deadlines and priorities are claims until something bounds them.

A deadline orders calls, so a client that lies about it jumps the queue. Three rules bound that.

1. **Ceilings** (:class:`Ceiling`), set by whoever runs the router, per tenant. Claims beyond them
   are clamped, never refused::

       priority' = min(priority, max_priority)
       D'        = max(D, now + min_deadline)

2. **A deadline that nothing can meet is no claim** (:func:`credible_deadline_s`). With T_min the
   least time of the call and of the path after it, on the fastest engine with nothing else to do,
   a workflow whose new deadline is before ``now + T_min`` is ordered by the deadline that it had,
   else by the default one. Outcomes are counted against the deadline that was asked for.
3. **Nothing is due before it came** (:func:`due_s`), whatever the deadline, the path after it or a
   hint of the client say::

       due = max(D - R, arrival)

   So nobody gains by being late already, and keys grow with the clock: a call waits behind calls
   that came before its own due time, and behind no others.

Cost: O(1) for a call; T_min is a minimum over engines, known for a second.

What it can starve: nothing. A call of rule 2 keeps its place by the default deadline. A flood of
deadlines that could just be met still goes first until the others are due: shares per tenant
(:class:`~hexgen_vllm.policy.overload.FairShares`), a ceiling, or ``overload=protect`` bound that.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hexgen_vllm.types import NO_DEADLINE

MAX_PRIORITY: Final = 2**62
"""Priorities of clients lie within this, both ways: what is sent on must fit the 64 bits of
vLLM's own."""


class Ceiling(NamedTuple):
    """The most that a client can claim.

    Attributes:
        max_priority: higher is sooner; what is above counts as this.
        min_deadline_s: seconds from now; what is shorter counts as this.
    """

    max_priority: int = MAX_PRIORITY
    min_deadline_s: float = 0.0

    def priority(self, claimed: int) -> int:
        """Return the priority that counts."""
        return min(claimed, self.max_priority)

    def deadline_s(self, claimed_s: float, now: float) -> float:
        """Return the deadline that counts; ``inf`` stays ``inf``."""
        return max(claimed_s, now + self.min_deadline_s)


def credible_deadline_s(
    claimed_s: float, standing_s: float, default_s: float, earliest_end_s: float
) -> float:
    """Return the deadline that orders a workflow after a client claimed one.

    Args:
        claimed_s: D as claimed now.
        standing_s: the one that ordered it before, ``inf`` for none.
        default_s: the one that it would have had without a claim.
        earliest_end_s: now + T_min.
    """
    if claimed_s >= earliest_end_s or claimed_s >= standing_s:
        return claimed_s
    return standing_s if standing_s < NO_DEADLINE else max(default_s, claimed_s)


def due_s(deadline_s: float, tail_s: float, arrived_s: float) -> float:
    """Return when a call must end: D - R, yet never before it came; ``inf`` without deadline."""
    return max(deadline_s - tail_s, arrived_s)
