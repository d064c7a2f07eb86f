"""Latest start, slack and the two ways to share a workflow's budget among its calls.

End-to-end (ours, ``slack``): a call of workflow w on engine e has

    L = D - R - T        latest start
    slack(now) = L - now

with D the workflow's deadline, R the predicted critical path after the call and T the call's
service time on e. While D, R and T stand, the order of L never changes with time.

Per stage (HEXGEN-TEXT2SQL, arXiv 2505.05286, and its public code, ``hexgen``): when a call
arrives at time a, its stage gets the share of the remaining budget that its own time has in the
remaining work, and the call with the largest urgency goes first:

    b = (D - a) * T / (T + R)
    U(now) = T - (b - (now - a))

All U grow by one second per second, so that largest U first is smallest ``a + b - T`` first: a
static key again.
"""

from __future__ import annotations

import math


def latest_start(deadline_s: float, tail_s: float, service_s: float) -> float:
    """Return L, the last moment at which the call can start and the workflow still be on time.

    Args:
        deadline_s: D, absolute seconds; ``inf`` gives ``inf``.
        tail_s: R, seconds.
        service_s: T, seconds.
    """
    return deadline_s - tail_s - service_s


def slack(latest_start_s: float, now: float) -> float:
    """Return the seconds left until the latest start; negative when it has passed."""
    return latest_start_s - now


def stage_budget(budget_s: float, service_s: float, tail_s: float) -> float:
    """Return b, the paper's share of ``budget_s`` for a stage before ``tail_s`` of other work."""
    work_s = service_s + tail_s
    return budget_s if work_s <= 0 else budget_s * service_s / work_s


def hexgen_key(arrived_s: float, deadline_s: float, tail_s: float, service_s: float) -> float:
    """Return the paper's order as a static key: smallest first is largest urgency first."""
    if math.isinf(deadline_s):
        return deadline_s
    budget_s = stage_budget(deadline_s - arrived_s, service_s, tail_s)
    return arrived_s + budget_s - service_s


def hexgen_urgency(key_s: float, now: float) -> float:
    """Return U at ``now`` of a call with :func:`hexgen_key` ``key_s``."""
    return now - key_s
