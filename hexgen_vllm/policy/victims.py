"""The search for running calls that make room, over the first few waiting calls.

:mod:`hexgen_vllm.policy.preemption` decides about one waiting call; this walks through those that
are next in the order, so that one that cannot be helped does not switch displacement off for those
behind it. Room is reckoned in the order of the queue: what stands before a call and is not helped
takes its share of the room first, as the scheduler will let it in first.

Looking at the batch costs time in every step, so it goes from cheap to dear and stops early: is
anyone waiting who may displace, is room short at all, who has anything to give. At most
:data:`MOST_HEADS` waiting and :data:`MOST_VIEWS` running calls are looked at, and after a look in
vain there is none for :data:`QUIET_STEPS` steps unless the first waiting call or the number of
running ones has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Generic, Protocol, TypeVar

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.preemption import (
    Candidate,
    RunningView,
    choose_victims,
    is_below,
    is_peer,
    mercy,
    urgent,
    wait_for_room,
)
from hexgen_vllm.policy.service_rates import ServiceRates, output_left

T = TypeVar("T")

MOST_HEADS: Final = 8
MOST_VIEWS: Final = 32
QUIET_STEPS: Final = 4


class Standing(Protocol):
    """What the search reads of a call; see :class:`hexgen_vllm.policy.preemption.RunningView`."""

    rank: int
    key_s: float
    latest_start_s: float
    queued_start_s: float
    displacements: int
    expected_tokens: int
    promoted: bool

    @property
    def has_deadline(self) -> bool:
        """Whether it can be late."""


class BatchView(Protocol[T]):
    """What the search asks of an engine, in the order in which it asks."""

    def heads(self, most: int) -> Sequence[T]:
        """Return up to ``most`` waiting calls that could start, in the queue's order."""

    def standing(self, call: T) -> Standing:
        """Return the state of a call."""

    def worst(self) -> tuple[int, bool]:
        """Return the largest rank in the batch, and whether all of it has deadlines.

        Those that were promoted count as if they had: they come before all that wait.
        """

    def size(self) -> int:
        """Return the number of running calls."""

    def room(self) -> tuple[int, int]:
        """Return the slots and blocks that are free after what the batch takes in this step."""

    def needs(self, head: T, free: int) -> tuple[int, Any]:
        """Return the blocks that ``head`` takes, and which blocks it would share with the batch.

        What it shares is looked up only where it matters: not if it fits into ``free`` without.
        """

    def ordered(self) -> Sequence[T]:
        """Put the batch into the queue's order, most urgent first, and return it."""

    def endings(self) -> Sequence[tuple[float, int]]:
        """Return in how many seconds each running call should end, and roughly its blocks."""

    def view(self, call: T, shared: Any) -> RunningView:
        """Return a running call as a victim; what the head would share is not released."""

    def leaves_tokens(self, victims: Sequence[T]) -> bool:
        """Return whether the step's token budget reaches beyond what stays in the batch."""


def uncredited_start_s(call: Standing) -> float:
    """Return L without credit for progress, or equal deadlines would displace each other."""
    return min(call.latest_start_s, call.queued_start_s)


def ending(call: Standing, rates: ServiceRates, ahead: int, done: int, most: int) -> float:
    """Return in how many seconds a running call should end.

    Args:
        call: its state.
        rates: what a token costs now.
        ahead: tokens whose KV is not there yet.
        done: output tokens so far.
        most: output tokens that the request allows.
    """
    return rates.service_s(ahead, output_left(call.expected_tokens, done, most))


def running_view(
    call: Standing,
    done: int,
    most: int,
    *,
    redo_s: float,
    lost_tokens: int,
    blocks_released: int,
    can_free: bool = True,
) -> RunningView:
    """Return a running call as a victim.

    Args:
        call: its state.
        done: output tokens so far.
        most: output tokens that the request allows.
        redo_s, lost_tokens, blocks_released, can_free: as in
            :class:`hexgen_vllm.policy.preemption.RunningView`.
    """
    return RunningView(
        key_s=call.key_s,
        latest_start_s=uncredited_start_s(call),
        redo_s=redo_s,
        lost_tokens=lost_tokens,
        blocks_released=blocks_released,
        output_left=output_left(call.expected_tokens, done, most),
        displacements=call.displacements,
        can_free=can_free,
        rank=call.rank,
        has_deadline=call.has_deadline,
    )


