"""Virtual time: a heap of events in a total order.

Events run in order of (time, priority, insertion). Two runs that insert the same events run them
in the same order, so that equal seeds give equal results to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

from hexgen_vllm.errors import HexgenError

# What happens first when times are equal: an engine ends its step before a call reaches it, as in
# vLLM, where outputs are handed out before new requests are looked at.
STEP_END: Final = 0
DELIVERY: Final = 1
ARRIVAL: Final = 2
TICK: Final = 3

Handler = Callable[[float, Any], None]


class EventLoop:
    """Runs handlers at their times.

    Attributes:
        now: the present moment, seconds; never goes back.
        events: events run so far.
    """

    __slots__ = ("_heap", "_inserted", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, int, Handler, Any]] = []
        self._inserted = 0

    def at(self, time_s: float, priority: int, handler: Handler, argument: Any = None) -> None:
        """Call ``handler(time_s, argument)`` at ``time_s``.

        Raises:
            HexgenError: the time is not a number or has passed; that is a defect of the caller.
        """
        if not self.now <= time_s < math.inf:
            raise HexgenError(f"an event at {time_s} s cannot be reached from {self.now} s")
        self._inserted += 1
        heappush(self._heap, (time_s, priority, self._inserted, handler, argument))

    def run(self, until_s: float = math.inf) -> None:
        """Run events until none is left or the next one is later than ``until_s``."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, _, handler, argument = heappop(heap)
            self.events += 1
            handler(self.now, argument)

    def __len__(self) -> int:
        return len(self._heap)
