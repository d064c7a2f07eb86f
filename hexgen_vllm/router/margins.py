"""How much time open calls have to spare, for people to look at."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.load import UNMEASURED
from hexgen_vllm.policy.protection import OpenCall

SLACK_BOUNDS_S: Final = (-60.0, -10.0, -5.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the slack buckets, seconds; one more bucket holds the rest."""

RISKY_SHARE: Final = 0.1
"""A workflow with less slack than this share of its budget is at risk."""


class Margin(NamedTuple):
    """An open call and the seconds its workflow has to spare, demoted or not."""

    entry: OpenCall
    slack_s: float

    @property
    def at_risk(self) -> bool:
        """Whether its workflow will be late, or nearly."""
        run = self.entry.run
        return self.slack_s < RISKY_SHARE * max(run.deadline_s - run.started_s, 0.0)


def margins(coordinator: Coordinator, now: float) -> Iterator[Margin]:
    """Yield every open call.

    One on an engine has what lies between its predicted end and when it is due; one that waits
    has the same for the fastest engine that takes it, should it start now.
    """
    for entry in coordinator.open_calls.values():
        yield Margin(entry, _slack_s(coordinator, entry, now))


def _slack_s(coordinator: Coordinator, entry: OpenCall, now: float) -> float:
    demand = entry.demand
    call_id = demand.call.call_id
    flight = None if entry.engine is None else entry.engine.in_flight.get(call_id)
    if flight is not None:
        end_s = max(flight.placement.finish_s or now, now)
    else:
        able = (e for e in coordinator.engines.values() if e.serves(demand.call))
        alone_s = (e.solo_s(demand, e.cost() or UNMEASURED) for e in able)
        end_s = now + min(alone_s, default=0.0)
    return demand.deadline_s - demand.tail_s - end_s


def by_workflow(found: Iterable[Margin]) -> list[Margin]:
    """Return the call with the least slack of each workflow, least first."""
    worst: dict[str, Margin] = {}
    for one in found:
        name = one.entry.run.workflow_id
        if name not in worst or one.slack_s < worst[name].slack_s:
            worst[name] = one
    return sorted(worst.values(), key=lambda one: one.slack_s)


def histogram(found: Iterable[Margin]) -> list[int]:
    """Return how many calls fall into each bucket of :data:`SLACK_BOUNDS_S`."""
    counts = [0] * (len(SLACK_BOUNDS_S) + 1)
    for one in found:
        counts[bisect_left(SLACK_BOUNDS_S, one.slack_s)] += 1
    return counts
