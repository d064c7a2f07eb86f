"""From vLLM's Request to what the policies need: deadline, tail, expected output, key.

The state of a call is one slotted object, ``request.hexgen``; it lives and dies with the Request.

Clocks. A deadline arrives as remaining milliseconds and counts from ``arrival_time``, which the
API server took on the wall clock. The wall clock may jump and is only comparable on one host, so
the state is kept on this process' monotonic clock: a call arrived ``age`` ago, where the age is
the difference of two wall-clock readings and is taken as 0 when it is negative or absurd.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.compat import Request
from hexgen_vllm.policy.order import late_from_s, price
from hexgen_vllm.policy.outlook import Outlooks, without_deadline
from hexgen_vllm.policy.returns import UNSAID, Plans
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.types import LONE, NO_DEADLINE, Call, CallResult

logger = logging.getLogger("vllm.hexgen")

_MAX_AGE_S: Final = 600.0
_WARN_EVERY_S: Final = 60.0
_OVER: Final = Plans(follows=False)
_NOTHING_SAID: Final = wire.CallMeta()


@dataclass(slots=True)
class CallState:
    """What the scheduler knows of one call; times are monotonic seconds of this process.

    Attributes:
        workflow_id: the workflow, else the session, else the request itself.
        arrived_s: when it reached the API server.
        began_s: when the first call of its workflow arrived, if that has one deadline for all.
        turn: its number among the calls of this process, in order of arrival.
        deadline_s: end-to-end deadline of its workflow; ``inf`` for none.
        tail_s: predicted seconds of critical path after it.
        expected_tokens: output tokens expected in all.
        background: its workflow is demoted; cleared when it has waited long enough.
        rank: the client's priority, as vLLM has it: lower is sooner, whatever the key.
        key_s: its place among calls of its rank; smaller is sooner.
        latest_start_s: L, credited with progress.
        queued_start_s: L when it last joined the queue.
        displacements: times it was displaced.
        late: it cannot be on time any more, and comes after those that can.
        promoted: it waited so long that it goes first among calls of its rank.
        likely_most: output tokens, at a high quantile.
        tail_tokens: output tokens of the tail, as far as they are known to be part of it.
        tail_prefill_s: the rest of the tail: what no pace of decoding changes.
        least_tail_s: the tail at a low quantile.
        routed: a router placed it; it judges what is late, of all engines, and says so.
        known_as: what is learned of it, and by what.
        plans: what was said of what follows it.
        lost_tokens: KV dropped by preemptions and not yet computed again.
        kept_tokens: of these, KV that waits in host memory to be loaded again.
    """

    workflow_id: str
    arrived_s: float
    began_s: float
    turn: int
    deadline_s: float
    tail_s: float
    expected_tokens: int
    background: bool
    rank: int = 0
    key_s: float = 0.0
    latest_start_s: float = 0.0
    queued_start_s: float = 0.0
    displacements: int = 0
    late: bool = False
    promoted: bool = False
    likely_most: int = 1
    tail_tokens: int = 0
    tail_prefill_s: float = 0.0
    least_tail_s: float = 0.0
    routed: bool = False
    known_as: Call | None = None
    plans: Plans = UNSAID
    lost_tokens: int = 0
    kept_tokens: int = 0

    @property
    def has_deadline(self) -> bool:
        """Whether it can be late: it has a deadline, and its workflow is not demoted."""
        return self.deadline_s < NO_DEADLINE and not (self.background or self.late)


class CallBook:
    """Opens the state of calls, prices them by the order in force, and learns how they end.

    Attributes:
        rates: rates in force; set by the scheduler when it has measured better ones.
        reachable_token_s: seconds of an output token once calls without deadline have made way,
            ``None`` until measured.
        outlooks: what was learned of lengths and of what follows.
        bad_metadata: values that could not be read so far.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self.rates = ServiceRates.seeds(options)
        self.reachable_token_s: float | None = None
        self.outlooks = Outlooks()
        self.bad_metadata = 0
        self._warned_s = -_WARN_EVERY_S
        self._turn = 0

    def open(self, request: Request, now: float) -> None:
        """Give ``request`` its state, and its key; what cannot be read counts as not said."""
        meta, options = self._meta(request, now), self._options
        age_s = time.time() - request.arrival_time
        arrived_s = now - age_s if 0.0 <= age_s <= _MAX_AGE_S else now
        old: CallState | None = getattr(request, "hexgen", None)
        self._turn += 1
        if old is not None:
            self.closed(request, now, answered=False)
        # A router knows whose sessions are whose; what a body says to vLLM alone nobody checked.
        routed = meta.tail_ms is not None
        workflow_id = meta.workflow_id or (None if routed else _session(request))
        deadline_s = arrived_s + _budget_s(request, meta, options)
        said = meta.workflow_deadline_ms is not None
        if not said and workflow_id is not None and meta.service_class != wire.BATCH:
            known_s = self.outlooks.deadline_s(workflow_id)
            if known_s < NO_DEADLINE:  # an earlier call has said it
                said, deadline_s = True, known_s
        known_as = _known_as(request, meta, workflow_id, now, deadline_s, said)
        outlook = self.outlooks.opened(known_as, now)
        said_tail_s = None if meta.tail_ms is None else meta.tail_ms / 1000
        rates, tail = self.rates, outlook.tail
        request.hexgen = CallState(
            workflow_id=workflow_id or request.request_id,
            arrived_s=arrived_s,
            began_s=min(outlook.began_s, arrived_s) if said else arrived_s,
            turn=self._turn,
            deadline_s=deadline_s,
            tail_s=rates.tail_s(tail) if said_tail_s is None else said_tail_s,
            expected_tokens=outlook.usual_tokens,
            background=bool(meta.background),
            displacements=old.displacements if old is not None else 0,
            likely_most=outlook.most_tokens,
            tail_tokens=int(tail.output_tokens) if said_tail_s is None else 0,
            tail_prefill_s=rates.tail_prefill_s(tail) if said_tail_s is None else said_tail_s,
            least_tail_s=rates.tail_s(outlook.least_tail),
            routed=said_tail_s is not None,
            known_as=known_as,
            plans=_plans(request, meta),
        )
        self.price(request)

    def price(self, request: Request, computed: int | None = None) -> None:
        """Set the latest start and the key of ``request`` from what it still has to do.

        Args:
            request: the call.
            computed: prompt and output tokens whose KV is there; the request's own count if not
                given.
        """
        call = request.hexgen
        there = request.num_computed_tokens if computed is None else computed
        price(
            call,
            self._options.order,
            self.rates,
            _rank(request, self._options),
            call.turn,
            prompt=request.num_prompt_tokens,
            ahead=max(request.num_tokens - max(there, call.kept_tokens), 0),
            done=request.num_output_tokens,
            most=request.max_tokens,
        )

    def late_from_s(self, request: Request) -> float:
        """Return the moment from which a waiting call would probably not be on time any more.

        It is ``inf`` until rates are measured: what is only assumed must not put anybody behind.
        And for calls that a router placed: it demotes whole workflows if it is asked to; single
        calls put behind here would only make the longest workflows longer.
        """
        call = request.hexgen
        if self.reachable_token_s is None or call.routed:
            return NO_DEADLINE
        done, most = request.num_output_tokens, request.max_tokens
        return late_from_s(call, self.rates, self.reachable_token_s, request.num_tokens, done, most)

    def aged(self, request: Request) -> None:
        """End the background state of a call that has waited for as long as it may."""
        call = request.hexgen
        call.background = False
        call.deadline_s = call.arrived_s + self._options.background_max_wait_s
        call.tail_s = 0.0
        self.price(request)

    def closed(self, request: Request, now: float, *, answered: bool) -> None:
        """Learn from a call that is over, whether it ended by itself or not."""
        call = request.hexgen
        if call.known_as is not None:
            cached = max(getattr(request, "num_cached_tokens", 0), 0)
            output = request.num_output_tokens
            result = CallResult(answered, request.num_prompt_tokens, cached, output)
            self.outlooks.ended(call.known_as, call.expected_tokens, result, now)
            call.known_as = None

    def _meta(self, request: Request, now: float) -> wire.CallMeta:
        params = request.sampling_params  # a pooling request has none
        extra: Any = params.extra_args if params is not None else None
        if not extra:
            return _NOTHING_SAID
        try:
            meta, bad = wire.read_leniently(extra)
            # What agents say to vllm-router; vLLM's Rust server lets it through, others do not.
            meta = _filled(meta, extra.get(wire.AGENTIC))
        except Exception as error:  # in process, extra_args may hold anything; serve the call
            meta, bad = _NOTHING_SAID, (f"extra_args ({error})",)
        if bad:
            self._complain(request, bad, now)
        return meta

    def _complain(self, request: Request, bad: tuple[str, ...], now: float) -> None:
        self.bad_metadata += len(bad)
        if now - self._warned_s < _WARN_EVERY_S:
            return
        self._warned_s = now
        logger.warning(
            "Request %s: cannot read %s, defaults are used; such values so far: %d.",
            request.request_id,
            ", ".join(map(repr, bad))[:200],
            self.bad_metadata,
        )


