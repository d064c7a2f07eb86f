"""Records that drivers of a run emit: one per call, one per workflow.

The live bench and the simulator emit the same records, so that one summary fits both.
Times are seconds; ``_s`` fields that are moments count from the start of the run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallRecord:
    """How one call went.

    Attributes:
        workflow_id: its workflow.
        stage: name of its stage.
        sent_s: when it was sent.
        latency_s: from sending to the last byte, or to the failure.
        prompt_tokens: prompt length.
        output_tokens: output length, 0 when it failed or the server did not say.
        ttft_s: from sending to the first token, ``None`` when it is not known.
        engine: engine that served it, ``None`` when it is not known.
        error: why it failed, in a few words, ``None`` when it was answered.
    """

    workflow_id: str
    stage: str
    sent_s: float
    latency_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    engine: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """How one workflow went.

    Attributes:
        workflow_id: unique in the run.
        arrived_s: when it was due to start.
        deadline_s: seconds it had from its arrival.
        latency_s: from its arrival to the end of its last call, ``None`` when it did not finish.
        error: why it failed, ``None`` when nothing failed.
        type: type of workflow.
        tenant: who sent it.
    """

    workflow_id: str
    arrived_s: float
    deadline_s: float
    latency_s: float | None
    error: str | None = None
    type: str = "default"
    tenant: str = "default"

    @property
    def on_time(self) -> bool:
        """Whether it finished within its deadline."""
        return self.latency_s is not None and self.latency_s <= self.deadline_s

    @property
    def lost(self) -> bool:
        """Whether it neither finished nor failed with an error."""
        return self.latency_s is None and self.error is None