class VictimSearch(Generic[T]):
    """Finds the running calls to preempt before a step.

    Args:
        batch: the engine.
        options: its limits.
    """

    def __init__(self, batch: BatchView[T], options: EngineOptions) -> None:
        self._batch, self._options = batch, options
        self.enabled = options.displace and options.max_displacements > 0
        self._quiet: tuple[T, int] | None = None
        self._worst = (0, True)
        self._looked_at = 0  # step of the last look in vain
        # Of the present look; what several heads ask is looked up once.
        self._views: dict[T, RunningView] = {}
        self._endings: Sequence[tuple[float, int]] = ()

    def victims(self, now: float, step: int) -> list[T]:
        """Return whom to preempt before step number ``step``, which is to begin ``now``."""
        batch = self._batch
        if not self.enabled or not batch.size():
            return []
        heads = batch.heads(MOST_HEADS)
        if not heads or self._is_vain(heads[0], step):
            return []
        self._worst = batch.worst()
        wanting = [self._wants(head, now) for head in heads]
        while wanting and not wanting[-1]:
            wanting.pop()  # nobody is displaced for those behind the last one who wants it
        if not wanting:
            return []
        found = self._search(heads, wanting, now)
        self._views, self._endings = {}, ()
        if found and batch.leaves_tokens(found):
            return found
        self._quiet, self._looked_at = (heads[0], batch.size()), step
        return []

    def look_again(self, now: float, step: int) -> tuple[float, int | None]:
        """Return when, or after how many steps, another look may be worth it; never is ``inf``."""
        if not self.enabled:
            return math.inf, None
        again_s = math.inf
        self._worst = self._batch.worst()
        for head in self._batch.heads(MOST_HEADS):
            if self._wants(head, now):
                return math.inf, QUIET_STEPS + 1 - (step - self._looked_at)
            state = self._batch.standing(head)
            if state.has_deadline:
                again_s = min(again_s, state.latest_start_s - self._options.displace_slack_s)
        return (again_s if again_s > now else math.inf), None

    def _wants(self, head: T, now: float) -> bool:
        """Return whether ``head`` may displace anybody, cheaply judged."""
        state, (rank, all_due) = self._batch.standing(head), self._worst
        if state.rank < rank:
            return True
        due = state.has_deadline
        return due and (not all_due or urgent(state.latest_start_s, self._options, now))

    def _is_vain(self, head: T, step: int) -> bool:
        if self._quiet != (head, self._batch.size()):
            self._quiet = None
            return False
        if step - self._looked_at <= QUIET_STEPS:
            return True
        self._quiet = None
        return False

    def _search(self, heads: Sequence[T], wanting: Sequence[bool], now: float) -> list[T]:
        batch = self._batch
        running = batch.ordered()
        slots, blocks = batch.room()
        taken: list[T] = []
        for head, wants in zip(heads, wanting, strict=False):
            needs, shared = batch.needs(head, blocks)
            if (slots < 1 or blocks < needs) and wants:
                chosen = self._choose(
                    head, running, taken, (1 - slots, needs - blocks), shared, now
                )
                for call, view in chosen:
                    taken.append(call)
                    slots += 1
                    blocks += view.blocks_released
            slots -= 1
            blocks -= needs
        return taken

    def _choose(
        self,
        head: T,
        running: Sequence[T],
        taken: list[T],
        short: tuple[int, int],
        shared: Any,
        now: float,
    ) -> list[tuple[T, RunningView]]:
        mine, limits = self._batch.standing(head), self._options
        wanted = Candidate(
            mine.key_s, mine.latest_start_s, *short, math.inf, mine.rank, mine.has_deadline
        )
        spared = mercy(wanted, limits, now)
        able = self._able(mine, running, taken, peers=not spared)
        views = [self._view(call, shared) for call in able]
        chosen, _ = choose_victims(wanted, views, limits, now)
        if any(is_peer(wanted, views[i]) for i in chosen):
            # Only now it matters when there is room without them: that asks all of the batch.
            self._endings = self._endings or self._batch.endings()
            wanted = replace(wanted, wait_s=wait_for_room(*short, self._endings))
            if mercy(wanted, limits, now):
                chosen, _ = choose_victims(wanted, views, limits, now)
        return [(able[i], views[i]) for i in chosen]

    def _view(self, call: T, shared: Any) -> RunningView:
        if shared:
            return self._batch.view(call, shared)
        found = self._views.get(call)
        if found is None:
            found = self._views[call] = self._batch.view(call, shared)
        return found

    def _able(
        self, mine: Standing, running: Sequence[T], taken: list[T], *, peers: bool
    ) -> list[T]:
        """Return the running calls with most to give, cheaply judged, with or without peers."""
        options, able = self._options, list[T]()
        least_s = mine.latest_start_s + options.displace_gap_s
        for call in reversed(running):
            state = self._batch.standing(call)
            if (state.rank, state.key_s) <= (mine.rank, mine.key_s) or len(able) >= MOST_VIEWS:
                break
            below = is_below(state.rank, state.has_deadline, mine.rank, mine.has_deadline)
            if not (below or peers):
                break  # who is below comes last in the order: there are no more
            bounded = state.has_deadline or not mine.has_deadline
            if bounded and state.displacements >= options.max_displacements:
                continue
            if not below and not (mine.has_deadline and uncredited_start_s(state) > least_s):
                continue
            if call not in taken:
                able.append(call)
        return able