def _filled(meta: wire.CallMeta, context: object) -> wire.CallMeta:
    if not isinstance(context, dict):
        return meta
    return wire.merged(meta, wire.from_agentic_context(context))


def _budget_s(request: Request, meta: wire.CallMeta, options: EngineOptions) -> float:
    """Return the seconds from its arrival that a call has, ``inf`` for one that nobody waits for.

    A priority behind the usual one says that it is one of those, unless it brings a deadline or
    says otherwise.
    """
    said_ms = meta.workflow_deadline_ms
    if meta.service_class == wire.BATCH:
        return NO_DEADLINE
    if said_ms is not None:
        return max(said_ms / 1000, options.min_deadline_s)
    default_s = options.default_deadline_s
    if default_s is None or (request.priority > 0 and meta.service_class is None):
        return NO_DEADLINE
    return default_s


def _rank(request: Request, options: EngineOptions) -> int:
    """Return a call's priority as vLLM has it, lower is sooner, within the ceiling of clients."""
    most = options.max_priority
    rank: int = request.priority
    return rank if most is None else max(rank, -most)


def _known_as(
    request: Request,
    meta: wire.CallMeta,
    workflow_id: str | None,
    now: float,
    deadline_s: float,
    said: bool,
) -> Call:
    """Return a call as the learned shapes know it; a deadline that nobody ``said`` is no fact."""
    kind = meta.workflow_type or "default"
    return Call(
        request.request_id,
        workflow_id or f"{LONE}{request.request_id}",
        now,
        request.num_prompt_tokens,
        kind if deadline_s < NO_DEADLINE else without_deadline(kind),
        meta.stage or "default",
        deadline_s=deadline_s if said else NO_DEADLINE,
        expected_output_tokens=meta.expected_output_tokens,
        max_output_tokens=request.max_tokens,
        stages_left=meta.stages_left,
        final=bool(meta.workflow_final) or workflow_id is None,
    )


