"""How long to wait before a process that died is started again."""

from __future__ import annotations

from typing import Final

LONGEST_S: Final = 30.0
STEADY_S: Final = 60.0
"""A process that ran this long starts as if it had never died."""


class Backoff:
    """Twice as long after each death, at most 30 s; from the start again after a long life."""

    def __init__(self, first_s: float) -> None:
        """Start with ``first_s`` seconds."""
        self._first_s = first_s
        self._deaths = 0

    def after(self, lived_s: float) -> float:
        """Return the seconds to wait after a life of ``lived_s`` seconds."""
        self._deaths = 1 if lived_s >= STEADY_S else self._deaths + 1
        return float(min(self._first_s * 2.0 ** min(self._deaths - 1, 16), LONGEST_S))
