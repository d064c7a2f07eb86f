"""What an oracle knows: the true path after every call, in place of learned shapes."""

from __future__ import annotations

from hexgen_vllm.policy.values import Tail
from hexgen_vllm.policy.workflow import NOTHING, Shapes, WorkflowRun, path_weight
from hexgen_vllm.sim.workload import CallSpec, WorkflowSpec


class TruthShapes(Shapes):
    """Shapes of workflows that are known in advance; nothing is learned.

    Each workflow must be its own type, named by its id.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tails: dict[str, dict[tuple[str, int], Tail]] = {}

    def reveal(self, spec: WorkflowSpec) -> None:
        """Take in a workflow that begins."""
        self._tails[spec.workflow_id] = true_tails(spec)

    def forget(self, workflow_id: str) -> None:
        """Drop a workflow that ended."""
        self._tails.pop(workflow_id, None)

    def learn(self, run: WorkflowRun) -> None:
        """Learn nothing."""

    def learn_output(self, workflow_type: str, stage: str, output_tokens: int) -> None:
        """Learn nothing."""

    def tail(
        self, workflow_type: str, stage: str, ordinal: int, q: float, stages_left: int | None = None
    ) -> Tail:
        """Return the true path after a call, whatever the quantile."""
        return self._tails.get(workflow_type, {}).get((stage, ordinal), NOTHING)


def true_tails(spec: WorkflowSpec) -> dict[tuple[str, int], Tail]:
    """Return the path after each call, by stage and number of calls of that stage before it.

    Prompt tokens that lie in shared layers count as cached.
    """
    after = NOTHING
    by_group = []
    for group in reversed(spec.stages):
        by_group.append(after)
        after = max((_longer(after, call) for call in group), key=path_weight)
    tails: dict[tuple[str, int], Tail] = {}
    counts: dict[str, int] = {}
    for group, tail in zip(spec.stages, reversed(by_group), strict=True):
        for call in group:
            ordinal = counts.get(call.stage, 0)
            counts[call.stage] = ordinal + 1
            tails[call.stage, ordinal] = tail
    return tails


def _longer(tail: Tail, call: CallSpec) -> Tail:
    return Tail(
        tail.calls + 1,
        tail.prefill_tokens + call.own_tokens,
        tail.output_tokens + call.output_tokens,
    )
