"""Our own format as a trace: :mod:`hexgen_vllm.recent` says what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from hexgen_vllm.recent import MAX_NAME, RecentCall, RecentWorkflow, workflow_in
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import TraceCall, TraceWorkflow

_SAME_TIME_S: Final = 1e-6


def read_recorded(rows: Iterable[Row], silence_s: float, block: int) -> Iterator[TraceWorkflow]:
    """Yield the workflows of our own format."""
    del silence_s, block
    for row in rows:
        yield traced(workflow_in(dict(row.data), row.where))


def traced(recorded: RecentWorkflow) -> TraceWorkflow:
    """Return a recorded workflow in the words of all formats."""
    listed = recorded.calls
    calls = [
        TraceCall(
            call.stage,
            call.prompt,
            call.output,
            recorded.arrived_s + call.at_s,
            recorded.arrived_s + call.at_s + call.took_s,
            call.blocks,
            call.cached,
            call.after or (),
            call.think_s,
        )
        for call in listed
    ]
    if any(call.after is None for call in listed):
        calls = _grouped(listed, calls)
    return TraceWorkflow(
        "workflow",
        recorded.type,
        calls,
        recorded.arrived_s,
        recorded.tenant,
        recorded.block_tokens,
        recorded.local,
        recorded.deadline_s,
        recorded.latency_s,
    )


def _grouped(listed: Sequence[RecentCall], calls: list[TraceCall]) -> list[TraceCall]:
    """Return calls in the order of their groups; a group waits for the one before it."""
    ordered: list[TraceCall] = []
    before: tuple[int, ...] = ()
    end_s = 0.0
    for group in groups(listed):
        members = [calls[_place(listed, call)] for call in group]
        for call, member in zip(group, members, strict=True):
            member.after, member.think_s = before, max(call.at_s - end_s, 0.0)
        before = tuple(range(len(ordered), len(ordered) + len(members)))
        ordered.extend(members)
        end_s = max(end_s, *(call.at_s + call.took_s for call in group))
    return ordered


def _place(listed: Sequence[RecentCall], call: RecentCall) -> int:
    return next(index for index, one in enumerate(listed) if one is call)


def groups(calls: Sequence[RecentCall]) -> list[tuple[RecentCall, ...]]:
    """Return calls in groups: what began before the last one had ended is parallel to it."""
    found: list[list[RecentCall]] = []
    end_s = 0.0
    for call in sorted(calls, key=lambda c: (c.at_s, c.stage)):
        if not found or call.at_s >= end_s - _SAME_TIME_S:
            found.append([call])
            end_s = call.at_s + call.took_s
        else:
            found[-1].append(call)
            end_s = max(end_s, call.at_s + call.took_s)
    return [tuple(group) for group in found]


class RecordedWriter:
    """Writes our own format."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def add(self, workflow: TraceWorkflow) -> None:
        """Write a workflow."""
        self._write(f"{recorded_of(workflow).line()}\n")


def recorded_of(workflow: TraceWorkflow) -> RecentWorkflow:
    """Return a workflow of any format as one of ours; unknown times are 0."""
    arrived_s = workflow.arrived_s or 0.0
    calls = []
    for call in workflow.calls:
        start_s = arrived_s if call.start_s is None else call.start_s
        took_s = 0.0 if call.end_s is None else max(call.end_s - start_s, 0.0)
        calls.append(
            RecentCall(
                call.stage[:MAX_NAME] or "call",
                round(start_s - arrived_s, 6),
                round(took_s, 6),
                call.prompt,
                call.output,
                call.cached,
                call.after,
                round(call.think_s, 6),
                call.blocks,
            )
        )
    return RecentWorkflow(
        workflow.type[:MAX_NAME] or "agent",
        arrived_s,
        tuple(calls),
        workflow.tenant[:MAX_NAME] or "default",
        workflow.deadline_s,
        workflow.latency_s,
        workflow.block_tokens,
        workflow.local,
    )
