"""A call under way, as its request handler keeps it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hexgen_vllm.router.calls.intake import Accepted
from hexgen_vllm.router.calls.transcript import Transcript
from hexgen_vllm.router.endpoints import Endpoint
from hexgen_vllm.router.engines.watch import Usage
from hexgen_vllm.router.errors import Blame, Outcome
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.observe.tracing import CallTrace
from hexgen_vllm.router.tenants import DEFAULT_TENANT, Client
from hexgen_vllm.types import CallResult, Placement

_LOG: Final = logging.getLogger("hexgen_vllm.router.call")
_FAILED: Final = frozenset(
    outcome for outcome in Outcome if outcome.ending.blame in (Blame.ENGINE, Blame.ROUTER)
)


def call_ended(job: Job, now: float) -> None:
    """Log the end of a call: at level info when an engine or the router failed, else at debug."""
    level = logging.INFO if job.outcome in _FAILED else logging.DEBUG
    if not _LOG.isEnabledFor(level):
        return
    call = None if job.accepted is None else job.accepted.call
    _LOG.log(
        level,
        "call ended outcome=%s endpoint=%s engine=%s tries=%d migrations=%d took_s=%.3f "
        "workflow=%s stage=%s prompt_tokens=%s output_tokens=%s request_id=%s",
        job.outcome,
        job.endpoint.name,
        "" if job.placement is None else job.placement.engine_id,
        job.tries,
        job.migrations,
        now - job.began_s,
        "" if call is None else call.workflow_id.replace(" ", "-"),
        "" if call is None else call.stage,
        job.result.prompt_tokens,
        job.result.output_tokens,
        job.request_id,
    )


_ACTS: Final = ("DELETE", "PATCH", "POST", "PUT")
_ABORTED: Final = CallResult(ok=False, reason="abort")


@dataclass(init=False, slots=True)
class Job:
    """A call under way.

    Attributes:
        request: of the client.
        endpoint: where it came in.
        request_id: the client's or a new one, ``None`` until it was read.
        accepted: the parsed call, ``None`` until it was read.
        began_s: time of receipt.
        trace: of the call, ``None`` where none is made.
        placed_s: when it was first placed.
        sent_s: when it was placed last.
        first_token_s: when a stream's first token came.
        tries: times it was sent.
        migrations: times that another engine was to go on with its answer.
        transcript: of the answer, where another engine could go on with it.
        tried: names of engines that it was sent to past the policy.
        placement: the last decision about it.
        sent: pieces of an answer that the client has been sent.
        rests: returns whether a comment may go to the client now, between two events of a stream
            that has begun; ``None`` before that.
        learn: is told the beginning of a good answer, where something is to be learned from it.
        kept_alive: the client has the head of a stream and comments.
        outcome: for the ledger.
        result: for the coordinator.
    """

    request: Request
    endpoint: Endpoint
    began_s: float
    trace: CallTrace | None
    placed_s: float | None
    sent_s: float | None
    first_token_s: float | None
    request_id: str | None
    accepted: Accepted | None
    tries: int
    migrations: int
    transcript: Transcript | None
    sent: int
    tried: list[str]
    placement: Placement | None
    rests: Callable[[], bool] | None
    learn: Callable[[bytes], None] | None
    kept_alive: bool
    outcome: Outcome
    result: CallResult

    def __init__(
        self, request: Request, endpoint: Endpoint, began_s: float, trace: CallTrace | None = None
    ) -> None:
        self.request, self.endpoint = request, endpoint
        self.began_s, self.trace = began_s, trace
        self.placed_s = self.sent_s = self.first_token_s = None
        self.request_id = self.accepted = self.placement = None
        self.tries = self.sent = self.migrations = 0
        self.transcript = None
        self.rests = self.learn = None
        self.kept_alive = False
        self.tried = []
        self.outcome, self.result = Outcome.INTERNAL, _ABORTED

    @property
    def placed(self) -> bool:
        """Whether the policy places it."""
        return self.endpoint.placed and (self.endpoint.known or self.request.method in _ACTS)

    @property
    def repeats(self) -> bool:
        """Whether it may be sent again when an engine may have begun it."""
        return self.endpoint.known or self.request.method not in _ACTS

    def own_id(self, response: str) -> str:
        """Return what a stored response of its tenant is known by in the router."""
        client: Client = self.request.client
        tenant = DEFAULT_TENANT if self.accepted is None else self.accepted.call.tenant
        return client.own_id(tenant, response)

    def first_token(self, now: float) -> None:
        """Note the first token of a stream; those of engines that go on with it are later ones."""
        if self.first_token_s is None or not self.migrations:
            self.first_token_s = now
            if self.trace is not None:
                self.trace.first_token()

    def try_failed(self, reason: str) -> None:
        """Note that an engine failed before the client saw anything."""
        if self.trace is not None:
            self.trace.try_failed(reason)

    def client_left(self) -> None:
        """Note that the client has gone; an answer that it had in full by then stays one."""
        if self.outcome == Outcome.INTERNAL:
            self.outcome = Outcome.CLIENT_GONE

    def ended(self, outcome: Outcome, usage: Usage | None = None) -> None:
        """Note how it ended; with ``usage`` it was answered."""
        self.outcome = outcome
        if usage is not None:
            self.result = CallResult(
                ok=True,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens if self.endpoint.generates else None,
            )
