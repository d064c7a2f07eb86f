"""The only reader of real time outside ``engine/``.

Policies get ``now`` as a value. Drivers get it from a :class:`Clock`. The system clock adds a
random offset, so that a time taken from another clock shows at once instead of looking right.
"""

from __future__ import annotations

import random
import time
from typing import Final, Protocol

_monotonic: Final = time.monotonic  # compiled code would look it up for every call


class Clock(Protocol):
    """A source of seconds that never goes back."""

    def now(self) -> float:
        """Return seconds on this clock; only differences have a meaning."""
        ...


def unix_s() -> float:
    """Return seconds since 1970, for what is written down or told; it may jump."""
    return time.time()


class SystemClock:
    """Monotonic time of this process plus a random offset of 1e5 to 2e5 seconds."""

    def __init__(self) -> None:
        self._offset = random.uniform(1e5, 2e5)

    def now(self) -> float:
        """Return seconds since an arbitrary moment."""
        return _monotonic() + self._offset
