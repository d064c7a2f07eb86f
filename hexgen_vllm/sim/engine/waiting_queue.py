"""Calls that wait in a simulated engine: in vLLM's own order, or in ours by key."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Protocol

from hexgen_vllm.policy.urgency import UrgencyHeap
from hexgen_vllm.sim.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """What an engine asks of its queue."""

    def push(self, sequence: Sequence) -> None:
        """Add a call that arrives."""

    def push_back(self, sequence: Sequence) -> None:
        """Add a call that lost its place in the batch."""

    def peek(self) -> Sequence:
        """Return the next call; the queue must not be empty."""

    def pop(self) -> Sequence:
        """Take out the next call; the queue must not be empty."""

    def rekey(self, sequence: Sequence) -> None:
        """Move a queued call to its present key."""

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next, in order."""

    def unordered(self) -> list[Sequence]:
        """Return what is queued, in no particular order."""

    def __contains__(self, sequence: object) -> bool:
        """Return whether a call is queued."""


class ArrivalQueue:
    """Stock vLLM, ``fcfs``: in order of arrival, calls that lost their place in front."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()

    def push(self, sequence: Sequence) -> None:
        """Add a call at the end."""
        self._queue.append(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """Add a call in front."""
        self._queue.appendleft(sequence)

    def pop(self) -> Sequence:
        """Take out the next call."""
        return self._queue.popleft()

    def peek(self) -> Sequence:
        """Return the next call."""
        return self._queue[0]

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._queue

    def rekey(self, sequence: Sequence) -> None:
        """Do nothing: keys do not count."""

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next."""
        return list(islice(self._queue, most))

    def unordered(self) -> list[Sequence]:
        """Return what is queued."""
        return list(self._queue)


class KeyQueue:
    """By key, then arrival, over the live engine's own heap."""

    def __init__(self) -> None:
        self._heap: UrgencyHeap[Sequence] = UrgencyHeap()

    def peek(self) -> Sequence:
        """Return the next call."""
        return self._heap.peek()

    def pop(self) -> Sequence:
        """Take out the next call."""
        return self._heap.pop()

    def first(self, most: int) -> list[Sequence]:
        """Return up to ``most`` calls that are next, in order."""
        return self._heap.first(most)

    def unordered(self) -> list[Sequence]:
        """Return what is queued."""
        return self._heap.unordered()

    def push(self, sequence: Sequence) -> None:
        """Add a call."""
        sequence.queued_start_s = sequence.latest_start_s
        self._heap.push(sequence, sequence.key_s, sequence.arrived_s, sequence.rank)

    def push_back(self, sequence: Sequence) -> None:
        """Add a call that lost its place."""
        self.push(sequence)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._heap

    def rekey(self, sequence: Sequence) -> None:
        """Move a queued call to its present key."""
        sequence.queued_start_s = sequence.latest_start_s
        self._heap.rekey(sequence, sequence.key_s, sequence.rank)


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