def _plans(request: Request, meta: wire.CallMeta) -> Plans:
    """Return what a request says of what follows it; what cannot be read was not said.

    In the words of others: ``expected_resume``, yes or no or in how many seconds, and
    ``kv_retention_ttl_seconds``, in ``vllm_xargs``, in the agentic context there, or in the
    payload of an action of vLLM's ``kv_hints``.
    """
    if meta.workflow_final or meta.resume_ms == 0.0:
        return _OVER
    params = request.sampling_params
    extra: Any = params.extra_args if params is not None else None
    hints = getattr(request, "kv_hints", None)
    if not extra and hints is None:
        return UNSAID
    said_resume_s = None if meta.resume_ms is None else meta.resume_ms / 1000.0
    said_keep_s = None if meta.keep_ms is None else meta.keep_ms / 1000.0
    sources = [extra, extra.get(wire.AGENTIC)] if isinstance(extra, dict) else []
    sources += [getattr(action, "payload", None) for action in getattr(hints, "actions", ())]
    follows, resume_s, keep_s = True if meta.stages_left else None, None, None
    for source in sources:
        if isinstance(source, dict):
            resume, keep = source.get("expected_resume"), source.get("kv_retention_ttl_seconds")
            if isinstance(resume, bool) or resume in ("true", "false"):
                follows = resume in (True, "true")
            else:
                resume_s = _seconds(resume) or resume_s
            keep_s = _seconds(keep) or keep_s
    return Plans(follows, said_resume_s or resume_s, said_keep_s or keep_s)


def _seconds(value: object) -> float | None:
    """Return a positive number of seconds, ``None`` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if 0.0 < number < math.inf else None


def _session(request: Request) -> str | None:
    session: str | None = getattr(request, "session_id", None)
    return session
