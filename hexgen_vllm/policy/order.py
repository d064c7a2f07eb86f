"""Where a call stands in an engine's order: the client's priority, then its class, then its key.

| class | comes | key |
|---|---|---|
| promoted | first | order of arrival |
| tight: has a deadline | then | by the order in force; ``due`` is D - R |
| late: cannot be on time any more | then | D + 8 (D - A), A when its workflow began |
| batch: no deadline | then | order of arrival |
| background: demoted by the router | last, whatever its priority | seconds of work left |

A waiting call is late, in the order ``due``, once it is more likely than not that it would miss its
deadline if it were admitted now, with the median length of its kind and at the speed that calls
without deadline leave when they make way:

    now > D - R_10 - T_50

(R at its 10 % quantile: what follows may be nothing.) Whoever is admitted later than that takes a
place for an answer that comes too late, and makes the next one late with it. Earliest deadline
first is the best order while all can be on time, and the worst once they cannot: those that are
late already come first and make the next ones late. Moving them behind the others is what keeps
the others on time. Among late calls those come first whose workflows had little time, which are
the short ones, and have waited long for it: no newcomer passes an old one for ever, as it does
where the least work goes first. Agents of 6 to 20 calls, in more of them than an engine can serve,
three seeds, as many on time: with least work first the slowest twentieth took 58 times their time
alone, in this order 31; with KV in host memory 14.5 and 13.8.

What it starves: late and batch calls while tight ones keep coming. When fewer of them run than
their share of places (``interactive_share``), the one that waits longest is promoted, so the
oldest of them waits no longer than it takes a place to become free.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Generic, Protocol, TypeVar

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.service_rates import ServiceRates, output_left
from hexgen_vllm.policy.urgency import (
    BATCH_S,
    LAST_RANK,
    background_key,
    batch_key,
    late_key,
    latest_start,
    paper_key,
)
from hexgen_vllm.types import NO_DEADLINE

T = TypeVar("T")

_REBUILD_LEAST: Final = 64

MOST_LATE: Final = 16
"""Calls put behind the others in one step; a burst of them must not hold it up."""


class Placed(Protocol):
    """The state of a call that the order reads and sets; times are absolute seconds.

    Attributes:
        deadline_s: D of its workflow, ``inf`` for none.
        tail_s: R, predicted critical path after it.
        arrived_s: when it arrived.
        began_s: A, when the first call of its workflow arrived.
        background: the router has demoted its workflow.
        late: it cannot be on time any more.
        promoted: it goes first in its rank.
        rank: set; the client's priority, lower first.
        key_s: set; its place in its rank.
        latest_start_s: set; L, ``inf`` for a call that cannot be late.
    """

    deadline_s: float
    tail_s: float
    arrived_s: float
    began_s: float
    background: bool
    late: bool
    promoted: bool
    rank: int
    key_s: float
    latest_start_s: float


class Priced(Placed, Protocol):
    """The state of a call that its price is made from.

    Attributes:
        expected_tokens: output tokens expected in all.
        least_tail_s: R at a low quantile.
    """

    expected_tokens: int
    least_tail_s: float


def put(
    call: Placed, order: str, priority: int, turn: float, service_s: float, own_key_s: float
) -> None:
    """Set rank, key and latest start of ``call``.

    Args:
        call: its state.
        order: the order of calls with deadlines.
        priority: the client's, as vLLM has it.
        turn: of two calls the one that came first has the smaller one: a count, or seconds.
        service_s: T of what is left of it.
        own_key_s: the key itself, where the order in force is none of these.
    """
    if call.background:
        call.rank = LAST_RANK
        call.key_s = call.latest_start_s = background_key(service_s + call.tail_s)
        return
    call.rank = priority
    if call.late or call.deadline_s == NO_DEADLINE:
        call.latest_start_s = NO_DEADLINE
        loose_s = late_key(call.deadline_s, call.began_s) if call.late else batch_key(turn)
        call.key_s = turn - BATCH_S if call.promoted else loose_s
        return
    call.latest_start_s = latest_start(call.deadline_s, call.tail_s, service_s)
    if order == "due":
        call.key_s = call.deadline_s - call.tail_s
    elif order == "slack":
        call.key_s = call.latest_start_s
    elif order == "edf":
        call.key_s = call.deadline_s
    elif order == "fcfs":
        call.key_s = call.arrived_s
    else:
        call.key_s = own_key_s


def price(  # noqa: PLR0913 - one for each fact
    call: Priced,
    order: str,
    rates: ServiceRates,
    priority: int,
    turn: float,
    *,
    prompt: int,
    ahead: int,
    done: int,
    most: int,
    own_key_s: float = 0.0,
) -> None:
    """Set rank, key and latest start of ``call`` from what it still has to do.

    Args:
        call: its state.
        order: the order of calls with deadlines.
        rates: what a token costs now.
        priority: the client's, as vLLM has it.
        turn: as in :func:`put`.
        prompt: its prompt tokens.
        ahead: tokens whose KV is not there yet.
        done: output tokens so far.
        most: output tokens that the request allows.
        own_key_s: as in :func:`put`; the order ``paper`` makes its own.
    """
    left = output_left(call.expected_tokens, done, most)
    if order == "paper":
        whole_s = rates.service_s(prompt, call.expected_tokens)
        own_key_s = paper_key(call.arrived_s, call.deadline_s, call.tail_s, whole_s)
    put(call, order, priority, turn, rates.service_s(ahead, left), own_key_s)


def late_from_s(
    call: Priced, rates: ServiceRates, token_s: float, tokens: int, done: int, most: int
) -> float:
    """Return the moment from which a waiting call would more likely than not be late.

    Args:
        call: its state.
        rates: what a token costs now.
        token_s: seconds of an output token that can be had
            (:func:`hexgen_vllm.policy.pace.reachable_token_s`).
        tokens: its prompt and output tokens, all of which it has to compute.
        done: of them, output.
        most: output tokens that the request allows.
    """
    own_s = rates.prefill_s(tokens) + output_left(call.expected_tokens, done, most) * token_s
    return latest_start(call.deadline_s, call.least_tail_s, own_s)


def demotes(options: EngineOptions) -> bool:
    """Return whether late calls come after the others."""
    return options.demote_late and options.order == "due"


class LateWatch(Generic[T]):
    """Calls by the moment from which they cannot be on time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._from_s: dict[T, float] = {}
        self._count = 0

    def add(self, item: T, late_from_s: float) -> None:
        """Watch ``item``; of what is said of it the earliest counts. ``inf`` is never."""
        if late_from_s >= self._from_s.get(item, NO_DEADLINE):
            return  # calls are priced again and again: noting each time would grow without bound
        self._from_s[item] = late_from_s
        self._count += 1
        heappush(self._heap, (late_from_s, self._count, item))
        if len(self._heap) > max(_REBUILD_LEAST, 2 * len(self._from_s)):
            known = self._from_s
            self._heap = [entry for entry in self._heap if known.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def forget(self, item: T) -> None:
        """Watch ``item`` no more, if it is watched."""
        self._from_s.pop(item, None)

    def late(self, now: float, most: int = MOST_LATE) -> list[T]:
        """Take out and return up to ``most`` of those whose moment has passed."""
        found: list[T] = []
        while self._heap and self._heap[0][0] < now and len(found) < most:
            from_s, _, item = heappop(self._heap)
            if self._from_s.get(item) == from_s:
                del self._from_s[item]
                found.append(item)
        return found
