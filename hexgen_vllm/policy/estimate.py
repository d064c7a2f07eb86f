"""Distributions learned from what was seen: bounded windows with exact quantiles."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Any, Generic, Protocol, TypeVar


class Ordered(Protocol):
    """Anything with a total order among its own kind."""

    def __lt__(self, other: Any, /) -> bool:
        """Return whether self sorts before ``other``."""
        ...


S = TypeVar("S", bound=Ordered)


class Window(Generic[S]):
    """The last ``size`` samples, kept sorted.

    Adding costs O(size) moves of pointers (microseconds for some hundred), reading a quantile O(1).
    """

    def __init__(self, size: int = 256) -> None:
        self._by_age: deque[S] = deque()
        self._sorted: list[S] = []
        self._size = size

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, sample: S) -> None:
        """Take in ``sample``; the oldest goes when the window is full."""
        if len(self._by_age) == self._size:
            oldest = self._by_age.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._by_age.append(sample)
        insort(self._sorted, sample)

    def quantile(self, q: float) -> S:
        """Return the sample below which a share ``q`` of the others lies (nearest rank).

        Raises:
            IndexError: the window is empty.
        """
        rank = min(int(q * len(self._sorted)), len(self._sorted) - 1)
        return self._sorted[rank]

    def above(self, floor: S, q: float) -> S | None:
        """Return the ``q`` quantile of the samples larger than ``floor``, ``None`` if none is.

        This is the estimate of a length once ``floor`` of it has been seen.
        """
        low = bisect_left(self._sorted, floor)
        while low < len(self._sorted) and not floor < self._sorted[low]:
            low += 1
        rest = len(self._sorted) - low
        if rest == 0:
            return None
        return self._sorted[low + min(int(q * rest), rest - 1)]
