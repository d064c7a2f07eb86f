"""Order by urgency inside vLLM: of its waiting queue, and of its batch.

The order of the batch says who gets tokens first, and who gives way when KV blocks run out.
vLLM walks through ``running`` from the front, hands out the step's token budget, and preempts the
last call when a block is missing. An order that decides nothing is not made: walking through the
calls in the order in which they lie in memory is measurably faster.

* Blocks may run out in this step, or decodes alone may use up the budget: by key, so that the
  most urgent call is served first and the least urgent one gives way.
* Otherwise decodes go before prefill chunks, and chunks by key: a chunk takes whatever budget
  there is, and a decode beside it costs almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, Final

from hexgen_vllm.engine.compat import Request, RequestQueue
from hexgen_vllm.policy.urgency import UrgencyHeap

BY_KEY: Final = attrgetter("hexgen.rank", "hexgen.key_s")
"""The order of the queue, as a key of calls."""


def by_key(running: list[Request]) -> None:
    """Put the most urgent call first."""
    running.sort(key=BY_KEY)


def arrange(scheduler: Any) -> None:
    """Put ``scheduler.running`` in the order that this step needs."""
    running, chunks = scheduler.running, _chunks(scheduler)
    if _is_short(scheduler, bool(chunks)):
        by_key(running)
    elif chunks:
        by_key(chunks)
        running[:] = [r for r in running if not r.is_prefill_chunk] + chunks


def may_run_short(scheduler: Any) -> bool:
    """Return whether blocks, or tokens for decodes, may not suffice for the whole batch."""
    return _is_short(scheduler, bool(_chunks(scheduler)))


def growth(scheduler: Any) -> int:
    """Return the blocks that the batch takes in this step."""
    size, drafts = scheduler.block_size, scheduler.num_spec_tokens
    computed = [r.num_computed_tokens for r in scheduler.running if not r.is_prefill_chunk]
    decodes = sum([-tokens % size <= drafts for tokens in computed])
    chunks = sum([int(scheduler._request_remaining_blocks(r)) for r in _chunks(scheduler)])
    return len(scheduler.kv_cache_config.kv_cache_groups) * decodes + chunks


def _chunks(scheduler: Any) -> list[Request]:
    """Return the calls of the batch whose prompt is not done, as vLLM notes them."""
    if not scheduler._inflight_prefills:
        return []  # the usual case; to walk through the batch takes longer than all else here
    return [r for r in scheduler.running if r.is_prefill_chunk]


def _is_short(scheduler: Any, has_chunks: bool) -> bool:
    size, budget = scheduler.block_size, scheduler.max_num_scheduled_tokens
    each = 1 + scheduler.num_spec_tokens
    decodes = len(scheduler.running)
    blocks = decodes * (1 + each // size) + (budget // size + 1 if has_chunks else 0)
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return bool(free < groups * blocks or decodes * each >= budget)


class UrgencyQueue(RequestQueue):
    """A :class:`RequestQueue` over :class:`UrgencyHeap`, by ``rank`` and ``key_s`` of
    ``request.hexgen``.

    vLLM looks at the head, tries to place it and then pops, meaning what it looked at; so ``peek``
    pins the head until the next ``pop`` or ``peek``, whatever is queued in between. Every
    operation is O(log n), also removal, which is O(n) in both of vLLM's queues.

    Attributes:
        soonest_s: no queued call has its latest start before this moment.
    """

    def __init__(self) -> None:
        self._heap: UrgencyHeap[Request] = UrgencyHeap()
        self._pinned: Request | None = None
        self._twice: list[Request] = []
        self.soonest_s = math.inf

    def add_request(self, request: Request) -> None:
        """Queue ``request`` at its key; see :meth:`restore` for one that is queued already."""
        if request in self._heap:
            self._twice.append(request)
            self.rekey(request)
            return
        call = self._noted(request)
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

    def restore(self) -> None:
        """Queue again what vLLM has queued twice and then taken out as if it had ended.

        It does so with a session that was preempted when the output came that ends its turn: the
        session would wait for its next input outside of every queue, and for ever.
        """
        twice, self._twice = self._twice, []
        for request in twice:
            if request not in self._heap and not request.is_finished():
                self.add_request(request)

    def rekey(self, request: Request) -> None:
        """Move ``request`` to its present key if it is in the queue."""
        if request in self._heap:
            call = self._noted(request)
            self._heap.rekey(request, call.key_s, call.rank)

    def _noted(self, request: Request) -> Any:
        call = request.hexgen
        start_s = call.queued_start_s = call.latest_start_s
        self.soonest_s = min(self.soonest_s, start_s)
        return call

    def look_for_soonest(self) -> None:
        """Make ``soonest_s`` the latest start of a call that is queued, in O(n)."""
        self.soonest_s = min([r.hexgen.latest_start_s for r in self.unordered()], default=math.inf)

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
