"""Whether and when the KV of a call that has ended is wanted again, learned per kind of call.

A call's KV is wanted again if a later call begins with its tokens: the next turn of an agent, the
next stage of a workflow. Each kind, which is a workflow type and a stage, has a histogram of think
times, decayed, and a weight of calls that nobody came back to. With ``later(t)`` the weight of the
think times above t, ``never`` that of the latter and a prior of 2 observations at the chance p0,

    P(comes back | it has not within t) = (later(t) + 2 * p0 * left(t)) / (later(t) + never + 2)

where ``left(t)`` is 1 within the shortest think time and falls by half each time t doubles from
there. p0 is that of the workflow type, whose own prior is 1/2 for calls of a workflow, and 0 for
lone ones: they are kept when their kind is seen to come back.

What a client says goes first: that nothing follows, that a call follows (1 until it should have
come twice over), or for how long its KV should stay.

Cost: constant per call; memory is bounded by the number of kinds and of ends remembered.

What it can starve: kinds that come back later than all the others. Do not use it where think times
are hours: nothing would be left to be found.

Once a workflow says that it is over, the KV that nobody else has used (:class:`WorkflowKv`) is
wanted by nobody.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Final

SHORTEST_S: Final = 0.125
_BINS: Final = 16  # the last one begins at 34 minutes
_DECAY: Final = 0.99
_PRIOR: Final = 2.0
_MOST_KINDS: Final = 1024
_MOST_ENDS: Final = 8192
_GIVE_UP_S: Final = 4096.0
SURE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Plans:
    """What a client says of what follows its call; ``None`` is nothing.

    Attributes:
        follows: whether another call of the workflow follows.
        resume_s: seconds until then.
        keep_s: for how long the KV should stay.
    """

    follows: bool | None = None
    resume_s: float | None = None
    keep_s: float | None = None


UNSAID: Final = Plans()


@dataclass(frozen=True, slots=True)
class CallKind:
    """A kind of call: its workflow type, its stage, and whether it is of a workflow at all."""

    workflow_type: str
    stage: str
    lone: bool = False


class ThinkTimes:
    """How soon calls of one kind were followed, and how many were not; decayed counts."""

    def __init__(self) -> None:
        self._came = [0.0] * _BINS
        self._never = 0.0

    def observe(self, seconds: float | None) -> None:
        """Learn that a call was followed after ``seconds``, or never."""
        for i in range(_BINS):
            self._came[i] *= _DECAY
        self._never *= _DECAY
        if seconds is None:
            self._never += 1.0
        else:
            self._came[_bin(seconds)] += 1.0

    def chance(self, waited_s: float, prior: float) -> float:
        """Return the chance that a call is still followed that has not been for ``waited_s``."""
        first = _bin(waited_s)
        later = sum(self._came[first:])
        left = 1.0 if waited_s <= SHORTEST_S else SHORTEST_S / waited_s
        return (later + _PRIOR * prior * left) / (later + self._never + _PRIOR)


_UNKNOWN: Final = ThinkTimes()


def _bin(seconds: float) -> int:
    if seconds <= SHORTEST_S:
        return 0
    return min(1 + int(math.log2(seconds / SHORTEST_S)), _BINS - 1)


@dataclass(slots=True)
class End:
    """A call that ended with KV that may be wanted again.

    Attributes:
        kind: what it was.
        ended_s: when.
        plans: what was said of what follows.
        tokens: how much KV it left.
        usage: share of all KV that calls held then.
    """

    kind: CallKind
    ended_s: float
    plans: Plans
    tokens: int
    usage: float = 0.0


class Returns:
    """Learns from calls that end, and from those that come back for their KV."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[object, ThinkTimes] = OrderedDict()
        self._types: OrderedDict[object, ThinkTimes] = OrderedDict()
        self._ends: OrderedDict[Hashable, End] = OrderedDict()

    def ended(self, key: Hashable, end: End, now: float) -> None:
        """Note that a call ended whose KV is known by ``key``, the hash of its last block."""
        while self._ends and (
            len(self._ends) >= _MOST_ENDS
            or now - next(iter(self._ends.values())).ended_s > _GIVE_UP_S
        ):
            self._learn(self._ends.popitem(last=False)[1], None)
        old = self._ends.pop(key, None)
        if old is not None and end.ended_s > old.ended_s:
            self._learn(old, end.ended_s - old.ended_s)  # the same tokens once more
        self._ends[key] = end

    def wanted(self, keys: Iterable[Hashable], now: float) -> list[End]:
        """Note that a call came which begins with what is known by any of ``keys``; return those.

        An end can be wanted by several; the first one teaches.
        """
        found = []
        for key in keys:
            end = self._ends.pop(key, None)
            if end is not None:
                self._learn(end, max(now - end.ended_s, 0.0))
                found.append(end)
        return found

    def left(self, keys: Iterable[Hashable]) -> None:
        """Note that nobody comes back to what is known by ``keys``: the workflow is over."""
        for key in keys:
            end = self._ends.pop(key, None)
            if end is not None:
                self._learn(end, None)

    def forget(self) -> None:
        """Forget what ended, but not what was learned: the KV is gone."""
        self._ends.clear()

    def chance(self, end: End, now: float) -> float:
        """Return the chance that what ``end`` left is still wanted."""
        waited_s, plans = max(now - end.ended_s, 0.0), end.plans
        if plans.follows is False:
            return 0.0
        if plans.keep_s is not None:
            return SURE if waited_s <= plans.keep_s else 0.0
        if plans.resume_s is not None and waited_s <= 2.0 * plans.resume_s:
            return 1.0
        whole = self._types.get((end.kind.workflow_type, end.kind.lone), _UNKNOWN)
        prior = whole.chance(waited_s, 0.0 if end.kind.lone else 0.5)
        times = self._kinds.get(end.kind)
        found = prior if times is None else times.chance(waited_s, prior)
        if plans.follows and waited_s <= SHORTEST_S:
            return 1.0
        # It does follow: what is learned of those that never come says nothing.
        return max(found, 0.5) if plans.follows and waited_s <= _GIVE_UP_S else found

    def _learn(self, end: End, seconds: float | None) -> None:
        kind = end.kind
        for times in (
            _entry(self._kinds, kind),
            _entry(self._types, (kind.workflow_type, kind.lone)),
        ):
            times.observe(seconds)


