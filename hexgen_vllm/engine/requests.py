"""From vLLM's Request to what the policies need: deadline, tail, expected output, key.

The state of a call is one slotted object, ``request.hexgen``; it lives and dies with the Request.

Clocks. A deadline arrives as remaining milliseconds and counts from ``arrival_time``, which the
API server took on the wall clock. The wall clock may jump and is only comparable on one host, so
the state is kept on this process' monotonic clock: a call arrived ``age`` ago, where the age is
the difference of two wall-clock readings and is taken as 0 when it is negative or absurd.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Final

from hexgen_vllm import wire
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.compat import Request
from hexgen_vllm.policy.service import ServiceRates, output_left
from hexgen_vllm.policy.slack import hexgen_key, latest_start
from hexgen_vllm.policy.urgency import LAST_RANK, background_key, batch_key
from hexgen_vllm.types import NO_DEADLINE

logger = logging.getLogger("vllm.hexgen")

_MAX_AGE_S: Final = 600.0
_WARN_EVERY_S: Final = 60.0
_FIRST_OUTPUT_GUESS: Final = 256.0
_OUTPUT_WEIGHT: Final = 0.05
_NOTHING_SAID: Final = wire.CallMeta()


@dataclass(slots=True)
class CallState:
    """What the scheduler knows of one call; times are monotonic seconds of this process.

    Attributes:
        workflow_id: the workflow, else the session, else the request itself.
        arrived_s: when it reached the API server.
        opened_s: when it reached this process.
        deadline_s: end-to-end deadline of its workflow; ``inf`` for none.
        tail_s: predicted seconds of critical path after it.
        expected_tokens: output tokens expected in all.
        background: its workflow is demoted; cleared when it has waited long enough.
        rank: the client's priority, as vLLM has it: lower is sooner, whatever the key.
        key_s: its place among calls of its rank; smaller is sooner.
        latest_start_s: L, credited with progress.
        queued_start_s: L when it last joined the queue.
        displacements: times it was displaced.
        lost_tokens: KV dropped by preemptions and not yet computed again.
        kept_tokens: of these, KV that waits in host memory to be loaded again.
    """

    workflow_id: str
    arrived_s: float
    opened_s: float
    deadline_s: float
    tail_s: float
    expected_tokens: int
    background: bool
    rank: int = 0
    key_s: float = 0.0
    latest_start_s: float = 0.0
    queued_start_s: float = 0.0
    displacements: int = 0
    lost_tokens: int = 0
    kept_tokens: int = 0

    @property
    def has_deadline(self) -> bool:
        """Whether it can be late: it has a deadline, and its workflow is not demoted."""
        return not self.background and self.deadline_s < NO_DEADLINE


class CallBook:
    """Opens the state of calls and prices them by the order in force.

    Attributes:
        rates: rates in force; set by the scheduler when it has measured better ones.
        bad_metadata: values that could not be read so far.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self.rates = ServiceRates.seeds(options)
        self.bad_metadata = 0
        self._warned_s = -_WARN_EVERY_S
        self._output_mean = _FIRST_OUTPUT_GUESS

    def open(self, request: Request, now: float) -> None:
        """Give ``request`` its state, and its key; what cannot be read counts as not said."""
        meta, options = self._meta(request, now), self._options
        age_s = time.time() - request.arrival_time
        arrived_s = now - age_s if 0.0 <= age_s <= _MAX_AGE_S else now
        old: CallState | None = getattr(request, "hexgen", None)
        request.hexgen = CallState(
            workflow_id=meta.workflow_id or _session(request) or request.request_id,
            arrived_s=arrived_s,
            opened_s=now,
            deadline_s=arrived_s + _budget_s(request, meta, options),
            tail_s=(meta.tail_ms or 0.0) / 1000,
            expected_tokens=self._expected(request, meta.expected_output_tokens),
            background=bool(meta.background),
            displacements=old.displacements if old is not None else 0,
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
        done = request.num_output_tokens
        there = request.num_computed_tokens if computed is None else computed
        ahead = request.num_tokens - max(there, call.kept_tokens)
        left = output_left(call.expected_tokens, done, request.max_tokens)
        service_s = self.rates.service_s(max(ahead, 0), left)
        if call.background:
            call.rank = LAST_RANK
            call.key_s = call.latest_start_s = background_key(service_s + call.tail_s)
            return
        call.rank = _rank(request, self._options)
        if call.deadline_s == NO_DEADLINE:
            call.latest_start_s = NO_DEADLINE
            call.key_s = batch_key(call.opened_s)
            return
        call.latest_start_s = latest_start(call.deadline_s, call.tail_s, service_s)
        call.key_s = self._key(request, call)

    def aged(self, request: Request) -> None:
        """End the background state of a call that has waited for as long as it may."""
        call = request.hexgen
        call.background = False
        call.deadline_s = call.arrived_s + self._options.background_max_wait_s
        call.tail_s = 0.0
        self.price(request)

    def finished(self, request: Request) -> None:
        """Learn the output length of a call that ended by itself."""
        self._output_mean += _OUTPUT_WEIGHT * (request.num_output_tokens - self._output_mean)

    def _key(self, request: Request, call: CallState) -> float:
        order = self._options.order
        if order == "slack":
            return call.latest_start_s
        if order == "edf":
            return call.deadline_s
        if order == "fcfs":
            return call.arrived_s
        whole_s = self.rates.service_s(request.num_prompt_tokens, call.expected_tokens)
        return hexgen_key(call.arrived_s, call.deadline_s, call.tail_s, whole_s)

    def _expected(self, request: Request, said: int | None) -> int:
        """Return the output length to expect: what the client says, else the recent mean."""
        guess = said if said is not None else int(self._output_mean)
        return max(min(guess, request.max_tokens), 1)

    def _meta(self, request: Request, now: float) -> wire.CallMeta:
        params = request.sampling_params  # a pooling request has none
        extra: Any = params.extra_args if params is not None else None
        if not extra:
            return _NOTHING_SAID
        try:
            meta, bad = wire.read_leniently(extra)
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


def _session(request: Request) -> str | None:
    session: str | None = getattr(request, "session_id", None)
    return session
