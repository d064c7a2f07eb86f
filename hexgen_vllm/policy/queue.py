"""Calls that wait for room on an engine, in the order in which they get it.

    1. one placement in ``1 / background_share``: the call demoted longest
    2. calls by priority, then by due time; with shares of tenants, before those of a tenant that
       is ahead of its share: all calls of the others (strict), or those that would become late
    3. demoted calls, least remaining work first

Starvation: a demoted call with k older ones before it is offered a place after at most
``(k + 1) (1 / background_share + 1)`` placements. Cost of an event: O(log n) search plus moves of
pointers, and O(tenants) with fair shares.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterator, Set
from heapq import merge
from itertools import chain, filterfalse, islice, takewhile
from typing import Final, NamedTuple

from hexgen_vllm.policy.overload import FairShares, endangered_from

_MAX_TENANTS: Final = 4096
_LOOK: Final = 64  # calls of tenants within their share that are looked at
_FULL_TURN: Final = 1.0 - 1e-9  # ten shares of 0.1 are one turn, whatever floats say


class _Entry(NamedTuple):
    rank: int  # minus its priority; 0 of a demoted call
    key: float  # due time, or seconds of work of a demoted call
    sequence: int
    call_id: str
    tenant: str
    tokens: int
    output_tokens: int
    since_s: float
    model: str
    endangered_s: float


class HeldCalls:
    """Held calls.

    Attributes:
        tokens: prompt and output tokens of all held calls.
        output_tokens: output tokens of those that are not demoted.
        models: how many of them wait for each model.

    Args:
        background_share: share of placements that the call demoted longest gets; 0 is none.
        shares: fair shares of tenants, ``None`` for order by due time alone.
    """

    def __init__(self, background_share: float = 0.0, shares: FairShares | None = None) -> None:
        self.tokens = self.output_tokens = 0
        self.models: Counter[str] = Counter()
        self._share, self._shares = background_share, shares
        self._turn = 0.0
        self._sequence = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # in order of arrival
        self._tenants: dict[str, list[_Entry]] = {}
        self._background: list[_Entry] = []
        self._demoted: OrderedDict[str, None] = OrderedDict()  # in order of demotion

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, call_id: object) -> bool:
        return call_id in self._entries

    def add(  # noqa: PLR0913 - one for each fact
        self,
        call_id: str,
        key: float,
        now: float,
        *,
        tenant: str = "",
        tokens: tuple[int, int] = (0, 0),
        priority: int = 0,
        background: bool = False,
        model: str = "",
        own_s: float = 0.0,
    ) -> None:
        """Hold a call.

        Args:
            call_id: the call, not held yet.
            key: when it is due, or for a demoted call the seconds of work it has left.
            now: the present moment.
            tenant: who pays.
            tokens: its prompt and output tokens.
            priority: higher is sooner; it outranks due time, as in stock vLLM's queue.
            background: it is demoted.
            model: what it needs.
            own_s: its own likely seconds on an engine.
        """
        self._sequence += 1
        entry = _Entry(
            0 if background else -priority, key, self._sequence, call_id, tenant, sum(tokens),
            tokens[1], now, model, endangered_from(key, now, own_s),
        )  # fmt: skip
        self._entries[call_id] = entry
        self.tokens += entry.tokens
        self.models[model] += 1
        self._queue(entry, background)

    def demote(self, call_id: str, work_s: float) -> None:
        """Move a held call behind the others; one demoted already stays where it is."""
        entry = self._entries[call_id]
        if call_id in self._demoted:
            return
        self._unqueue(entry)
        moved = _Entry(
            0, work_s, entry.sequence, call_id, entry.tenant, entry.tokens,
            entry.output_tokens, entry.since_s, entry.model, entry.endangered_s,
        )  # fmt: skip
        self._entries[call_id] = moved
        self._queue(moved, True)

    def remove(self, call_id: str) -> None:
        """Drop a held call."""
        entry = self._entries.pop(call_id)
        self.tokens -= entry.tokens
        self.models[entry.model] -= 1
        if not self.models[entry.model]:
            del self.models[entry.model]
        self._unqueue(entry)

    def discard(self, call_id: str) -> None:
        """Drop a call if it is held."""
        if call_id in self._entries:
            self.remove(call_id)

    def placed(self, call_id: str) -> None:
        """Drop a held call that got its place, and count it."""
        entry = self._entries[call_id]
        if self._shares is not None:
            self._shares.served(entry.tenant, entry.tokens)
        if self._demoted:
            # What :meth:`first` offers when only calls for this model are looked for.
            offered = (
                self._turn >= _FULL_TURN
                and self._oldest_demoted(frozenset((entry.model,))) == call_id
            )
            self._turn = 0.0 if offered else self._turn + self._share
        self.remove(call_id)

    def first(self, limit: int, models: Set[str] | None = None, now: float = 0.0) -> list[str]:
        """Return the first ``limit`` calls in order at ``now``.

        Args:
            limit: how many.
            models: if given, only calls that need one of these.
            now: the present moment, for shares of tenants.
        """
        found: list[str] = []
        oldest: str | None = None
        if self._turn >= _FULL_TURN:
            oldest = self._oldest_demoted(models)
            if oldest is not None:
                found.append(oldest)
        # A loop: compiled, a generator expression would go through all calls that wait.
        for entry in chain(self._by_due(now), self._background):
            if len(found) >= limit:
                break
            if (models is None or entry.model in models) and entry.call_id != oldest:
                found.append(entry.call_id)
        return found

    def last_first(self) -> Iterator[str]:
        """Yield calls in the order in which they are given up: the demoted, then the last."""
        queues = [reversed(queue) for queue in self._tenants.values()]
        for entry in chain(reversed(self._background), merge(*queues, reverse=True)):
            yield entry.call_id

    def waited_longer(self, seconds: float, now: float) -> list[str]:
        """Return the calls that have waited longer than ``seconds``."""
        late = takewhile(lambda e: now - e.since_s > seconds, self._entries.values())
        return [entry.call_id for entry in late]

    def _by_due(self, now: float) -> Iterator[_Entry]:
        queues = self._tenants
        if self._shares is None or len(queues) < 2:  # without shares all are in one queue
            return chain(*queues.values())
        ahead = self._shares.ahead(queues)
        if not ahead:
            return merge(*queues.values())
        within = merge(*(queue for tenant, queue in queues.items() if tenant not in ahead))
        if self._shares.strict:
            return chain(within, merge(*(queues[tenant] for tenant in queues if tenant in ahead)))
        endangered = [e for e in islice(within, _LOOK) if e.endangered_s <= now]
        if not endangered:
            return merge(*queues.values())
        ids = {entry.call_id for entry in endangered}
        rest = filterfalse(lambda entry: entry.call_id in ids, merge(*queues.values()))
        return chain(endangered, rest)

    def _oldest_demoted(self, models: Set[str] | None) -> str | None:
        """Return the call demoted longest, of those for one of ``models`` if that is given."""
        for call_id in self._demoted:
            if models is None or self._entries[call_id].model in models:
                return call_id
        return None

    def _queue(self, entry: _Entry, background: bool) -> None:
        if background:
            insort(self._background, entry)
            self._demoted[entry.call_id] = None
            return
        self.output_tokens += entry.output_tokens
        queue = self._tenants.get(self._tenant(entry))
        if queue is None:
            queue = self._tenants[self._tenant(entry)] = []
            self._begins(entry.tenant)
        insort(queue, entry)

    def _begins(self, tenant: str) -> None:
        if self._shares is None:
            return
        others = [name for name in self._tenants if name != tenant]
        self._shares.waits(tenant, others)
        if len(self._tenants) > _MAX_TENANTS:
            self._shares.forget(self._tenants)

    def _unqueue(self, entry: _Entry) -> None:
        if entry.call_id in self._demoted:
            del self._demoted[entry.call_id]
            del self._background[bisect_left(self._background, entry)]
            return
        self.output_tokens -= entry.output_tokens
        tenant = self._tenant(entry)
        queue = self._tenants[tenant]
        del queue[bisect_left(queue, entry)]
        if not queue:
            del self._tenants[tenant]

    def _tenant(self, entry: _Entry) -> str:
        return "" if self._shares is None else entry.tenant
