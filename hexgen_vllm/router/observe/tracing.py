"""What a relay says of a call while it works, of which :mod:`.otel` makes spans.

Without ``--otlp-traces-endpoint`` there is no tracing, and a call has no trace.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Protocol

from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.types import Call, CallResult, Placement


class CallTrace(Protocol):
    """The trace of one call."""

    def accepted(self, request_id: str, call: Call, agent: str | None = None) -> None:
        """Note that the call, which ``agent`` makes, was read and now waits to be placed."""

    def placed(self, placement: Placement, now: float) -> None:
        """Note a decision."""

    def sending(self, engine: str, headers: MutableMapping[str, str]) -> None:
        """Note that the call goes to ``engine``; ``headers`` take the trace along."""

    def first_token(self) -> None:
        """Note the first token of a stream."""

    def try_failed(self, reason: str) -> None:
        """Note that the engine failed before the client saw anything."""

    def ended(self, outcome: str, result: CallResult) -> None:
        """Note the end of the call, however it ended."""


class Tracing(Protocol):
    """Begins traces."""

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> CallTrace:
        """Return the trace of a call that came in at ``path``."""

    def workflow_ended(self, run: WorkflowRun) -> None:
        """Note the end of a workflow."""

    def close(self) -> None:
        """Send what was not sent yet; may take seconds."""
