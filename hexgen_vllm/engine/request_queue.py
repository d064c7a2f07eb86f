"""vLLM's waiting queue, ordered by urgency."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hexgen_vllm.engine.compat import Request, RequestQueue
from hexgen_vllm.policy.urgency import UrgencyHeap


class UrgencyQueue(RequestQueue):
    """A :class:`RequestQueue` over :class:`UrgencyHeap`, by ``rank`` and ``key_s`` of
    ``request.hexgen``.

    vLLM looks at the head, tries to place it and then pops, meaning what it looked at; so ``peek``
    pins the head until the next ``pop`` or ``peek``, whatever is queued in between. Every
    operation is O(log n), also removal, which is O(n) in both of vLLM's queues.
    """

    def __init__(self) -> None:
        self._heap: UrgencyHeap[Request] = UrgencyHeap()
        self._pinned: Request | None = None

    def add_request(self, request: Request) -> None:
        """Queue ``request`` at its key."""
        call = request.hexgen
        call.queued_start_s = call.latest_start_s
        self._heap.push(request, call.key_s, call.arrived_s, call.rank)

    def peek_request(self) -> Request:
        """Return the most urgent request and pin it.

        Raises:
            IndexError: the queue is empty.
        """
        self._pinned = self._heap.peek()
        return self._pinned

    def pop_request(self) -> Request:
        """Take out the pinned request, or the most urgent one.

        Raises:
            IndexError: the queue is empty.
        """
        pinned, self._pinned = self._pinned, None
        if pinned is not None and self._heap.discard(pinned):
            return pinned
        return self._heap.pop()

    def prepend_request(self, request: Request) -> None:
        """Queue ``request`` at its key: urgency has no front to prepend to."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Queue ``requests`` at their keys."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Take out ``request``.

        Raises:
            KeyError: it is not in the queue.
        """
        self._heap.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out those of ``requests`` that are in the queue; vLLM passes others, too."""
        for request in requests:
            self._heap.discard(request)

    def rekey(self, request: Request) -> None:
        """Move ``request`` to its present key if it is in the queue."""
        if request in self._heap:
            call = request.hexgen
            call.queued_start_s = call.latest_start_s
            self._heap.rekey(request, call.key_s, call.rank)

    def first(self, most: int) -> list[Request]:
        """Return the ``most`` most urgent requests, in order."""
        return self._heap.first(most)

    def unordered(self) -> list[Request]:
        """Return what is queued, in no particular order, cheaply."""
        return self._heap.unordered()

    def __contains__(self, request: object) -> bool:
        return request in self._heap

    def __bool__(self) -> bool:
        return bool(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._heap)
