"""One run as a Chrome trace, to look at in ``chrome://tracing`` or https://ui.perfetto.dev.

Each engine is a process: its steps on one track, its calls on as many as overlap, and its batch,
queue and KV cache as counters. Workflows are a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, Final

from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.sim.engine.engine import SimEngine

Event = dict[str, Any]

_WORKFLOWS: Final = 1  # process id; engines follow
_STEPS: Final = 0  # track of an engine's steps; calls follow


class Timeline:
    """Collects what happens in a run; give it to the simulation as observer."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._processes: dict[str, int] = {}

    def stepped(self, engine: SimEngine, start_s: float, steps: int) -> None:
        """Note ``steps`` equal steps that end now."""
        pid, batch = self._process(engine.model.engine_id), engine.batch
        prefill = sum(s.chunk for s in batch.chunks)
        decodes = batch.clock.size - len(batch.missed)
        name = f"prefill {prefill} + {decodes}" if prefill else f"decode {decodes}"
        args = {"steps": steps, "prompt tokens": prefill, "decodes": decodes}
        if batch.evicted:
            args["preempted"] = len(batch.evicted)
        self._slice(pid, _STEPS, name, start_s, engine.end_s - start_s, args)
        self._counter(pid, "calls", start_s, running=len(batch.running), waiting=batch.queued)
        self._counter(pid, "KV", start_s, used=round(batch.pool.usage(), 4))

    def trace(
        self, workflows: Iterable[WorkflowRecord], calls: Iterable[CallRecord]
    ) -> dict[str, Any]:
        """Return the trace of a run with these records."""
        events = list(self._events)
        self._events = []
        self._calls(sorted(calls, key=lambda c: (c.sent_s, c.workflow_id)))
        self._workflows(sorted(workflows, key=lambda w: (w.arrived_s, w.workflow_id)))
        events += self._events
        self._events = []
        names = {_WORKFLOWS: "workflows", **{pid: n for n, pid in self._processes.items()}}
        for pid, name in sorted(names.items()):
            self._named(pid, name)
        return {"displayTimeUnit": "ms", "traceEvents": self._events + events}

    def _calls(self, calls: Sequence[CallRecord]) -> None:
        lanes: dict[str, _Lanes] = {}
        for call in calls:
            if call.engine is None:
                continue
            lane = lanes.setdefault(call.engine, _Lanes()).take(call.sent_s, call.latency_s)
            args = {
                "workflow": call.workflow_id,
                "prompt": call.prompt_tokens,
                "output": call.output_tokens,
                "ttft_s": call.ttft_s,
            }
            pid = self._process(call.engine)
            self._slice(pid, 1 + lane, call.stage, call.sent_s, call.latency_s, args)

    def _workflows(self, workflows: Sequence[WorkflowRecord]) -> None:
        lanes = _Lanes()
        for workflow in workflows:
            if workflow.latency_s is None:
                continue
            lane = lanes.take(workflow.arrived_s, workflow.latency_s)
            name = f"{workflow.type} {'on time' if workflow.on_time else 'late'}"
            args = {"workflow": workflow.workflow_id, "deadline_s": workflow.deadline_s}
            self._slice(_WORKFLOWS, lane, name, workflow.arrived_s, workflow.latency_s, args)

    def _process(self, engine_id: str) -> int:
        return self._processes.setdefault(engine_id, _WORKFLOWS + 1 + len(self._processes))

    def _slice(
        self, pid: int, tid: int, name: str, start_s: float, took_s: float, args: Event
    ) -> None:
        times = {"ts": _microseconds(start_s), "dur": _microseconds(took_s)}
        self._events.append(
            {"ph": "X", "pid": pid, "tid": tid, "name": name, **times, "args": args}
        )

    def _counter(self, pid: int, name: str, at_s: float, **values: float) -> None:
        self._events.append(
            {"ph": "C", "pid": pid, "name": name, "ts": _microseconds(at_s), "args": values}
        )

    def _named(self, pid: int, name: str) -> None:
        self._events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        if pid != _WORKFLOWS:
            self._events.append(
                {"ph": "M", "pid": pid, "tid": 0, "name": "thread_name", "args": {"name": "steps"}}
            )


class _Lanes:
    """The first track that is free, for slices in order of their start."""

    def __init__(self) -> None:
        self._busy: list[tuple[float, int]] = []
        self._free: list[int] = []
        self._count = 0

    def take(self, start_s: float, took_s: float) -> int:
        """Return the number of the track."""
        while self._busy and self._busy[0][0] <= start_s:
            heappush(self._free, heappop(self._busy)[1])
        if self._free:
            lane = heappop(self._free)
        else:
            lane, self._count = self._count, self._count + 1
        heappush(self._busy, (start_s + took_s, lane))
        return lane


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
