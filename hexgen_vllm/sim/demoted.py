"""Calls of demoted workflows in a simulated engine: how long they may stay behind all others."""

from __future__ import annotations

from collections import deque

from hexgen_vllm.sim.sequence import Sequence


class Demoted:
    """Demoted calls of one engine, in order of arrival.

    As in the live engine, a call that has waited for as long as it may is ordered among the
    others from then on, as if that moment were its deadline.

    Args:
        most_s: seconds that a call may wait.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._calls: deque[tuple[float, Sequence]] = deque()  # when they age, oldest first

    @property
    def ages_s(self) -> float:
        """When the next call ages; ``inf`` if there is none."""
        return self._calls[0][0] if self._calls else float("inf")

    def add(self, sequence: Sequence, now: float) -> None:
        """Note a call that arrives; only a demoted one counts."""
        if sequence.background:
            self._calls.append((now + self._most_s, sequence))

    def aged(self, now: float) -> list[Sequence]:
        """End the demotion of calls that have waited long enough, and return them."""
        found = []
        while self.ages_s <= now:
            deadline_s, sequence = self._calls.popleft()
            if sequence.tokens < sequence.total_tokens:  # it has not ended
                sequence.background = False
                sequence.deadline_s, sequence.tail_s = deadline_s, 0.0
                found.append(sequence)
        return found
