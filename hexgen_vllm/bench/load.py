"""Open-loop load: workflows start when they are due, however busy the servers are.

Latency and deadline count from when a workflow was due, so a bench that falls behind shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from hexgen_vllm.bench.load_client import Reply
from hexgen_vllm.clock import Clock
from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec
from hexgen_vllm.wire import CallMeta

HINTS: Final = ("none", "output", "all")
MIN_REMAINING_MS: Final = 1.0


class Sender(Protocol):
    """What calls are sent with, such as :class:`hexgen_vllm.bench.load_client.LoadClient`."""

    async def send(self, workflow_id: str, index: int, call: CallSpec, meta: CallMeta) -> Reply:
        """Send a workflow's ``index``-th call and wait for its end; must not raise."""
        ...


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    workflows: int
    started: int = 0
    finished: int = 0
    late: int = 0
    failed: int = 0

    @property
    def open(self) -> int:
        """Workflows that have started and not ended."""
        return self.started - self.finished - self.failed


@dataclass(slots=True)
class LoadRun:
    """One run.

    Attributes:
        sender: what calls are sent with.
        clock: the one that the sender uses.
        deadline_s: seconds each workflow has from when it is due.
        hints: what the client tells beyond id, type, stage and deadline: ``none``, the
            ``output`` length, or ``all`` (also how many stages are left).
        drain_s: seconds to wait after the last arrival; what is open then is lost.
        progress: counters, kept up to date.
        calls: records of ended calls, in order of their end.
    """

    sender: Sender
    clock: Clock
    deadline_s: float
    hints: str = "none"
    drain_s: float = 600.0
    progress: Progress = field(default_factory=lambda: Progress(0))
    calls: list[CallRecord] = field(default_factory=list)
    _start_s: float = 0.0

    async def play(self, specs: Sequence[WorkflowSpec]) -> tuple[WorkflowRecord, ...]:
        """Play ``specs`` and return one record each, in order of arrival."""
        ordered = sorted(specs, key=lambda spec: (spec.arrival_s, spec.workflow_id))
        self.progress = Progress(len(ordered))
        self._start_s = self.clock.now()
        tasks: list[asyncio.Task[WorkflowRecord]] = []
        try:
            for spec in ordered:
                await asyncio.sleep(max(self._start_s + spec.arrival_s - self.clock.now(), 0.0))
                tasks.append(asyncio.create_task(self._workflow(spec)))
            if tasks:
                await asyncio.wait(tasks, timeout=self.drain_s)
        finally:
            for task in tasks:
                task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return tuple(self._outcome(*pair) for pair in zip(ordered, ended, strict=True))

    def _outcome(self, spec: WorkflowSpec, ended: WorkflowRecord | BaseException) -> WorkflowRecord:
        if isinstance(ended, asyncio.CancelledError):
            return self._record(spec, None, None)
        if isinstance(ended, BaseException):
            raise ended
        return ended

    async def _workflow(self, spec: WorkflowSpec) -> WorkflowRecord:
        self.progress.started += 1
        calls, waits, errors = list(spec.calls()), spec.waits(), list[str]()
        groups = [number for number, group in enumerate(spec.stages) for _ in group]
        tasks: list[asyncio.Task[bool]] = []

        async def one(index: int) -> bool:
            """Send a call when it is its turn; return whether what waits for it may be sent."""
            call = calls[index]
            if not all(await asyncio.gather(*(tasks[before] for before in waits[index]))):
                return False
            if call.think_s:
                await asyncio.sleep(call.think_s)
                if errors:
                    return False
            error = await self._call(spec, groups[index], index, call)
            if error:
                errors.append(f"{call.stage}: {error}")
            return not error

        try:
            for index in range(len(calls)):
                tasks.append(asyncio.create_task(one(index)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if errors:
            self.progress.failed += 1
            return self._record(spec, None, errors[0])
        record = self._record(spec, self.clock.now() - self._start_s - spec.arrival_s, None)
        self.progress.finished += 1
        self.progress.late += not record.on_time
        return record

    def _record(
        self, spec: WorkflowSpec, latency_s: float | None, error: str | None
    ) -> WorkflowRecord:
        return WorkflowRecord(
            spec.workflow_id,
            spec.arrival_s,
            self.deadline_s,
            latency_s,
            error,
            spec.type,
            spec.tenant,
        )

    async def _call(self, spec: WorkflowSpec, group: int, index: int, call: CallSpec) -> str | None:
        """Send one call, record it, and return its error."""
        sent_s = self.clock.now() - self._start_s
        answer = await self.sender.send(
            spec.workflow_id, index, call, self._meta(spec, group, call, sent_s)
        )
        self.calls.append(
            CallRecord(
                workflow_id=spec.workflow_id,
                stage=call.stage,
                sent_s=sent_s,
                latency_s=answer.latency_s,
                prompt_tokens=call.prompt_tokens,
                output_tokens=answer.output_tokens,
                ttft_s=answer.ttft_s,
                engine=answer.engine,
                error=answer.error,
            )
        )
        return answer.error

    def _meta(self, spec: WorkflowSpec, group: int, call: CallSpec, sent_s: float) -> CallMeta:
        left_ms = (spec.arrival_s + self.deadline_s - sent_s) * 1000.0
        after = len(spec.stages) - 1 - group
        return CallMeta(
            workflow_id=spec.workflow_id,
            workflow_type=spec.type,
            workflow_deadline_ms=max(left_ms, MIN_REMAINING_MS),
            stage=call.stage,
            stages_left=after if self.hints == "all" else None,
            expected_output_tokens=None if self.hints == "none" else call.output_tokens,
            workflow_final=True if after == 0 and spec.ends_with_one else None,
            tenant=spec.tenant,
        )
