"""vLLM's scheduler with the order of calls by urgency, and room made for the most urgent one.

vLLM's ``schedule()`` is called, never copied. Before it, the queue and the batch are put in order
and victims are preempted; what comes out is the same kind of step with other calls in it, so that
greedy tokens are those of stock vLLM. Inside vLLM the policy is always ``fcfs``: then the last of
``running`` is its victim when the KV cache is full. The client's ``priority`` comes first in our
order, with vLLM's meaning: lower is sooner.

The order of the batch is that of :mod:`hexgen_vllm.engine.request_queue`.

Keys change on new information only. A running call is re-keyed about every 64 steps, a few calls
in each step; when the fitted step cost has moved, so are the waiting ones, a dozen or so in a step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.engine import compat
from hexgen_vllm.engine.compat import Request, RequestStatus
from hexgen_vllm.engine.displacement import Displacer
from hexgen_vllm.engine.learned_file import LearnedFile
from hexgen_vllm.engine.options import options_of, summary
from hexgen_vllm.engine.pausing import Pauser
from hexgen_vllm.engine.request_queue import (
    UrgencyQueue,
    arrange,
    growth,
    may_run_short,
)
from hexgen_vllm.engine.requests import CallBook
from hexgen_vllm.engine.server import stats_api
from hexgen_vllm.engine.stats_server import StatsServer
from hexgen_vllm.engine.swap.planner import EndedCall, SwapPlanner
from hexgen_vllm.engine.swap.setup import planner_of
from hexgen_vllm.engine.telemetry import Counters, StepMeter, snapshot
from hexgen_vllm.policy.order import LateWatch, demotes
from hexgen_vllm.policy.pace import EVERY_STEPS, Places, reachable_token_s
from hexgen_vllm.policy.returns import CallKind, WorkflowKv
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.types import NO_DEADLINE

logger = logging.getLogger("vllm.hexgen")
_REKEY_EVERY_STEPS: Final = 64
_REKEY_WAITING: Final = 16
_REFIT_EVERY_STEPS: Final = 32
_RATES_MOVED: Final = 0.1
_EXPIRE_EVERY_STEPS: Final = 1024
_ENDED: Final = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class UrgencyScheduler(compat.TwoQueues, compat.LikeStock):
    """Orders calls by how soon they must start for their workflow to be on time.

    Use it as ``--scheduler-cls hexgen_vllm.UrgencyScheduler`` with options in ``--additional-config
    '{"hexgen": {…}}'`` (:class:`hexgen_vllm.config.EngineOptions`). Where ``$VLLM_PLUGINS`` leaves
    ours out, ``--middleware`` with ``hexgen_vllm.engine.server.middleware.HexgenMiddleware`` adds
    headers, ``/hexgen/stats`` and metrics.

    Raises:
        UnsupportedVLLM: this vLLM cannot be driven.
        ConfigError: an option is wrong, or the model is one that vLLM schedules by other rules.
    """

    hexgen_clock: Callable[[], float] = staticmethod(time.monotonic)
    """The seconds that every decision is made by; a test may put its own in place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_seams()
        super().__init__(*args, **kwargs)
        compat.check_instance(self)
        self.policy = compat.FCFS  # whatever was asked for: `running` is in our order
        doubt = compat.doubt(compat.found_version())
        if doubt is not None:
            logger.warning("%s", doubt)
        stats_api.offer_utility()  # here too: vLLM's plugins may be switched off
        self.waiting = UrgencyQueue()
        setattr(self, compat.SECOND_QUEUE, UrgencyQueue())
        self.hexgen_options = options_of(self.vllm_config)
        self.hexgen_book = CallBook(self.hexgen_options)
        self.hexgen_meter = StepMeter()
        self.hexgen_counters = Counters()
        self.hexgen_keeper = planner_of(self.connector, self.hexgen_options)
        self._leaver = self.hexgen_keeper if self.hexgen_options.keep_ended_kv else None
        self._workflow_kv: WorkflowKv | None = None
        if self.hexgen_options.evict_finished_first and self.kv_cache_manager.enable_caching:
            self._workflow_kv = WorkflowKv(self.kv_cache_config.num_blocks)
        self._learned_file = self._open_learned_file()
        self._stats_server = self._open_stats_port()
        self._displacer = Displacer(self, self.hexgen_options, self.hexgen_book)
        self._pauser = Pauser(self, self.hexgen_options, self.hexgen_book, self.hexgen_meter)
        self._ordered: set[str] = set()  # calls with anything but their arrival to go by
        self._ranked: set[str] = set()  # of them, those with a priority
        self._due: set[str] = set()  # of them, those with a deadline that can be met
        self._late: LateWatch[str] | None = LateWatch() if demotes(self.hexgen_options) else None
        self._loose: list[tuple[int, str]] = []  # waiting calls without deadline: a heap
        self._places = Places(self.hexgen_options, self.max_num_running_reqs)
        self._steps_to_promote = 0
        self._preemption_cause = "kv"
        self._background: deque[tuple[float, str]] = deque()  # (ages at, id), oldest first
        self._to_rekey: list[Request] = []
        self._next_running = 0
        logger.info("%s", summary(self.hexgen_options))

    def hexgen_stats(self) -> dict[str, Any]:
        """Return the engine's telemetry (:func:`hexgen_vllm.engine.telemetry.snapshot`)."""
        return snapshot(self, self.hexgen_clock())

    @property
    def hexgen_given_up(self) -> int:
        """Tokens that calls without deadline did not write because others could not bear it."""
        return self._pauser.control.given_up

    @property
    def hexgen_ranked(self) -> bool:
        """Whether any call has a priority of its own; the background is one."""
        return bool(self._ranked)

    def hexgen_loose_running(self) -> list[Request]:
        """Return running calls without a deadline that can be met, in the order of the batch."""
        due, running = self._due, self.running
        if len(due) == len(self.requests):
            return []
        return [r for r in running if r.request_id not in due]

    def _open_stats_port(self) -> StatsServer | None:
        port = self.hexgen_options.stats_port
        if not port:
            return None
        parallel = self.vllm_config.parallel_config
        rank, here = parallel.data_parallel_index, parallel.data_parallel_rank_local
        # An engine with a server of its own is one to whoever asks, whatever others there are.
        alone = parallel.local_engines_only
        size = parallel.data_parallel_size_local if alone else parallel.data_parallel_size
        at = port + (rank if here is None else here)
        host = self.hexgen_options.stats_host
        server = StatsServer(self.hexgen_stats, at, rank, size=size, host=host)
        logger.info("Telemetry of this engine process is at %s, port %d.", host, server.port)
        return server

    def _open_learned_file(self) -> LearnedFile | None:
        name = self.hexgen_options.learned_file
        if name is None:
            return None
        rank = self.vllm_config.parallel_config.data_parallel_index
        path = Path(f"{name}.{rank}" if rank else name)
        return LearnedFile(path, self.hexgen_book.outlooks)

    def shutdown(self) -> None:
        """Close what this process has opened; see vLLM."""
        if self._stats_server is not None:
            self._stats_server.close()
        if self._learned_file is not None:
            self._learned_file.close()
        super().shutdown()

    # Calls come, change and go.

    def add_request(self, request: Request) -> None:
        """Queue a new call, or hand an open session its next input."""
        if request.request_id not in self.requests:
            self._open(request)
            if self._leaver is not None:
                self._leaver.came(request, self.hexgen_clock())
        super().add_request(request)

    def _open(self, request: Request) -> None:
        self.hexgen_book.open(request, self.hexgen_clock())
        call, name = request.hexgen, request.request_id
        if self._workflow_kv is not None:  # who waits for it uses it, too
            self._workflow_kv.used(request.block_hashes, _user(request))
        self._forget(name)
        if call.has_deadline:
            self._due.add(name)
        if call.rank:
            self._ranked.add(name)
        if call.has_deadline or call.rank:
            self._ordered.add(name)
        self._watch(request)
        if call.background:
            ages_at = call.arrived_s + self.hexgen_options.background_max_wait_s
            self._background.append((ages_at, request.request_id))

    def _forget(self, name: str) -> None:
        self._ordered.discard(name)
        self._ranked.discard(name)
        self._due.discard(name)
        if self._late is not None:
            self._late.forget(name)

    def _watch(self, request: Request) -> None:
        """Note a call that waits, for when it is late or has waited long."""
        call = request.hexgen
        if not call.has_deadline:
            if not call.background:
                heappush(self._loose, (call.turn, request.request_id))
        elif self._late is not None:
            self._late.add(request.request_id, self.hexgen_book.late_from_s(request))

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        self._forget_kv(session)  # its tokens change
        # A turn that ended within accepted drafts has KV beyond its end: not that of the next one.
        session.num_computed_tokens = min(session.num_computed_tokens, session.num_tokens)
        super()._update_request_as_session(session, update)
        self._open(session)  # new parameters, new arrival: a new deadline
        self._requeue(session)

    def _requeue(self, request: Request) -> None:
        self.waiting.rekey(request)
        getattr(self, compat.SECOND_QUEUE).rekey(request)

    def _connector_finished(self, request: Request) -> Any:
        self._forget(request.request_id)
        self._leave_kv(request)
        self.hexgen_book.closed(request, self.hexgen_clock(), answered=request.status in _ENDED)
        return super()._connector_finished(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        kv = self._workflow_kv
        if kv is None:
            return
        call = request.hexgen
        size = self.kv_cache_manager.block_pool.hash_block_size
        kv.used(request.block_hashes[request.num_prompt_tokens // size :], _user(request))
        if call.plans.follows is False and request.status in _ENDED:
            self.hexgen_counters.let_go_blocks += compat.evict_first(
                self, kv.over(call.workflow_id)
            )

    # Preemption, ours and vLLM's.

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        self.hexgen_counters.preemptions[self._preemption_cause] += 1
        request.hexgen.lost_tokens = request.num_computed_tokens
        request.hexgen.kept_tokens = self._keep_kv(request)
        self.hexgen_book.price(request, computed=0)  # before vLLM queues it by its key
        self._watch(request)
        super()._preempt_request(request, timestamp, drop_stale_output=drop_stale_output)

    def _keep_kv(self, request: Request) -> int:
        """Have the KV of a call copied to host memory if that pays; return its tokens."""
        if self.hexgen_keeper is None or self._preemption_cause == "reset":
            return 0
        blocks = self.kv_cache_manager.get_blocks(request.request_id).blocks[0]
        rates = self.hexgen_book.rates
        now = self.hexgen_clock()
        return self.hexgen_keeper.preempting(request, request.hexgen, blocks, rates, now)

    def _leave_kv(self, request: Request) -> None:
        """Have the KV of a call that has ended copied if its workflow may want it again."""
        if self._leaver is None or request.status not in _ENDED:
            return
        call = request.hexgen
        known = call.known_as
        if known is None:
            return
        lone = call.workflow_id == request.request_id
        kind = CallKind(known.workflow_type, known.stage, lone)
        # The deadline of a lone call is over with it: it says nothing of one that may follow.
        latest_start_s = NO_DEADLINE if lone else call.deadline_s - call.tail_s
        usage = self.kv_cache_manager.usage
        ended = EndedCall(kind, call.plans, call.workflow_id, latest_start_s, usage)
        blocks = self.kv_cache_manager.get_blocks(request.request_id).blocks[0]
        now = self.hexgen_clock()
        self._leaver.ended(request, ended, blocks, self.hexgen_book.rates, now)

    def _forget_kv(self, request: Request) -> None:
        if self.hexgen_keeper is not None:
            self.hexgen_keeper.forget(request.request_id, "changed")

    @contextmanager
    def _preempting(self, cause: str) -> Iterator[None]:
        self._preemption_cause = cause
        try:
            yield
        finally:
            self._preemption_cause = "kv"

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the prefix cache; see vLLM. Copies in host memory go too: weights may be new."""
        if self.hexgen_keeper is not None:
            self.hexgen_keeper.forget_all("reset")
            if reset_running_requests:
                self._take_back_loads(self.hexgen_keeper)
        with self._preempting("reset"):
            return bool(
                super().reset_prefix_cache(
                    reset_running_requests=reset_running_requests, reset_connector=reset_connector
                )
            )

    def _take_back_loads(self, keeper: SwapPlanner) -> None:
        """Have calls that hold blocks while they wait reset like running ones, with their blocks.

        vLLM looks at running calls only: the others' blocks would keep the cache from being
        emptied, and what is loaded there is from before the reset.
        """
        for request_id in keeper.abandon_loads():
            request = self.requests.get(request_id)
            if request is not None and request.is_finished():
                self._free_blocks(request)  # it was kept for its load alone
        for queue in (self.waiting, getattr(self, compat.SECOND_QUEUE)):
            for request in [r for r in queue if compat.is_loaded(r)]:
                queue.remove_request(request)
                compat.forget_load(self, request)
                if compat.is_resumed(request):
                    request.status = RequestStatus.RUNNING
                    self.running.append(request)
                else:
                    self._begin_again(request)

    def _begin_again(self, request: Request) -> None:
        """Have a call that was to be sent to the workers as a new one wait without blocks.

        Preempted, it would be sent as one that the workers know: they know nothing of a call that
        has found the KV of others, and of a session not its next input.
        """
        self._free_request_blocks(request)
        self._inflight_prefills.discard(request)
        request.num_computed_tokens = request.num_preemptions = 0
        request.status = RequestStatus.WAITING
        self.hexgen_book.price(request)
        self.waiting.add_request(request)

    def _displace(self, now: float) -> list[Request]:
        """Preempt running calls for urgent waiting ones; return them, out of the queue."""
        victims = self._displacer.victims(now)
        for victim in victims:
            self.running.remove(victim)
            victim.hexgen.displacements += 1
        return self._take_out(victims, now, "displaced")

    def _take_out(self, victims: list[Request], now: float, cause: str) -> list[Request]:
        """Preempt calls that are out of ``running``, and return them, out of the queue.

        They stay out for this step: resumed in it, they would take back what they gave, and the
        worker would miss their tokens.
        """
        if victims:
            with self._preempting(cause):
                for victim in victims:
                    self._preempt_request(victim, now, drop_stale_output=self.requires_kv_delivery)
                    self.waiting.remove_request(victim)
        return victims

    def _demote_late(self, now: float) -> None:
        """Put waiting calls that cannot be on time any more behind those that can."""
        for name in self._late.late(now) if self._late is not None else ():
            request = self.requests.get(name)
            if request is None or not request.hexgen.has_deadline or not self._waits(request):
                continue
            from_s = self.hexgen_book.late_from_s(request)
            if now <= from_s and self._late is not None:
                self._late.add(name, from_s)  # the engine has become faster since
                continue
            request.hexgen.late = True
            self._due.discard(name)
            self.hexgen_book.price(request)
            self._requeue(request)
            self._watch(request)

    def _waits(self, request: Request) -> bool:
        return request in self.waiting or request in getattr(self, compat.SECOND_QUEUE)

    def _promote(self) -> None:
        """Let the loose call that waits longest go first while too few of them run."""
        self._steps_to_promote -= 1
        if self._steps_to_promote > 0 or not (self._loose and self._places.some and self.waiting):
            return  # to look at the whole batch in every step would cost what it brings
        self._steps_to_promote = EVERY_STEPS
        if not self.waiting.first(1)[0].hexgen.has_deadline:
            return  # a loose one is next as it is
        while self._loose:
            request = self.requests.get(self._loose[0][1])
            if request is not None and request in self.waiting and not request.hexgen.has_deadline:
                break
            heappop(self._loose)
        else:
            return
        call, running = request.hexgen, len(self.hexgen_loose_running())
        if not call.promoted and self._places.owes(running, call.expected_tokens, EVERY_STEPS):
            call.promoted = True
            self.hexgen_book.price(request)
            self._requeue(request)

    # The step.

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Put queue and batch in order, make room, then let vLLM schedule the step."""
        now, busy = self.hexgen_clock(), bool(self.running)
        if self._ordered:
            output = self._schedule_in_order(throttle_prefills, now)
        else:  # first come, first served, as vLLM does it
            output = super().schedule(throttle_prefills)
        self.hexgen_meter.started(output, now, busy)
        self._note_admitted(output)
        return output

    def _schedule_in_order(self, throttle_prefills: bool, now: float) -> Any:
        self._end_background(now)
        held: list[Request] = []
        if not throttle_prefills:
            # Under data parallelism a throttled step admits nobody: making room would be in vain.
            self._demote_late(now)
            if self._due:
                self._promote()
            held = self._displace(now)
        if self._due and len(self._due) < len(self.requests):
            self._pauser.choose(now)
            if self._pauser.paused and may_run_short(self):
                held += self._take_out(self._pauser.make_room(growth(self)), now, "kv")
        else:
            self._pauser.rest()
        arrange(self)
        try:
            with self._pauser.bounds():
                return super().schedule(throttle_prefills)
        finally:
            for request in held:
                self.waiting.add_request(request)

    def _end_background(self, now: float) -> None:
        while self._background and self._background[0][0] <= now:
            request = self.requests.get(self._background.popleft()[1])
            if request is not None and request.hexgen.background:
                self.hexgen_book.aged(request)
                self._due.add(request.request_id)
                self._requeue(request)

    def _note_admitted(self, output: Any) -> None:
        """Learn from the prefix hits of the calls that this step admitted."""
        cached = output.scheduled_cached_reqs
        for new in output.scheduled_new_reqs:
            self._admitted(new.req_id, new.num_computed_tokens)
        if cached.resumed_req_ids:
            for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if req_id in cached.resumed_req_ids:
                    self._admitted(req_id, computed)

    def _admitted(self, req_id: str, computed: int) -> None:
        request = self.requests[req_id]
        self._displacer.placed(request)
        call = request.hexgen
        if call.lost_tokens:
            self.hexgen_counters.recomputed_tokens += max(call.lost_tokens - computed, 0)
            call.lost_tokens = call.kept_tokens = 0
        else:
            self.hexgen_meter.admitted(request.num_prompt_tokens, computed)

    # What the step told.

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a step's output; learn from its time and re-key a few calls."""
        self.hexgen_meter.finished(
            scheduler_output, model_runner_output.sampled_token_ids, self.hexgen_clock()
        )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.waiting.restore()
        if not self.hexgen_meter.steps % _EXPIRE_EVERY_STEPS:
            self.hexgen_book.outlooks.expire(self.hexgen_clock())
        if self._learned_file is not None and not self.hexgen_meter.steps % _REFIT_EVERY_STEPS:
            self._learned_file.tick(self.hexgen_clock())
        if self._ordered:
            self._rekey_running()
        self._rekey_waiting()
        return outputs

    def _rekey_running(self) -> None:
        running, book = self.running, self.hexgen_book
        if not running:
            return
        for _ in range(1 + len(running) // _REKEY_EVERY_STEPS):
            self._next_running = (self._next_running + 1) % len(running)
            book.price(running[self._next_running])
            self._displacer.placed(running[self._next_running])

    def _rekey_waiting(self) -> None:
        meter, book = self.hexgen_meter, self.hexgen_book
        # New rates wait for the end of a pass: beginning again would never reach the tail.
        if not self._to_rekey and meter.steps % _REFIT_EVERY_STEPS == 0:
            rates = meter.rates(self.max_num_scheduled_tokens)
            if rates is not None:
                book.reachable_token_s = self._reachable_token_s(rates)
            if rates is not None and rates.differs(book.rates, _RATES_MOVED):
                book.rates = rates
                self._to_rekey = self.waiting.unordered()
        for _ in range(min(_REKEY_WAITING, len(self._to_rekey))):
            request = self._to_rekey.pop()
            if request in self.waiting:
                book.price(request)
                self.waiting.rekey(request)
                if self._late is not None and request.hexgen.has_deadline:
                    self._late.add(request.request_id, book.late_from_s(request))

    def _reachable_token_s(self, rates: ServiceRates) -> float:
        cost = self.hexgen_meter.fit.cost()
        if cost is None or not self.hexgen_options.pace:
            return rates.output_token_s
        tight = [r.num_computed_tokens for r in self.running if r.request_id in self._due]
        share = self.hexgen_meter.prefill_share() or 0.0
        return reachable_token_s(cost, len(tight), sum(tight), share, rates.output_token_s)


def _user(request: Request) -> str | None:
    """Return whose KV that of a call is, ``None`` of a lone call that may be followed by others."""
    call = request.hexgen
    lone = call.workflow_id == request.request_id and call.plans.follows is not False
    return None if lone else call.workflow_id
