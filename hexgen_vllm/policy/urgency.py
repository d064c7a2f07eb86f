"""The order of waiting calls: their keys, and a min-heap whose entries can be removed and re-keyed.

Rank: the client's priority as vLLM has it, a whole number, lower first; it outranks every key. Key:
a latest start, a deadline or an arrival, in seconds; the smallest goes first. Ties break by
arrival, then by order of insertion, so the order is total and the same input gives the same output.

Cost: push, pop, remove and re-key are O(log n) amortised; peek is O(1) amortised. Removal only
forgets the entry; the heap drops it when it surfaces, and is rebuilt when more than half of it is
forgotten, so that memory stays proportional to what is queued.

What it can starve: a rank waits as long as calls of lower ones come, as in stock vLLM. Within one,
as long as keys are absolute times, a waiting key stands still while the keys
of newcomers grow with the clock, so nothing waits behind newcomers for ever. A key that is not a
time, such as :func:`background_key`, has no such promise: its owner must age it.

Two ways to share a workflow's budget among its calls give the keys. End-to-end (ours, ``slack``): a
call of workflow w on engine e has

    L = D - R - T        latest start
    slack(now) = L - now

with D the workflow's deadline, R the predicted critical path after the call and T the call's
service time on e. While D, R and T stand, the order of L never changes with time.

Per stage (HEXGEN-TEXT2SQL, arXiv 2505.05286, and its public code, ``paper``): when a call
arrives at time a, its stage gets the share of the remaining budget that its own time has in the
remaining work, and the call with the largest urgency goes first:

    b = (D - a) * T / (T + R)
    U(now) = T - (b - (now - a))

All U grow by one second per second, so that largest U first is smallest ``a + b - T`` first: a
static key again.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=Hashable)
LATE_S: Final = 1e10
"""Added to the key of calls that cannot be on time any more; beyond any deadline."""
BATCH_S: Final = 1e11
"""Added to the key of calls without deadline; beyond any other, and microseconds still tell."""
BACKGROUND_S: Final = 1e12
"""Added to the key of background calls; beyond any time or deadline that a call can have."""
LAST_RANK: Final = 1 << 63
"""Rank of background calls; vLLM's priorities are 64 bits wide, so it comes after all of them."""
_STRETCH: Final = 8.0
_MOST_STRETCH_S: Final = 1e6
_REBUILD_LEAST: Final = 64


def latest_start(deadline_s: float, tail_s: float, service_s: float) -> float:
    """Return L, the last moment at which the call can start and the workflow still be on time.

    Args:
        deadline_s: D, absolute seconds; ``inf`` gives ``inf``.
        tail_s: R, seconds.
        service_s: T, seconds.
    """
    return deadline_s - tail_s - service_s


def stage_budget(budget_s: float, service_s: float, tail_s: float) -> float:
    """Return b, the paper's share of ``budget_s`` for a stage before ``tail_s`` of other work."""
    work_s = service_s + tail_s
    return budget_s if work_s <= 0 else budget_s * service_s / work_s


def paper_key(arrived_s: float, deadline_s: float, tail_s: float, service_s: float) -> float:
    """Return the paper's order as a static key: smallest first is largest urgency first."""
    if math.isinf(deadline_s):
        return deadline_s
    budget_s = stage_budget(deadline_s - arrived_s, service_s, tail_s)
    return arrived_s + budget_s - service_s


def late_key(deadline_s: float, began_s: float) -> float:
    """Return the key of a call that cannot be on time any more: D + 8 (D - A) first.

    Args:
        deadline_s: D, absolute seconds.
        began_s: A, when its workflow began.
    """
    return LATE_S + deadline_s + min(_STRETCH * max(deadline_s - began_s, 0.0), _MOST_STRETCH_S)


def batch_key(turn: float) -> float:
    """Return the key of a call without deadline: behind all that have one, first come first served.

    Args:
        turn: of two calls the one that came first has the smaller one.
    """
    return BATCH_S + turn


def background_key(work_s: float) -> float:
    """Return the key of a demoted call: behind all others, least remaining work first.

    Args:
        work_s: seconds of work left on the call and after it.
    """
    return BACKGROUND_S + work_s


class UrgencyHeap(Generic[T]):
    """Items ordered by (rank, key, arrival, insertion); each item is in it at most once.

    Items are told apart by hash and equality, as in a set.
    """

    __slots__ = ("_entries", "_heap", "_next")

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, float, int, T]] = []
        self._entries: dict[T, tuple[int, float, float, int, T]] = {}
        self._next = 0

    def push(self, item: T, key: float, arrived_s: float, rank: int = 0) -> None:
        """Add ``item``.

        Raises:
            ValueError: it is already in, or ``key`` is not a number.
        """
        if item in self._entries:
            raise ValueError("the item is already queued")
        self._next += 1
        self._put(item, rank, key, arrived_s, self._next)

    def rekey(self, item: T, key: float, rank: int = 0) -> None:
        """Move ``item`` to ``rank`` and ``key``; its arrival and its place among ties stay.

        Raises:
            KeyError: it is not in.
            ValueError: ``key`` is not a number.
        """
        old_rank, old, arrived_s, order, _ = self._entries[item]
        if old != key or old_rank != rank:
            self._put(item, rank, key, arrived_s, order)

    def remove(self, item: T) -> None:
        """Take ``item`` out.

        Raises:
            KeyError: it is not in.
        """
        del self._entries[item]

    def discard(self, item: T) -> bool:
        """Take ``item`` out if it is in; return whether it was."""
        return self._entries.pop(item, None) is not None

    def peek(self) -> T:
        """Return the first item.

        Raises:
            IndexError: nothing is queued.
        """
        return self._first()[4]

    def pop(self) -> T:
        """Take out and return the first item.

        Raises:
            IndexError: nothing is queued.
        """
        item = self._first()[4]
        heapq.heappop(self._heap)
        del self._entries[item]
        return item

    def first(self, most: int) -> list[T]:
        """Return the ``most`` first items in order, in O(most log most) amortised."""
        heap, entries, found = self._heap, self._entries, list[T]()
        if not entries:
            return found
        first = self._first()  # drops what is forgotten before it, once and not in every look
        if most == 1:
            return [first[4]]
        # The next one is among the children of those that came before it.
        front = [(first, 0)]
        before: tuple[int, float, float, int, T] | None = None
        while front and len(found) < most:
            entry, at = heapq.heappop(front)
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heapq.heappush(front, (heap[child], child))
            # One re-keyed and back again stands there twice.
            if entry != before and entries.get(entry[4]) == entry:
                found.append(entry[4])
                before = entry
        return found

    def unordered(self) -> list[T]:
        """Return the items in no particular order, cheaply."""
        return list(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Iterate in order over a snapshot."""
        return (entry[4] for entry in sorted(self._entries.values(), key=lambda e: e[:4]))

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def _first(self) -> tuple[int, float, float, int, T]:
        heap, entries = self._heap, self._entries
        while heap and entries.get(heap[0][4]) != heap[0]:
            heapq.heappop(heap)
        return heap[0]

    def _put(self, item: T, rank: int, key: float, arrived_s: float, order: int) -> None:
        if math.isnan(key):
            raise ValueError("the key is not a number")
        entry = (rank, key, arrived_s, order, item)
        self._entries[item] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > max(_REBUILD_LEAST, 2 * len(self._entries)):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
