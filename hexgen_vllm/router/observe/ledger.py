"""The book of calls: every call that came in was answered, failed for a reason, or is open."""

from __future__ import annotations

from collections import Counter
from typing import Final

from hexgen_vllm.router.answers import Outcome

CLAIMS: Final = ("deadline", "priority", "tenant")
GONE: Final = "gone"
"""Stands for all engines that have left, of which there may be any number."""


class Ledger:
    """Counts of calls, by endpoint name and outcome.

    Attributes:
        arrived: calls that came in, by endpoint.
        ended: calls that ended, by endpoint and outcome.
        retries: times a call was sent again, by reason.
        placements: times a call was placed, by engine and the policy's reason.
        overdue: calls answered after they were due.
        clamped: claims of clients beyond their ceiling, by what was claimed.
    """

    def __init__(self) -> None:
        self.arrived: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self.placements: Counter[tuple[str, str]] = Counter()
        self.overdue = 0
        self.clamped = Counter(dict.fromkeys(CLAIMS, 0))

    @property
    def open(self) -> int:
        """Calls that have not ended."""
        return self.arrived.total() - self.ended.total()

    def engine_left(self, name: str) -> None:
        """Count the placements on an engine among those of all that have left."""
        for engine, reason in [key for key in self.placements if key[0] == name]:
            self.placements[GONE, reason] += self.placements.pop((engine, reason))

    def answered(self) -> int:
        """Return the calls that were answered in full."""
        return sum(n for (_, outcome), n in self.ended.items() if outcome == Outcome.ANSWERED)

    def failed(self) -> dict[str, int]:
        """Return the calls that failed, by reason."""
        found: Counter[str] = Counter()
        for (_, outcome), n in self.ended.items():
            if outcome != Outcome.ANSWERED:
                found[outcome] += n
        return dict(found)
