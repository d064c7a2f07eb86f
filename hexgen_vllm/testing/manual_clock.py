"""A clock that moves only when told to."""

from __future__ import annotations


class ManualClock:
    """A :class:`hexgen_vllm.clock.Clock` for tests.

    Args:
        start_s: the time it shows at first.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the time it shows, in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> float:
        """Move the clock forward and return the new time.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a clock does not go back, not even by {-seconds} s")
        self._now_s += seconds
        return self._now_s

    def reach(self, moment_s: float) -> None:
        """Move the clock forward to exactly ``moment_s``.

        Raises:
            ValueError: the moment has passed.
        """
        if moment_s < self._now_s:
            raise ValueError(f"a clock does not go back from {self._now_s} to {moment_s} s")
        self._now_s = moment_s
