"""Distributions learned from what was seen: bounded windows with exact quantiles."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Any, Final, Generic, Protocol, TypeVar


class Ordered(Protocol):
    """Anything with a total order among its own kind."""

    def __lt__(self, other: Any, /) -> bool:
        """Return whether self sorts before ``other``."""
        ...


S = TypeVar("S", bound=Ordered)

_FEW: Final = 16  # up to so many new samples are put in their places one by one


class Window(Generic[S]):
    """The last ``size`` samples, sorted when they are read.

    Adding costs O(1), as most windows are added to more often than they are read. Reading a
    quantile costs O(size) moves of pointers for each sample since the last time, at most a sort.
    """

    def __init__(self, size: int = 256) -> None:
        self._by_age: deque[S] = deque()
        self._by_value: list[S] = []  # without the newest ``_new`` samples
        self._gone: list[S] = []  # in it still, though too old
        self._new = 0
        self._size = size

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, sample: S) -> None:
        """Take in ``sample``; the oldest goes when the window is full."""
        if len(self._by_age) == self._size:
            oldest = self._by_age.popleft()
            if self._new < self._size:
                self._gone.append(oldest)
            else:
                self._new -= 1  # it was never put in its place
        self._by_age.append(sample)
        self._new += 1

    def _ordered(self) -> list[S]:
        found = self._by_value
        if self._new > _FEW:
            found = self._by_value = sorted(self._by_age)
        else:
            for sample in self._gone:
                del found[bisect_left(found, sample)]
            for index in range(len(self._by_age) - self._new, len(self._by_age)):
                insort(found, self._by_age[index])
        self._gone.clear()
        self._new = 0
        return found

    def quantile(self, q: float) -> S:
        """Return the sample below which a share ``q`` of the others lies (nearest rank).

        Raises:
            IndexError: the window is empty.
        """
        found = self._ordered() if self._new else self._by_value
        return found[min(int(q * len(found)), len(found) - 1)]

    def above(self, floor: S, q: float) -> S | None:
        """Return the ``q`` quantile of the samples larger than ``floor``, ``None`` if none is.

        This is the estimate of a length once ``floor`` of it has been seen.
        """
        found = self._ordered()
        low = bisect_left(found, floor)
        while low < len(found) and not floor < found[low]:
            low += 1
        rest = len(found) - low
        if rest == 0:
            return None
        return found[low + min(int(q * rest), rest - 1)]
