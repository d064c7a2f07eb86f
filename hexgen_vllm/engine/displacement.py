"""From the scheduler's state to the plain values that the displacement policy decides on.

The search itself is :class:`hexgen_vllm.policy.victims.VictimSearch`, which asks this for what it
needs, from cheap to dear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine import compat
from hexgen_vllm.engine.compat import PauseState, Request
from hexgen_vllm.engine.request_queue import BY_KEY, by_key, growth
from hexgen_vllm.engine.requests import CallBook, CallState
from hexgen_vllm.policy.preemption import RunningView
from hexgen_vllm.policy.urgency import LATE_S
from hexgen_vllm.policy.victims import VictimSearch, ending, running_view

_LOOKED_AT: Final = 16  # waiting calls per step, when the most urgent one is looked for


class Displacer:
    """Finds the running calls to preempt for urgent waiting ones."""

    def __init__(self, scheduler: Any, options: EngineOptions, book: CallBook) -> None:
        self._scheduler, self._book = scheduler, book
        self._search: VictimSearch[Request] = VictimSearch(self, options)
        self._step = 0
        self._last = (0, -math.inf)  # no running call comes after this place in the order
        self._slack_s, self._look_from = options.displace_slack_s, 0

    def victims(self, now: float) -> list[Request]:
        """Return whom to preempt before this step; a look puts ``running`` in the queue's order."""
        self._step += 1
        if self._is_in_order() or self._is_calm(now):
            return []  # the usual case, and the cheap one: the batch is not looked at
        return self._search.victims(now, self._step)

    def placed(self, request: Request) -> None:
        """Note that ``request`` runs at its present key: it is new in the batch, or re-keyed."""
        self._last = max(self._last, BY_KEY(request))

    def _is_in_order(self) -> bool:
        """Return whether all that wait certainly come after all that run."""
        scheduler = self._scheduler
        if getattr(scheduler, compat.SECOND_QUEUE):
            return False
        first = scheduler.waiting.first(1)
        return not first or BY_KEY(first[0]) >= self._last

    def _is_calm(self, now: float) -> bool:
        """Return whether certainly nobody gives way at once, and nobody who waits is urgent."""
        waiting = self._scheduler.waiting
        if getattr(self._scheduler, compat.SECOND_QUEUE) or not self._runs_due():
            return False
        if waiting.soonest_s - now < self._slack_s and self._step >= self._look_from:
            # Often it left the queue long ago. How often to look must not grow with the queue.
            waiting.look_for_soonest()
            self._look_from = self._step + 1 + len(waiting) // _LOOKED_AT
        return bool(waiting.soonest_s - now >= self._slack_s)

    def _runs_due(self) -> bool:
        """Return whether certainly no call runs that has a rank, or no deadline to meet."""
        return not self._scheduler.hexgen_ranked and self._last < (0, LATE_S)

    # What the search asks.

    def heads(self, most: int) -> list[Request]:
        """Return waiting calls that could start if there were room, in the queue's order."""
        scheduler = self._scheduler
        if scheduler.pause_state != PauseState.UNPAUSED or compat.prefills_are_held(scheduler):
            return []
        if compat.frees_are_pending(scheduler):
            return []  # room is coming
        found = []
        for request in compat.first_waiting(scheduler, most):
            if request.has_encoder_inputs:
                break  # encoder budget and cache are not modelled: room would not tell that it fits
            if not (compat.is_blocked(request) or self._lora_is_full(request)):
                found.append(request)
        return found

    def standing(self, call: Request) -> CallState:
        """Return the state of a call."""
        state: CallState = call.hexgen
        return state

    def worst(self) -> tuple[int, bool]:
        """Return the largest rank in the batch, and whether all of it has deadlines."""
        scheduler, rank = self._scheduler, 0
        if self._runs_due():
            return 0, True
        if scheduler.hexgen_ranked:
            rank = max([r.hexgen.rank for r in scheduler.running], default=0)
        loose = scheduler.hexgen_loose_running()
        return rank, all(r.hexgen.promoted for r in loose)

    def size(self) -> int:
        """Return the number of running calls."""
        return len(self._scheduler.running)

    def ordered(self) -> list[Request]:
        """Put the batch into the queue's order and return it."""
        by_key(self._scheduler.running)
        running: list[Request] = self._scheduler.running
        self._last = BY_KEY(running[-1])
        return running

    def room(self) -> tuple[int, int]:
        """Return the slots and blocks that are free after what the batch takes in this step."""
        scheduler, manager = self._scheduler, self._scheduler.kv_cache_manager
        active = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        grows = growth(scheduler)
        free = manager.block_pool.get_num_free_blocks() - manager.watermark_blocks - grows
        return compat.max_active(scheduler) - active, free

    def needs(self, head: Request, free: int) -> tuple[int, set[int]]:
        """Return the blocks that ``head`` takes, and those that it would share."""
        most = self._most_blocks(head)
        if most <= free:
            return most, set()
        shared = self._shared_hits(head)
        return most - len(shared), shared

    def endings(self) -> list[tuple[float, int]]:
        """Return in how many seconds each running call should end, and roughly its blocks."""
        rates, size = self._book.rates, self._scheduler.block_size
        endings = []
        for request in self._scheduler.running:
            computed, done = request.num_computed_tokens, request.num_output_tokens
            ahead = max(request.num_tokens - computed, 0)
            in_s = ending(request.hexgen, rates, ahead, done, request.max_tokens)
            endings.append((in_s, computed // size))
        return endings

    def _lora_is_full(self, head: Request) -> bool:
        """Return whether vLLM would skip ``head`` because its adapter is one too many."""
        config = self._scheduler.lora_config
        if config is None or head.lora_request is None:
            return False
        running = (r.lora_request for r in self._scheduler.running)
        loaded = {lora.lora_int_id for lora in running if lora is not None}
        return len(loaded) >= config.max_loras and head.lora_request.lora_int_id not in loaded

    def _most_blocks(self, head: Request) -> int:
        """Return the blocks that ``head`` needs to be admitted without any prefix hit."""
        scheduler = self._scheduler
        whole = int(scheduler._request_remaining_blocks(head))
        if scheduler.scheduler_reserve_full_isl:
            return whole
        tokens = min(head.num_tokens, scheduler.max_num_scheduled_tokens)
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        return min(whole, groups * -(-tokens // scheduler.block_size))

    def _shared_hits(self, head: Request) -> set[int]:
        """Return the ids of the blocks that ``head`` would share with running calls."""
        manager = self._scheduler.kv_cache_manager
        reports = getattr(head, "kv_cache_report_mode", "incremental") == "full"
        if not manager.enable_caching or head.skip_reading_prefix_cache or reports:
            return set()  # a lookup in report mode would publish events
        groups = manager.get_computed_blocks(head)[0].blocks
        return {b.block_id for group in groups for b in group if b.ref_cnt > 0 and not b.is_null}

    def view(self, call: Request, shared: set[int]) -> RunningView:
        """Return ``call`` as a victim; what the head would take over is not released."""
        groups = self._scheduler.kv_cache_manager.get_blocks(call.request_id).blocks
        held = [b for group in groups for b in group if not b.is_null]
        own = [b.block_id for b in held if b.ref_cnt == 1]
        lost = call.num_computed_tokens * len(own) // max(len(held), 1)
        written = call.num_output_tokens + call.num_output_placeholders
        return running_view(
            call.hexgen,
            written,
            call.max_tokens,
            redo_s=self._redo_s(call.num_computed_tokens, lost),
            lost_tokens=lost,
            blocks_released=sum(1 for block in own if block not in shared),
            can_free=compat.can_free(self._scheduler, call),
        )

    def _redo_s(self, tokens: int, lost: int) -> float:
        """Return what losing ``lost`` of ``tokens`` tokens costs, computed again or copied."""
        keeper, rates = self._scheduler.hexgen_keeper, self._book.rates
        if keeper is None:
            return rates.prefill_s(lost)
        return keeper.redo_s(tokens, tokens - lost, rates)

    def leaves_tokens(self, victims: Sequence[Request]) -> bool:
        """Return whether the step's token budget reaches beyond what stays in the batch."""
        scheduler = self._scheduler
        gone = {id(v) for v in victims}
        stay = [r for r in scheduler.running if id(r) not in gone]
        decodes = sum(1 + len(r.spec_token_ids) for r in stay if not r.is_prefill_chunk)
        prefill = sum(r.num_tokens - r.num_computed_tokens for r in stay if r.is_prefill_chunk)
        return bool(decodes + prefill < scheduler.max_num_scheduled_tokens)