def _entry(table: OrderedDict[object, ThinkTimes], key: Hashable) -> ThinkTimes:
    found = table.get(key)
    if found is None:
        found = table[key] = ThinkTimes()
        if len(table) > _MOST_KINDS:
            table.popitem(last=False)
    table.move_to_end(key)
    return found


class WorkflowKv:
    """Which KV one workflow alone has used; when it is over, that is evicted before all other.

    KV is known by keys, such as the hashes of blocks. What was evicted is remembered, too: a prompt
    that comes with one workflow after another is kept once the second has come.

    Cost: a few dictionary operations per key.

    Args:
        most: keys that are remembered, those used last.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._users: OrderedDict[Hashable, str | None] = OrderedDict()  # None: several, or lone
        self._alone: dict[str, dict[Hashable, None]] = {}

    def used(self, keys: Iterable[Hashable], workflow_id: str | None) -> None:
        """Note that a call uses ``keys``, from the start of its text; ``None``: of no workflow."""
        users, own = self._users, None
        for key in keys:
            if key not in users:
                users[key] = workflow_id
                if workflow_id is not None:
                    if own is None:
                        own = self._alone.setdefault(workflow_id, {})
                    own[key] = None  # the newest of all: it keeps ``own`` in its place
                if len(users) > self._most:
                    self._forget_oldest()
                continue
            users.move_to_end(key)
            user = users[key]
            if user is not None and user != workflow_id:
                self._leave(key, user)
                users[key] = None

    def over(self, workflow_id: str) -> list[Hashable]:
        """Return the keys that only ``workflow_id``, which is over, has used, in order of use."""
        return list(self._alone.get(workflow_id, ()))

    def _forget_oldest(self) -> None:
        oldest, user = self._users.popitem(last=False)
        if user is not None:
            self._leave(oldest, user)

    def _leave(self, key: Hashable, user: str) -> None:
        alone = self._alone[user]
        del alone[key]
        if not alone:
            del self._alone[user]
