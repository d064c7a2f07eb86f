"""Names that clients choose, made fit for metrics: only so many of them are told apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

OTHER: Final = "other"
AGAIN: Final = 5
"""Times that a name must come before it can take the place of one that comes no more."""
IDLE_USES: Final = 1024
"""Uses of all names after which one that was not among them may lose its place."""
_WAITING: Final = 1024  # names without a place that are remembered


class Names:
    """Tells ``most`` names apart; all others are :data:`OTHER`.

    The first ones have a place at once. Later ones get that of a name which has not come for
    long, if they come again and again: names that are made up call by call never do, and those
    that were in use before the junk keep their places.

    Args:
        most: names told apart.
        dropped: is told of a name that lost its place, to count its past among the others.
    """

    __slots__ = ("_dropped", "_last", "_most", "_uses", "_waiting")

    def __init__(self, most: int, dropped: Callable[[str], None]) -> None:
        self._most, self._dropped = most, dropped
        self._uses = 0
        self._last: dict[str, int] = {}
        self._waiting: OrderedDict[str, int] = OrderedDict()

    def __call__(self, name: str) -> str:
        """Return ``name`` if it is one of those that are told apart."""
        self._uses += 1
        if name not in self._last and not self._enters(name):
            return OTHER
        self._last[name] = self._uses
        return name

    def _enters(self, name: str) -> bool:
        if len(self._last) < self._most:
            return True
        times = self._waiting.pop(name, 0) + 1
        if times >= AGAIN:
            oldest = min(self._last, key=self._last.__getitem__)
            if self._uses - self._last[oldest] > IDLE_USES:
                del self._last[oldest]
                self._dropped(oldest)
                return True
        self._waiting[name] = times
        if len(self._waiting) > _WAITING:
            self._waiting.popitem(last=False)
        return False
