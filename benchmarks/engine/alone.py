"""One simulated engine without a router: workflows send their calls straight to it.

What the engine knows of a call is what a client says, and what it has learned itself; the
estimates are those of the live engine (:class:`hexgen_vllm.policy.outlook.Outlooks`). Beside our
scheduler stands stock vLLM, first come first served or by any number per call as its priority.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.calls import Tail
from hexgen_vllm.policy.cost import CostFit
from hexgen_vllm.policy.outlook import Outlook, Outlooks, without_deadline
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.sim.simulator import (
    ARRIVAL,
    DELIVERY,
    STEP_END,
    TICK,
    EventLoop,
)
from hexgen_vllm.sim.workloads.prompts import links
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec
from hexgen_vllm.types import NO_DEADLINE, Call, CallResult, Placement

_DELIVERY_S: Final = 0.002
_MEAN_WEIGHT: Final = 0.05
_NOISE: Final = 0.03

Rank = Callable[["Flow", CallSpec, Outlook], float]
"""Returns the stock priority of a call; lower is sooner."""


class Flow:
    """A workflow under way.

    Attributes:
        spec: what it is.
        asked_s: seconds until its deadline, ``inf`` for none.
        started_s: when it began.
        ended_s: when it ended, ``None`` before.
        served: output tokens that its ended calls wrote.
    """

    __slots__ = ("asked_s", "ended_s", "group", "open", "sent", "served", "spec", "started_s")

    def __init__(self, spec: WorkflowSpec, asked_s: float, started_s: float) -> None:
        self.spec, self.asked_s, self.started_s = spec, asked_s, started_s
        self.ended_s: float | None = None
        self.group, self.open, self.sent, self.served = -1, 0, 0, 0

    @property
    def deadline_s(self) -> float:
        """Its deadline, absolute seconds."""
        return self.started_s + self.asked_s

    @property
    def on_time(self) -> bool:
        """Whether it has ended by its deadline."""
        return self.ended_s is not None and self.ended_s <= self.deadline_s


class Alone:
    """Plays workflows on one engine.

    Attributes:
        engine: the engine.
        flows: workflows that have begun, in order of arrival.
        marks: written tokens by workflow type, at each moment that was asked for.
        prefill_tokens: prompt tokens of ended calls that were computed, not found.

    Args:
        model: what the engine is.
        options: our scheduler's options; ``None`` is stock vLLM.
        deadlines: seconds that workflows of a type have; others have no deadline.
        rank: stock vLLM's priority of a call; without one it serves first come, first served.
        estimates: ``learned`` as the live engine learns them, ``mean`` is one mean over all
            calls, ``true`` are the true lengths and tails.
        think: seconds that a workflow is away after a group of calls, by its number; without it
            the next group follows at once.
        keep_turns: KV of calls that ended stays in host memory for the next call of their
            workflow, which has to be one that follows it and repeats its text; memory is taken
            for unlimited, and needs ``model.kv_copy_tokens_per_s``.
    """

    def __init__(
        self,
        model: EngineModel,
        options: EngineOptions | None,
        deadlines: Callable[[WorkflowSpec], float],
        *,
        rank: Rank | None = None,
        estimates: str = "learned",
        think: Callable[[WorkflowSpec, int], float] | None = None,
        keep_turns: bool = False,
    ) -> None:
        stock = options is None
        order = EngineOptions(order="fcfs" if rank is None else "edf")
        fit = None if stock else CostFit()
        noise = (_NOISE, Random(0))
        self.engine = SimEngine(model, options or order, stock=stock, fit=fit, noise=noise)
        self.flows: list[Flow] = []
        self.marks: dict[float, dict[str, int]] = {}
        self.prefill_tokens = 0
        self._ours, self._deadlines, self._rank, self._estimates = (
            not stock, deadlines, rank, estimates,
        )  # fmt: skip
        self._think, self._keep_turns = think, keep_turns
        self._outlooks = Outlooks()
        self._mean = 256.0
        self._loop = EventLoop()
        self._open: dict[str, Sequence] = {}
        self._written: dict[str, int] = {}

    def run(self, specs: Iterable[WorkflowSpec], until_s: float, marks: Iterable[float]) -> None:
        """Play ``specs`` until ``until_s`` and note what is written at the ``marks``."""
        for spec in specs:
            self._loop.at(spec.arrival_s, ARRIVAL, self._arrive, spec)
        for at_s in marks:
            self._loop.at(at_s, TICK, self._mark, None)
        self._loop.run(until_s)

    def _mark(self, now: float, _: object) -> None:
        found = dict(self._written)
        for sequence in self._open.values():
            flow: Flow = sequence.tag[0]
            tokens = self.engine.batch.clock.tokens(sequence) - sequence.prompt_tokens
            found[flow.spec.type] = found.get(flow.spec.type, 0) + tokens
        self.marks[now] = found

    def _arrive(self, now: float, spec: WorkflowSpec) -> None:
        flow = Flow(spec, self._deadlines(spec), now)
        self.flows.append(flow)
        self._next(flow, now)

    def _next(self, flow: Flow, now: float) -> None:
        flow.group += 1
        if flow.group == len(flow.spec.stages):
            flow.ended_s = now
            return
        flow.open = len(flow.spec.stages[flow.group])
        for call in flow.spec.stages[flow.group]:
            self._send(flow, call, now)

    def _send(self, flow: Flow, spec: CallSpec, now: float) -> None:
        flow.sent += 1
        deadline_s = flow.deadline_s
        kind = flow.spec.type if deadline_s < NO_DEADLINE else without_deadline(flow.spec.type)
        call = Call(
            f"{flow.spec.workflow_id}.{flow.sent}",
            flow.spec.workflow_id,
            now,
            spec.prompt_tokens,
            kind,
            spec.stage,
            deadline_s=deadline_s,
            final=flow.group + 1 == len(flow.spec.stages) and flow.open == 1,
        )
        outlook = self._expected(flow, spec, self._outlooks.opened(call, now))
        if not self._ours:
            deadline_s = 0.0 if self._rank is None else self._rank(flow, spec, outlook)
        rates = self.engine.batch.pricing.rates
        placement = Placement(
            call.call_id,
            "e",
            "alone",
            deadline_s=deadline_s,
            tail_s=rates.tail_s(outlook.tail) if self._ours else 0.0,
            expected_output_tokens=outlook.usual_tokens,
        )
        sequence = Sequence(
            placement,
            spec.prompt_tokens,
            spec.output_tokens,
            chain=links(spec.layers, self.engine.model.block_size),
            tag=(flow, spec, call),
        )
        sequence.likely_most = outlook.most_tokens
        sequence.least_tail_s = rates.tail_s(outlook.least_tail)
        sequence.routed, sequence.began_s = False, outlook.began_s
        sequence.workflow_id, sequence.final = call.workflow_id, call.final
        if self._ours:
            sequence.tail_prefill_s = rates.tail_prefill_s(outlook.tail)
            sequence.tail_tokens = int(outlook.tail.output_tokens)
        if self._keep_turns and flow.group:
            before = flow.spec.stages[flow.group - 1][0]
            sequence.saved_tokens = before.prompt_tokens + before.output_tokens - 1
        self._loop.at(now + _DELIVERY_S, DELIVERY, self._deliver, sequence)

    def _expected(self, flow: Flow, spec: CallSpec, learned: Outlook) -> Outlook:
        if self._estimates == "mean":
            mean = max(int(self._mean), 1)
            nothing = Tail(0.0, 0.0, 0.0)
            return Outlook(mean, mean, nothing, nothing, learned.began_s)
        if self._estimates == "true":
            later = flow.spec.stages[flow.group + 1 :]
            tail = Tail(
                float(len(later)),
                float(sum(max(c.own_tokens for c in group) for group in later)),
                float(sum(max(c.output_tokens for c in group) for group in later)),
            )
            own = spec.output_tokens
            return Outlook(own, own, tail, tail, learned.began_s)
        return learned

    def _deliver(self, now: float, sequence: Sequence) -> None:
        before = self.engine.end_s
        self._open[sequence.call_id] = sequence
        self.engine.submit(sequence, now)
        if self.engine.end_s != before:
            self._loop.at(self.engine.end_s, STEP_END, self._stepped, None)

    def _stepped(self, now: float, _: object) -> None:
        engine = self.engine
        if engine.end_s != now:
            return  # the stretch was cut
        _, finished = engine.step_ended(now)
        if engine.end_s < math.inf:
            self._loop.at(engine.end_s, STEP_END, self._stepped, None)
        for sequence in finished:
            self._finish(sequence, now)

    def _finish(self, sequence: Sequence, now: float) -> None:
        del self._open[sequence.call_id]
        flow: Flow
        flow, spec, call = sequence.tag
        tokens = spec.output_tokens
        self._written[flow.spec.type] = self._written.get(flow.spec.type, 0) + tokens
        self._mean += _MEAN_WEIGHT * (tokens - self._mean)
        flow.served += tokens
        cached = max(sequence.cached_tokens, 0)
        self.prefill_tokens += spec.prompt_tokens - cached
        result = CallResult(True, spec.prompt_tokens, cached, tokens)
        self._outlooks.ended(call, sequence.expected_tokens, result, now)
        flow.open -= 1
        if flow.open:
            return
        away_s = 0.0
        if self._think is not None and flow.group + 1 < len(flow.spec.stages):
            away_s = self._think(flow.spec, flow.group)
        if away_s > 0:
            self._loop.at(now + away_s, ARRIVAL, self._back, flow)
        else:
            self._next(flow, now)

    def _back(self, now: float, flow: Flow) -> None:
        self._next(flow, now)


def rate(marks: Mapping[float, Mapping[str, int]], kind: str, from_s: float, to_s: float) -> float:
    """Return the tokens that calls of ``kind`` wrote per second between two marks."""
    written = marks[to_s].get(kind, 0) - marks[from_s].get(kind, 0)
    return written / (to_s - from_s)
