"""Whether running calls make room for an urgent waiting one, and which.

A stock batch never lets go: an urgent call that finds no slot or no KV block waits until
something ends. Displacement preempts the running calls that can best afford it. It costs the work
that a victim has to do again, so it is bounded on every side.

A running call v is *below* the candidate c if its rank (vLLM's priority, lower is sooner) is
worse, or if it has the same rank and no deadline while c has one. It is a *peer* if it has the
same rank and both have deadlines. A call of a better rank is never displaced, nor is a call
without deadline by another one of its rank.

Formula. With L the latest start (:mod:`hexgen_vllm.policy.urgency`) and ``redo_s`` the seconds that
v needs to compute again what it would lose:

    gain(v) = L_v - redo_s(v) - L_c

Victims below the candidate are taken first, cheapest ``redo_s`` first, and at once: nothing is
asked of them but that they can give way. Peers are spared while the candidate has slack to wait
(``L_c - now >= displace_slack_s``), when it is too late for them to pay
(``L_c - now < -displace_late_s``), and while ``L_c - now >= wait_s``, the time after which calls
that end by themselves are predicted to have made room; a prediction that proves too hopeful ends
with the slack. A peer qualifies if ``gain > displace_gap_s`` (strict, after its own loss) and it
stands behind the candidate in the queue's order; peers are taken by ``gain / (1 + tokens lost)``,
largest first. Of all victims more than ``protect_last_tokens`` of output are left, and their blocks
can be freed now. Victims are added until the candidate fits; those that turn out not to be needed
are spared. If all of them together do not make enough room, nobody is displaced.

Ping-pong cannot happen: a peer that comes back still has more slack than its candidate had, by
more than the gap, so it does not qualify to displace it; and "below" has no circles.

Inputs are plain values; :class:`RunningView` names their units. ``latest_start_s`` of a running
call should not be credited with its progress, or calls with equal deadlines displace each other
in turn (least-laxity thrash): use the smaller of its value now and when it was admitted.

Cost: O(n log n) in the running calls given.

What it can starve: a call loses its place at most ``max_displacements`` times; after that it
runs to its end unless the KV cache overflows. That bound does not hold for a call without
deadline, or one that cannot meet it any more, that gives way to one that can be on time: such
calls advance in what the others leave, and ``interactive_share`` bounds how little that is. Do not
use displacement where recomputing is dearer than being late (``displace=False``), nor to shield
one client from another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hexgen_vllm.config import EngineOptions


@dataclass(frozen=True, slots=True)
class Candidate:
    """The most urgent waiting call and what it lacks.

    Attributes:
        key_s: its place in the queue's order; smaller is sooner.
        latest_start_s: L, absolute seconds.
        slots_short: batch slots that must become free, 0 or less when there are enough.
        blocks_short: KV blocks that must become free, 0 or less when there are enough.
        wait_s: predicted seconds until there is room without displacing (:func:`wait_for_room`).
        rank: vLLM's priority, lower is sooner.
        has_deadline: it can be late.
    """

    key_s: float
    latest_start_s: float
    slots_short: int
    blocks_short: int
    wait_s: float = math.inf
    rank: int = 0
    has_deadline: bool = True


@dataclass(frozen=True, slots=True)
class RunningView:
    """A running call as a possible victim.

    Attributes:
        key_s: its place in the queue's order; smaller is sooner.
        latest_start_s: L, absolute seconds, not credited with progress.
        redo_s: seconds to compute again what it would lose.
        lost_tokens: tokens of KV that nobody shares with it.
        blocks_released: KV blocks that become free with it.
        output_left: output tokens it still expects to write.
        displacements: times it was displaced so far.
        can_free: its blocks become free at once.
        rank: vLLM's priority, lower is sooner.
        has_deadline: it can be late.
    """

    key_s: float
    latest_start_s: float
    redo_s: float
    lost_tokens: int
    blocks_released: int
    output_left: int
    displacements: int
    can_free: bool = True
    rank: int = 0
    has_deadline: bool = True


class Displacement(NamedTuple):
    """The decision: indices into the running calls given, and why."""

    victims: tuple[int, ...]
    reason: str


def urgent(latest_start_s: float, limits: EngineOptions, now: float) -> bool:
    """Return whether a waiting call with a deadline is urgent enough to displace its peers."""
    return latest_start_s - now < limits.displace_slack_s


def is_below(rank: int, has_deadline: bool, of_rank: int, of_has_deadline: bool) -> bool:
    """Return whether a running call counts less than a waiting one of ``of_rank``, whatever
    their slack."""
    return rank > of_rank or (rank == of_rank and of_has_deadline and not has_deadline)


def mercy(candidate: Candidate, limits: EngineOptions, now: float) -> str:
    """Return why peers are spared, ``not-urgent`` or ``room-soon``; "" if they are not."""
    slack_s = candidate.latest_start_s - now
    if not candidate.has_deadline or slack_s < -limits.displace_late_s:
        return "not-urgent"
    if not urgent(candidate.latest_start_s, limits, now):
        return "not-urgent"
    return "room-soon" if slack_s >= candidate.wait_s else ""


def wait_for_room(
    slots_short: int, blocks_short: int, endings: Iterable[tuple[float, int]]
) -> float:
    """Return the seconds until running calls that end by themselves have made enough room.

    Args:
        slots_short: batch slots that must become free.
        blocks_short: KV blocks that must become free.
        endings: for each running call, the seconds it has left and the blocks it then releases.
    """
    if slots_short <= 1 and blocks_short <= 0:
        return min(endings, default=(math.inf, 0))[0]
    for in_s, blocks in sorted(endings):
        slots_short -= 1
        blocks_short -= blocks
        if slots_short <= 0 and blocks_short <= 0:
            return in_s
    return math.inf


def gain_s(candidate: Candidate, view: RunningView) -> float:
    """Return the slack that the victim would have more than the candidate, after its loss."""
    return view.latest_start_s - view.redo_s - candidate.latest_start_s


def eligible(candidate: Candidate, view: RunningView, limits: EngineOptions) -> bool:
    """Return whether ``view`` may be displaced for ``candidate``, unless peers are spared."""
    if not view.can_free or view.output_left <= limits.protect_last_tokens:
        return False
    if _below(candidate, view):
        bounded = view.has_deadline or not candidate.has_deadline
        return not bounded or view.displacements < limits.max_displacements
    return (
        is_peer(candidate, view)
        and view.key_s > candidate.key_s
        and view.displacements < limits.max_displacements
        and gain_s(candidate, view) > limits.displace_gap_s
    )


def _below(candidate: Candidate, view: RunningView) -> bool:
    return is_below(view.rank, view.has_deadline, candidate.rank, candidate.has_deadline)


def is_peer(candidate: Candidate, view: RunningView) -> bool:
    """Return whether slack decides between them: they are of one rank, and both can be late."""
    return view.rank == candidate.rank and view.has_deadline and candidate.has_deadline


def refusal(candidate: Candidate, limits: EngineOptions) -> str:
    """Return why nobody is to be displaced for ``candidate``, whoever is running; "" if nothing.

    It is ``off`` or ``fits``.
    """
    if not limits.displace:
        return "off"
    if candidate.slots_short <= 0 and candidate.blocks_short <= 0:
        return "fits"
    return ""


def choose_victims(
    candidate: Candidate, running: Sequence[RunningView], limits: EngineOptions, now: float
) -> Displacement:
    """Return the running calls to displace for ``candidate``, best first, or none and why.

    The reason is ``displaced``, or why not: a :func:`refusal`, why peers are spared
    (:func:`mercy`), ``no-victim`` (nobody qualifies) or ``would-not-fit`` (all who qualify are too
    few).
    """
    if reason := refusal(candidate, limits):
        return Displacement((), reason)
    spared = mercy(candidate, limits, now)
    able = [
        i
        for i, view in enumerate(running)
        if eligible(candidate, view, limits) and not (spared and is_peer(candidate, view))
    ]
    if not able:
        return Displacement((), spared or "no-victim")
    able.sort(key=lambda i: _order(candidate, running[i], i))
    taken = _enough(candidate, running, able)
    if not taken:
        return Displacement((), "would-not-fit")
    return Displacement(_spared(candidate, running, taken), "displaced")


def _order(candidate: Candidate, view: RunningView, index: int) -> tuple[int, float, int]:
    if _below(candidate, view):
        return (0, view.redo_s, index)
    return (1, -gain_s(candidate, view) / (1 + view.lost_tokens), index)


def _fits(candidate: Candidate, running: Sequence[RunningView], victims: Sequence[int]) -> bool:
    blocks = sum(running[i].blocks_released for i in victims)
    return len(victims) >= candidate.slots_short and blocks >= candidate.blocks_short


def _enough(candidate: Candidate, running: Sequence[RunningView], able: Sequence[int]) -> list[int]:
    """Return the shortest head of ``able`` that makes enough room, or nothing."""
    slots, blocks = candidate.slots_short, candidate.blocks_short
    for count, i in enumerate(able, 1):
        slots -= 1
        blocks -= running[i].blocks_released
        if slots <= 0 and blocks <= 0:
            return list(able[:count])
    return []


def _spared(
    candidate: Candidate, running: Sequence[RunningView], taken: list[int]
) -> tuple[int, ...]:
    """Drop victims that the others make unnecessary, worst first."""
    kept = list(taken)
    for i in reversed(taken):
        rest = [j for j in kept if j != i]
        if rest and _fits(candidate, running, rest):
            kept = rest
    return tuple(kept)
