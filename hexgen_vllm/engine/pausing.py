"""Pace control in vLLM: running calls without deadline that are left out of a step.

The decision is :class:`hexgen_vllm.policy.pace.PaceControl`. A call that is left out is taken from
``running`` before vLLM's ``schedule()`` and put back after it. Its status stays, and so do its KV
blocks and its place in the batch: as long as it is away, as many calls fewer are let in. To vLLM
that is a step that had no budget for it. Speculated tokens are dropped: they were for the step
that it misses.

When the KV cache runs short, calls that are left out give way before any that runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import filterfalse
from typing import Any, Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine import compat
from hexgen_vllm.engine.compat import PauseState, Request
from hexgen_vllm.engine.request_queue import BY_KEY
from hexgen_vllm.engine.requests import CallBook
from hexgen_vllm.engine.telemetry import StepMeter
from hexgen_vllm.policy.pace import (
    EVERY_STEPS,
    MOST_WAITING,
    LooseCall,
    Pace,
    PaceControl,
    Tight,
)
from hexgen_vllm.policy.service_rates import output_left
from hexgen_vllm.types import StepCost

_LEAST_STEPS: Final = 2  # between two plans, however calls come and go
_FEW: Final = 32  # one call in so many that comes or goes makes no early plan


class Pauser:
    """Leaves calls without deadline out of steps.

    Attributes:
        control: the policy, with its count of turns given up.
        paused: calls left out of the present step.

    Args:
        scheduler: the scheduler, built.
        options: its options.
        book: prices calls.
        meter: knows the step cost.
    """

    def __init__(
        self, scheduler: Any, options: EngineOptions, book: CallBook, meter: StepMeter
    ) -> None:
        self._scheduler, self._book, self._meter = scheduler, book, meter
        self._enabled = options.pace
        self.control = PaceControl(
            options,
            scheduler.max_num_running_reqs,
            scheduler.max_num_scheduled_tokens,
            compat.captured_sizes(scheduler.vllm_config),
        )
        self.paused: list[Request] = []
        self._out: set[str] = set()
        self._most_active = self._most_tokens = 0  # of the present step; 0 is no bound of ours
        self._countdown = 0
        self._members = (0, 0)

    def rest(self) -> None:
        """Note that there are no calls of both kinds."""
        self._countdown = 0
        self._out.clear()
        self._most_active = self._most_tokens = 0

    def choose(self, now: float) -> None:
        """Take calls that are to be left out of this step from ``running``."""
        scheduler = self._scheduler
        if not self._enabled or scheduler.pause_state != PauseState.UNPAUSED:
            self.rest()
            return
        members = (len(scheduler.running), len(scheduler.waiting))
        self._countdown -= 1
        running, waiting = self._members
        moved = abs(members[0] - running) + abs(members[1] - waiting)
        early = self._countdown <= EVERY_STEPS - _LEAST_STEPS
        changed = early and moved > running // _FEW
        if self._countdown <= 0 or changed:
            self._countdown, self._members = EVERY_STEPS, members
            self._plan(now)
        if not self._out:
            return
        running = scheduler.running
        self.paused = [r for r in running if r.request_id in self._out]
        if self.paused:
            running[:] = [r for r in running if r.request_id not in self._out]
            for request in self.paused:
                request.spec_token_ids = []

    def make_room(self, blocks: int) -> list[Request]:
        """Take and return calls to preempt, so that ``blocks`` blocks are free; the last first."""
        pool = self._scheduler.kv_cache_manager.block_pool
        free, victims = pool.get_num_free_blocks(), list[Request]()
        while free < blocks and self.paused:
            victim = self.paused[-1]
            if not compat.can_free(self._scheduler, victim):
                break
            held = self._scheduler.kv_cache_manager.get_blocks(victim.request_id).blocks
            free += sum(b.ref_cnt == 1 and not b.is_null for group in held for b in group)
            self.paused.pop()
            self._out.discard(victim.request_id)
            victims.append(victim)
        return victims

    @contextmanager
    def bounds(self) -> Iterator[None]:
        """Bound what vLLM's ``schedule()`` lets in and computes; put back who was left out."""
        scheduler, slots = self._scheduler, compat.SLOTS
        most, tokens = getattr(scheduler, slots), scheduler.max_num_scheduled_tokens
        away = len(self.paused)
        if away or self._most_active:
            inside = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
            bound = min(most, self._most_active or most) - away
            setattr(scheduler, slots, max(bound, inside))
        if self._most_tokens:
            scheduler.max_num_scheduled_tokens = min(tokens, self._most_tokens)
        try:
            yield
        finally:
            setattr(scheduler, slots, most)
            scheduler.max_num_scheduled_tokens = tokens
            if self.paused:
                scheduler.running.extend(self.paused)
                self.paused = []

    def _plan(self, now: float) -> None:
        self._out.clear()
        self._most_active = self._most_tokens = 0
        scheduler, cost = self._scheduler, self._meter.fit.cost()
        if cost is None:
            return  # nothing is known of the time of a step
        running: list[Request] = scheduler.running
        waiting = [r for r in compat.first_waiting(scheduler, MOST_WAITING) if _can_start(r)]
        loose = scheduler.hexgen_loose_running()
        entering = [r for r in waiting if r.hexgen.has_deadline]
        if len(loose) == len(running) and not entering:
            return
        if not loose and len(entering) == len(waiting) and self._is_nearly_full():
            self.control.rest()
            return  # there is nobody to slow down, nor will be before the next plan
        due = running
        if loose:
            due = list(filterfalse(set(loose).__contains__, running))
        tight = _tight(due, 1.0) + _tight(entering, self._book.rates.uncached)
        best = 0
        if scheduler.hexgen_ranked:
            best = min(r.hexgen.rank for r in (*due, *entering))
        free = [r for r in loose if _may_wait(r, best)]
        free.sort(key=BY_KEY)
        plan = self._decide(tight, free, cost, now)
        self._out.update(r.request_id for r in free[plan.keep :])
        self._bound(plan, tight, len(entering) + sum(r.hexgen.promoted for r in waiting))

    def _decide(self, tight: list[Tight], free: list[Request], cost: StepCost, now: float) -> Pace:
        loose = [
            LooseCall(
                r.num_computed_tokens,
                r.num_tokens - r.num_computed_tokens if r.is_prefill_chunk else 0,
            )
            for r in free
        ]
        share = self._meter.prefill_share() or 0.0
        return self.control.plan(tight, loose, cost, share, now)

    def _bound(self, plan: Pace, tight: list[Tight], entering: int) -> None:
        scheduler = self._scheduler
        inside = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        if not plan.admit:
            self._most_active = inside + entering
        if plan.prefill_tokens is not None:
            decodes = (inside + entering) * (1 + scheduler.num_spec_tokens)
            wanted = sum(prefill for _, _, _, prefill, _ in tight)
            self._most_tokens = decodes + wanted + plan.prefill_tokens

    def _is_nearly_full(self) -> bool:
        """Return whether more than the waiting calls looked at cannot get in before a plan."""
        scheduler = self._scheduler
        inside = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        return bool(compat.max_active(scheduler) - inside <= MOST_WAITING // 2)


def _tight(requests: list[Request], uncached: float) -> list[Tight]:
    found: list[Tight] = []
    for request in requests:
        call, computed = request.hexgen, request.num_computed_tokens
        written = request.num_output_tokens + request.num_output_placeholders
        most, prefill, tail = request.max_tokens, 0, call.tail_tokens
        if request.is_prefill_chunk or not computed:
            prefill = max(int((request.num_tokens - computed) * uncached), 0)
        left, likely = call.likely_most - written, call.expected_tokens - written
        if not 0 < left <= most - written:  # the usual case without a call: this is for all calls
            left = output_left(call.likely_most, written, most)
        if not 0 < likely <= most - written:
            likely = output_left(call.expected_tokens, written, most)
        due_s = call.deadline_s - call.tail_prefill_s
        found.append((due_s, left + tail, computed, prefill, likely + tail))
    return found


def _may_wait(request: Request, best_rank: int) -> bool:
    """Return whether a loose running call may be left out for a tight one of ``best_rank``."""
    # With adapters, one that comes back could make them too many for a step.
    plain = request.lora_request is None and not request.has_encoder_inputs
    return plain and bool(request.hexgen.rank >= best_rank)


def _can_start(request: Request) -> bool:
    return not (compat.is_blocked(request) or request.has_encoder_inputs)
