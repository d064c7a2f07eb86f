"""Turns the calls that the router sees into recent workflows: lengths and timings, never text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from hexgen_vllm.tune.recent import MAX_CALLS, RecentCall, RecentWorkflow, Ring
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult, Placement


@dataclass(slots=True)
class _Seen:
    """A call that has not ended."""

    call: Call
    since_s: float
    cached: int | None = None


@dataclass(slots=True)
class _Run:
    """A workflow that has not ended."""

    type: str
    tenant: str
    began_s: float
    last_s: float
    deadline_s: float = NO_DEADLINE
    open_calls: int = 0
    calls: list[RecentCall] = field(default_factory=list)
    failed: bool = False
    final: bool = False


class Recorder:
    """Feeds a :class:`~hexgen_vllm.tune.recent.Ring`.

    A workflow ends when its client says so and nothing of it is open, or after ``idle_s`` of
    silence. One that an answer was missing in did not finish: it has no latency.

    Args:
        ring: where ended workflows go.
        idle_s: seconds of silence after which a workflow has ended.
        max_open: open workflows remembered; the longest silent one is dropped.
    """

    def __init__(self, ring: Ring, *, idle_s: float = 600.0, max_open: int = 20_000) -> None:
        self.ring = ring
        self._idle_s, self._max_open = idle_s, max_open
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._calls: dict[str, _Seen] = {}

    def arrived(self, call: Call, now: float) -> None:
        """Note that a call came."""
        run = self._runs.get(call.workflow_id)
        if run is None:
            run = _Run(call.workflow_type, call.tenant, now, now)
            self._runs[call.workflow_id] = run
            if len(self._runs) > self._max_open:
                self._runs.popitem(last=False)
        self._runs.move_to_end(call.workflow_id)
        run.last_s, run.open_calls = now, run.open_calls + 1
        run.deadline_s = min(run.deadline_s, call.deadline_s)
        run.final = run.final or call.final
        self._calls[call.call_id] = _Seen(call, now)

    def placed(self, placement: Placement) -> None:
        """Note where a call goes, and what of its prompt the engine probably has."""
        seen = self._calls.get(placement.call_id)
        if seen is not None:
            seen.cached = max(seen.call.prompt_tokens - placement.uncached_tokens, 0)

    def ended(self, call_id: str, result: CallResult, now: float) -> None:
        """Note that a call ended, however it did; harmless for one that is not known."""
        known = self._calls.pop(call_id, None)
        run = self._runs.get(known.call.workflow_id) if known is not None else None
        if known is None or run is None:
            return
        self._runs.move_to_end(known.call.workflow_id)
        run.last_s, run.open_calls = now, run.open_calls - 1
        if result.ok and result.output_tokens:
            if len(run.calls) <= MAX_CALLS:  # one too many: the ring refuses the workflow
                run.calls.append(_recorded(known, result, now, run.began_s))
        else:
            run.failed = True
        if run.final and not run.open_calls:
            self._end(known.call.workflow_id)

    def finished(self, workflow_id: str) -> None:
        """Note the client's word that a workflow is over."""
        run = self._runs.get(workflow_id)
        if run is not None:
            run.final = True
            if not run.open_calls:
                self._end(workflow_id)

    def tick(self, now: float) -> None:
        """End workflows that have been silent for long; call it every few seconds."""
        silent = []
        for workflow_id, run in self._runs.items():  # in order of what was last heard of them
            if now - run.last_s < self._idle_s:
                break
            if not run.open_calls:
                silent.append(workflow_id)
        for workflow_id in silent:
            self._end(workflow_id)

    def _end(self, workflow_id: str) -> None:
        run = self._runs.pop(workflow_id)
        deadline_s = run.deadline_s - run.began_s if run.deadline_s < NO_DEADLINE else None
        self.ring.add(
            RecentWorkflow(
                type=run.type,
                arrived_s=run.began_s,
                calls=tuple(run.calls),
                tenant=run.tenant,
                deadline_s=None if deadline_s is None else max(round(deadline_s, 3), 0.0),
                latency_s=None if run.failed else round(run.last_s - run.began_s, 4),
            )
        )


def _recorded(seen: _Seen, result: CallResult, now: float, began_s: float) -> RecentCall:
    """Return the record of an answered call; few engines say what their prefix cache had."""
    prompt = max(result.prompt_tokens or seen.call.prompt_tokens, 1)
    cached = seen.cached if result.cached_tokens is None else result.cached_tokens
    return RecentCall(
        stage=seen.call.stage,
        at_s=round(seen.since_s - began_s, 4),
        took_s=round(now - seen.since_s, 4),
        prompt=prompt,
        output=max(result.output_tokens or 1, 1),
        cached=None if cached is None else min(cached, prompt),
    )
