"""From the scheduler's state to the plain values that the displacement policy decides on.

Looking at the batch costs time in every step, so it goes from cheap to dear and stops early: is
anyone waiting, is the head urgent, has anyone behind it slack to give, is room short at all, will
room come too late. Only then are the possible victims looked at, at most :data:`_MOST_VIEWS` of
them, and after a look in vain there is none for :data:`_QUIET_STEPS` steps unless the head or the
number of running calls has changed.
"""

from __future__ import annotations

from typing import Any, Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine import compat
from hexgen_vllm.engine.batch_order import by_key
from hexgen_vllm.engine.compat import PauseState, Request
from hexgen_vllm.engine.requests import CallBook
from hexgen_vllm.policy.preemption import (
    Candidate,
    RunningView,
    choose_victims,
    refusal,
    urgent,
    wait_for_room,
)
from hexgen_vllm.policy.service import output_left

_MOST_VIEWS: Final = 32
_QUIET_STEPS: Final = 4


class Displacer:
    """Finds the running calls to preempt for the most urgent waiting one.

    Attributes:
        reason: why the last look at the batch ended as it did.
    """

    def __init__(self, scheduler: Any, options: EngineOptions, book: CallBook) -> None:
        self._scheduler, self._options, self._book = scheduler, options, book
        self._enabled = options.displace and options.max_displacements > 0
        self._quiet: tuple[Request, int] | None = None
        self._quiet_steps = 0
        self.reason = ""

    def victims(self, now: float) -> list[Request]:
        """Return whom to preempt before this step; a look puts ``running`` in the queue's order."""
        head = self._head(now)
        if head is None or self._look_is_vain(head):
            return []
        by_key(self._scheduler.running)
        victims = self._choose(head, now)
        if victims and self._leaves_tokens(victims):
            return victims
        self._quiet, self._quiet_steps = (head, len(self._scheduler.running)), _QUIET_STEPS
        return []

    def _choose(self, head: Request, now: float) -> list[Request]:
        able = self._able(head)
        if not able:
            return []
        slots_short, blocks_short, shared = self._lacking(head)
        if slots_short <= 0 and blocks_short <= 0:
            return []
        wait_s = wait_for_room(slots_short, blocks_short, self._endings())
        call = head.hexgen
        wanted = Candidate(call.key_s, call.latest_start_s, slots_short, blocks_short, wait_s)
        self.reason = refusal(wanted, self._options, now)
        if self.reason:
            return []
        views = [self._view(r, shared) for r in able]
        chosen, self.reason = choose_victims(wanted, views, self._options, now)
        return [able[i] for i in chosen]

    def _head(self, now: float) -> Request | None:
        """Return the waiting call to make room for, if displacing for it makes sense at all."""
        scheduler = self._scheduler
        if not (self._enabled and scheduler.running):
            return None
        if scheduler.pause_state != PauseState.UNPAUSED or compat.prefills_are_held(scheduler):
            return None
        head = compat.first_waiting(scheduler)
        if head is None or not urgent(head.hexgen.latest_start_s, self._options, now):
            return None
        # Encoder budget and cache are not modelled: room in KV would not tell that it fits.
        if head.has_encoder_inputs or compat.is_blocked(head) or self._lora_is_full(head):
            return None
        return head

    def _look_is_vain(self, head: Request) -> bool:
        quiet = self._quiet
        if quiet is None or quiet[0] is not head or quiet[1] != len(self._scheduler.running):
            self._quiet = None
            return False
        self._quiet_steps -= 1
        if self._quiet_steps <= 0:
            self._quiet = None
        return True

    def _lora_is_full(self, head: Request) -> bool:
        """Return whether vLLM would skip ``head`` because its adapter is one too many."""
        config = self._scheduler.lora_config
        if config is None or head.lora_request is None:
            return False
        running = (r.lora_request for r in self._scheduler.running)
        loaded = {lora.lora_int_id for lora in running if lora is not None}
        return len(loaded) >= config.max_loras and head.lora_request.lora_int_id not in loaded

    def _able(self, head: Request) -> list[Request]:
        """Return the running calls with the most slack that may be victims, cheaply judged."""
        options, mine = self._options, head.hexgen
        least_s = mine.latest_start_s + options.displace_gap_s
        able: list[Request] = []
        for request in reversed(self._scheduler.running):
            call = request.hexgen
            if call.key_s <= mine.key_s or len(able) >= _MOST_VIEWS:
                break
            if _uncredited_start_s(request) > least_s and (
                call.displacements < options.max_displacements
            ):
                able.append(request)
        return able

    def _lacking(self, head: Request) -> tuple[int, int, set[int]]:
        """Return slots and blocks that ``head`` lacks, and the blocks that it would share.

        Hits are looked up only where they matter: not while there are blocks enough without.
        """
        scheduler = self._scheduler
        active = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        slots_short = 1 - (compat.max_active(scheduler) - active)
        manager = scheduler.kv_cache_manager
        free = manager.block_pool.get_num_free_blocks()
        needs = self._most_blocks(head) + manager.watermark_blocks
        if free >= needs + self._most_growth():
            return slots_short, 0, set()
        shared = self._shared_hits(head)
        grows = sum(self._growth(r) for r in scheduler.running)
        return slots_short, needs - len(shared) + grows - free, shared

    def _endings(self) -> list[tuple[float, int]]:
        """Return in how many seconds each running call should end, and roughly its blocks."""
        rates, size = self._book.rates, self._scheduler.block_size
        endings = []
        for request in self._scheduler.running:
            computed, tokens = request.num_computed_tokens, request.num_tokens
            expected, done = request.hexgen.expected_tokens, request.num_output_tokens
            left = output_left(expected, done, request.max_tokens)
            in_s = rates.service_s(max(tokens - computed, 0), left)
            endings.append((in_s, computed // size))
        return endings

    def _most_blocks(self, head: Request) -> int:
        """Return the blocks that ``head`` needs to be admitted without any prefix hit."""
        scheduler = self._scheduler
        whole = int(scheduler._request_remaining_blocks(head))
        if scheduler.scheduler_reserve_full_isl:
            return whole
        tokens = min(head.num_tokens, scheduler.max_num_scheduled_tokens)
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        return min(whole, groups * -(-tokens // scheduler.block_size))

    def _most_growth(self) -> int:
        """Return the blocks that the batch takes in this step at most."""
        scheduler = self._scheduler
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        chunks = [r for r in scheduler.running if r.is_prefill_chunk]
        return groups * len(scheduler.running) + sum(self._growth(r) for r in chunks)

    def _growth(self, request: Request) -> int:
        """Return the blocks that ``request`` takes in this step."""
        scheduler = self._scheduler
        if request.is_prefill_chunk:
            return int(scheduler._request_remaining_blocks(request))
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        spare = -request.num_computed_tokens % scheduler.block_size
        return groups * (spare <= scheduler.num_spec_tokens)

    def _shared_hits(self, head: Request) -> set[int]:
        """Return the ids of the blocks that ``head`` would share with running calls."""
        manager = self._scheduler.kv_cache_manager
        reports = getattr(head, "kv_cache_report_mode", "incremental") == "full"
        if not manager.enable_caching or head.skip_reading_prefix_cache or reports:
            return set()  # a lookup in report mode would publish events
        groups = manager.get_computed_blocks(head)[0].blocks
        return {b.block_id for group in groups for b in group if b.ref_cnt > 0 and not b.is_null}

    def _view(self, request: Request, shared: set[int]) -> RunningView:
        """Return ``request`` as a victim; what the head would take over is not released."""
        groups = self._scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        held = [b for group in groups for b in group if not b.is_null]
        own = [b.block_id for b in held if b.ref_cnt == 1]
        lost = request.num_computed_tokens * len(own) // max(len(held), 1)
        call = request.hexgen
        written = request.num_output_tokens + request.num_output_placeholders
        return RunningView(
            key_s=call.key_s,
            latest_start_s=_uncredited_start_s(request),
            redo_s=self._redo_s(request.num_computed_tokens, lost),
            lost_tokens=lost,
            blocks_released=sum(1 for block in own if block not in shared),
            output_left=output_left(call.expected_tokens, written, request.max_tokens),
            displacements=call.displacements,
            can_free=compat.can_free(self._scheduler, request),
        )

    def _redo_s(self, tokens: int, lost: int) -> float:
        """Return what losing ``lost`` of ``tokens`` tokens costs, computed again or copied."""
        keeper, rates = self._scheduler.hexgen_keeper, self._book.rates
        if keeper is None:
            return rates.prefill_s(lost)
        return keeper.redo_s(tokens, tokens - lost, rates)

    def _leaves_tokens(self, victims: list[Request]) -> bool:
        """Return whether the step's token budget reaches beyond what stays in the batch."""
        scheduler = self._scheduler
        gone = {id(v) for v in victims}
        stay = [r for r in scheduler.running if id(r) not in gone]
        decodes = sum(1 + len(r.spec_token_ids) for r in stay if not r.is_prefill_chunk)
        prefill = sum(r.num_tokens - r.num_computed_tokens for r in stay if r.is_prefill_chunk)
        return bool(decodes + prefill < scheduler.max_num_scheduled_tokens)


def _uncredited_start_s(request: Request) -> float:
    """Return L without credit for progress, or equal deadlines would displace each other."""
    call = request.hexgen
    return min(call.latest_start_s, call.queued_start_s)
