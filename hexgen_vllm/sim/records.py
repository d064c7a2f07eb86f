"""Workflows and calls under way in a simulation, and the records they leave."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen_vllm.metrics.events import CallRecord, WorkflowRecord
from hexgen_vllm.sim.engine import Engine
from hexgen_vllm.sim.sequence import Sequence
from hexgen_vllm.sim.workload import CallSpec, WorkflowSpec


@dataclass(slots=True)
class WorkflowState:
    """A workflow that has begun.

    Attributes:
        spec: what it is.
        deadline_s: absolute deadline.
        group: group whose calls are open, -1 before the first.
        calls: calls sent so far.
        open_calls: of them, not ended.
        error: why it failed.
    """

    spec: WorkflowSpec
    deadline_s: float
    group: int = -1
    calls: int = 0
    open_calls: int = 0
    error: str | None = None


@dataclass(slots=True)
class CallState:
    """A call between its arrival at the router and its end."""

    workflow: WorkflowState
    spec: CallSpec
    sent_s: float
    engine: Engine | None = None


class Recorder:
    """Turns what ends into records.

    Attributes:
        workflows, calls: records, in order of ending.
        prompt_tokens, cached_tokens: of answered calls, and of them out of prefix caches.

    Args:
        keep_calls: keep a record of every call.
    """

    def __init__(self, *, keep_calls: bool) -> None:
        self._keep_calls = keep_calls
        self.workflows: list[WorkflowRecord] = []
        self.calls: list[CallRecord] = []
        self.prompt_tokens = self.cached_tokens = 0

    def workflow_ended(self, workflow: WorkflowState, now: float) -> None:
        """Note that a workflow finished or failed."""
        spec = workflow.spec
        self.workflows.append(
            WorkflowRecord(
                workflow_id=spec.workflow_id,
                arrived_s=spec.arrival_s,
                deadline_s=workflow.deadline_s - spec.arrival_s,
                latency_s=now - spec.arrival_s if workflow.error is None else None,
                error=workflow.error,
                type=spec.type,
                tenant=spec.tenant,
            )
        )

    def answered(self, call: CallState, sequence: Sequence, now: float) -> None:
        """Note that a call was answered."""
        self.prompt_tokens += sequence.prompt_tokens
        self.cached_tokens += sequence.cached_tokens
        if self._keep_calls:
            first_s = sequence.first_token_s
            ttft_s = None if first_s is None else first_s - call.sent_s
            self.calls.append(_record(call, now, call.spec.output_tokens, ttft_s, None))

    def failed(self, call: CallState, error: str, now: float) -> None:
        """Note that a call was refused."""
        if self._keep_calls:
            self.calls.append(_record(call, now, 0, None, error))


def _record(
    call: CallState, now: float, output_tokens: int, ttft_s: float | None, error: str | None
) -> CallRecord:
    return CallRecord(
        workflow_id=call.workflow.spec.workflow_id,
        stage=call.spec.stage,
        sent_s=call.sent_s,
        latency_s=now - call.sent_s,
        prompt_tokens=call.spec.prompt_tokens,
        output_tokens=output_tokens,
        ttft_s=ttft_s,
        engine=None if call.engine is None else call.engine.model.engine_id,
        error=error,
    )
