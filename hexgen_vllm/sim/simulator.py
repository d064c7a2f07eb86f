"""Plays workflows on simulated engines behind the live router's state machine.

The :class:`~hexgen_vllm.policy.coordinator.Coordinator` gets the same events as from the router:
calls arrive, start, progress and finish, engines report; its decisions are carried out. What is
left out is everything that takes no policy: HTTP, tokenizing, failures.

Virtual time is a heap of events in a total order: they run in order of (time, priority, insertion).
Two runs that insert the same events run them in the same order, so that equal seeds give equal
results to the last bit.

An oracle knows the true path after every call, in place of learned shapes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from typing import Any, Final

from hexgen_vllm.errors import HexgenError
from hexgen_vllm.option import check, option
from hexgen_vllm.policy.calls import NOTHING, Tail, path_weight
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.cost import CostFit
from hexgen_vllm.policy.engine_load import solo_speed
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.sim.engine.engine import SimEngine, StepObserver
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.sim.policies import Policy
from hexgen_vllm.sim.workloads.prompts import chunk_hashes, links
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    WorkflowSpec,
    generator,
)
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineKind,
    EngineSpec,
    Placement,
    Role,
)

# What happens first when times are equal: an engine ends its step before a call reaches it, as in
# vLLM, where outputs are handed out before new requests are looked at.
STEP_END: Final = 0
DELIVERY: Final = 1
ARRIVAL: Final = 2
TICK: Final = 3
Handler = Callable[[float, Any], None]
_COLLECT: Final = (100_000, 50, 100)  # objects, and collections of younger ones, between two
_IDLE_S: Final = 600.0  # without calls, telemetry is not read until so long before the next event


class EventLoop:
    """Runs handlers at their times.

    Attributes:
        now: the present moment, seconds; never goes back.
        events: events run so far.
    """

    __slots__ = ("_heap", "_inserted", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, int, Handler, Any]] = []
        self._inserted = 0

    def at(self, time_s: float, priority: int, handler: Handler, argument: Any = None) -> None:
        """Call ``handler(time_s, argument)`` at ``time_s``.

        Raises:
            HexgenError: the time is not a number or has passed; that is a defect of the caller.
        """
        if not self.now <= time_s < math.inf:
            raise HexgenError(f"an event at {time_s} s cannot be reached from {self.now} s")
        self._inserted += 1
        heappush(self._heap, (time_s, priority, self._inserted, handler, argument))

    def run(self, until_s: float = math.inf) -> None:
        """Run events until none is left or the next one is later than ``until_s``."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, _, handler, argument = heappop(heap)
            self.events += 1
            handler(self.now, argument)

    @property
    def next_s(self) -> float:
        """Time of the next event, infinite when there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(slots=True)
class WorkflowState:
    """A workflow that has begun.

    Attributes:
        spec: what it is.
        deadline_s: absolute deadline.
        group: group whose calls are open, -1 before the first.
        calls: calls sent so far.
        open_calls: calls that are under way, or whose think time is.
        graph: what is left of a workflow that is one, ``None`` for others.
        error: why it failed.
    """

    spec: WorkflowSpec
    deadline_s: float
    group: int = -1
    calls: int = 0
    open_calls: int = 0
    graph: _Graph | None = None
    error: str | None = None


class _Graph:
    """Which calls of a workflow wait for which; mutable, one for each workflow under way."""

    def __init__(self, spec: WorkflowSpec) -> None:
        self.calls = list(spec.calls())
        waits = spec.waits()
        self.missing = [len(before) for before in waits]
        self.followers: list[list[int]] = [[] for _ in waits]
        for index, before in enumerate(waits):
            for other in before:
                self.followers[other].append(index)

    def roots(self) -> list[int]:
        """Return the calls that wait for none."""
        return [index for index, count in enumerate(self.missing) if not count]

    def ended(self, index: int) -> list[int]:
        """Return the calls that waited for this one last."""
        ready = []
        for follower in self.followers[index]:
            self.missing[follower] -= 1
            if not self.missing[follower]:
                ready.append(follower)
        return ready


@dataclass(slots=True)
class SimCall:
    """A call between its arrival at the router and its end.

    Attributes:
        workflow: that it is part of.
        spec: what it is.
        sent_s: when it came to the router.
        engine: where it is.
        index: its place in a graph.
        rest: where it goes when ``engine`` has computed its prompt, if another is to answer.
        cached_tokens: prompt tokens that the engine which computed its prompt had, in that case.
    """

    workflow: WorkflowState
    spec: CallSpec
    sent_s: float
    engine: SimEngine | None = None
    index: int = 0
    rest: Placement | None = None
    cached_tokens: int | None = None


class SimRecorder:
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

    def answered(self, call: SimCall, sequence: Sequence, now: float) -> None:
        """Note that a call was answered."""
        self.prompt_tokens += sequence.prompt_tokens
        cached = call.cached_tokens
        self.cached_tokens += sequence.cached_tokens if cached is None else cached
        if self._keep_calls:
            first_s = sequence.first_token_s
            ttft_s = None if first_s is None else first_s - call.sent_s
            self.calls.append(_record(call, now, call.spec.output_tokens, ttft_s, None))

    def failed(self, call: SimCall, error: str, now: float) -> None:
        """Note that a call was refused."""
        if self._keep_calls:
            self.calls.append(_record(call, now, 0, None, error))


def _record(
    call: SimCall, now: float, output_tokens: int, ttft_s: float | None, error: str | None
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

    def learn_output(
        self, workflow_type: str, stage: str, output_tokens: int, ordinal: int | None = None
    ) -> None:
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
    calls = list(spec.calls())
    after = [NOTHING] * len(calls)
    if spec.is_graph:
        waits = spec.waits()
        for index in range(len(calls) - 1, -1, -1):
            path = _longer(after[index], calls[index])
            for before in waits[index]:
                after[before] = max(after[before], path, key=path_weight)
    else:
        tail, end = NOTHING, len(calls)
        for group in reversed(spec.stages):
            after[end - len(group) : end] = [tail] * len(group)
            end -= len(group)
            tail = max((_longer(tail, call) for call in group), key=path_weight)
    tails: dict[tuple[str, int], Tail] = {}
    counts: dict[str, int] = {}
    for call, tail in zip(calls, after, strict=True):
        ordinal = counts.get(call.stage, 0)
        counts[call.stage] = ordinal + 1
        tails[call.stage, ordinal] = tail
    return tails


def _longer(tail: Tail, call: CallSpec) -> Tail:
    return Tail(
        tail.calls + 1,
        tail.prefill_tokens + call.own_tokens,
        tail.output_tokens + call.output_tokens,
        tail.think_s + call.think_s,
    )


@dataclass(frozen=True)
class SimOptions:
    """Options of the simulated service around the engines."""

    router_latency_s: float = option(
        0.005, "from a call's arrival at the router to the engine, seconds", least=0.0
    )
    report_interval_s: float = option(
        0.5, "time between readings of engine telemetry and of progress, seconds", least=1e-3
    )
    prefix_chunk_tokens: int = option(
        256, "tokens of a chunk by which the router knows prompts", least=1
    )
    record_calls: bool = option(True, "keep a record of every call")
    rates: str = option(
        "fitted",
        "step costs that policies and engines of ours know: fitted to the engines' own steps, as "
        "live, or true; the paper's policy, oracle and fixed speeds are always true",
        choices=("fitted", "true"),
    )
    kv_transfer_rate: float = option(
        50_000.0, "tokens per second of KV that reach an engine of role decode", least=1.0
    )
    step_noise: float = option(
        0.03, "spread of step times around their cost, as a share of it", least=0.0, most=0.5
    )

    def __post_init__(self) -> None:
        check(self)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Let it be pickled, frozen and compiled as it may be."""
        return SimOptions, tuple(getattr(self, one.name) for one in fields(self))


def engine_of(
    model: EngineModel,
    policy: Policy,
    options: SimOptions,
    seed: int,
    observer: StepObserver | None = None,
) -> SimEngine:
    """Return an engine as a simulation has it, in a state that depends on the arguments alone."""
    noise = None
    if options.step_noise > 0:
        noise = options.step_noise, generator(seed, f"steps of {model.engine_id}")
    return SimEngine(
        model,
        policy.engine,
        stock=policy.kind is not EngineKind.HEXGEN,
        observer=observer,
        fit=CostFit() if options.rates == "fitted" and policy.learns_rates else None,
        noise=noise,
    )


class Simulation:
    """One run: one policy, one fleet, one workload.

    Attributes:
        coordinator: the router's state machine.
        engines: by name.
        records: of what has ended.

    Args:
        models: the fleet.
        policy: what is measured.
        deadline_s: seconds that a workflow has from its arrival.
        options: the service around the engines.
        observer: sees every engine step.
        seed: of the noise in step times.
    """

    def __init__(
        self,
        models: Iterable[EngineModel],
        policy: Policy,
        deadline_s: Callable[[WorkflowSpec], float],
        options: SimOptions | None = None,
        *,
        observer: StepObserver | None = None,
        seed: int = 0,
    ) -> None:
        self._options, self._policy, self._deadline_s = options or SimOptions(), policy, deadline_s
        self._loop = EventLoop()
        self._truth = TruthShapes() if policy.oracle else None
        self.coordinator = Coordinator(policy.dispatch, self._truth)
        self.engines = {
            m.engine_id: engine_of(m, policy, self._options, seed, observer) for m in models
        }
        self.records = SimRecorder(keep_calls=self._options.record_calls)
        self._pending: dict[str, SimCall] = {}
        self._source: Iterator[WorkflowSpec] = iter(())
        self._progress: Callable[[int], None] | None = None
        self._open = 0
        self._more = False

    @property
    def events(self) -> int:
        """Events run so far."""
        return self._loop.events

    @property
    def workflows(self) -> list[WorkflowRecord]:
        """Records of workflows, in order of ending."""
        return self.records.workflows

    @property
    def calls(self) -> list[CallRecord]:
        """Records of calls, in order of ending."""
        return self.records.calls

    @property
    def now(self) -> float:
        """The present moment."""
        return self._loop.now

    def run(
        self, workflows: Iterable[WorkflowSpec], progress: Callable[[int], None] | None = None
    ) -> None:
        """Play ``workflows``, which are in order of arrival, until the last one has ended.

        Args:
            workflows: may be a generator; each is taken when the one before has arrived.
            progress: called with the number of workflows that have ended, each time one does.
        """
        self._progress = progress
        self._source = iter(workflows)
        for engine in self.engines.values():
            self._carry_out(self.coordinator.engine_joined(self._spec(engine.model), 0.0), 0.0)
            self.coordinator.engine_reported(engine.model.engine_id, engine.report())
        self._expect_next()
        self._loop.at(self._options.report_interval_s, TICK, self._tick)
        # A run makes no cycles. To look for some as often as usual takes an eighth of its time.
        usual = gc.get_threshold()
        gc.set_threshold(*_COLLECT)
        try:
            self._loop.run()
        finally:
            gc.set_threshold(*usual)

    def _spec(self, model: EngineModel) -> EngineSpec:
        return EngineSpec(
            model.engine_id,
            kind=self._policy.kind,
            max_num_seqs=model.max_num_seqs,
            kv_tokens=model.kv_tokens,
            speed=solo_speed(model.cost),
            role=Role(model.role) if self._policy.roles else Role.BOTH,
        )

    # Workflows

    def _expect_next(self) -> None:
        spec = next(self._source, None)
        self._more = spec is not None
        if spec is not None:
            self._loop.at(spec.arrival_s, ARRIVAL, self._arrive, spec)

    def _arrive(self, now: float, spec: WorkflowSpec) -> None:
        self._expect_next()
        self._open += 1
        if self._truth is not None:
            self._truth.reveal(spec)
        workflow = WorkflowState(spec, now + self._deadline_s(spec))
        if spec.is_graph:
            workflow.graph = _Graph(spec)
            self._start(workflow, workflow.graph, workflow.graph.roots(), now)
        else:
            self._next_group(workflow, now)

    def _next_group(self, workflow: WorkflowState, now: float) -> None:
        workflow.group += 1
        if workflow.group == len(workflow.spec.stages) or workflow.error is not None:
            self._end_workflow(workflow, now)
            return
        group = workflow.spec.stages[workflow.group]
        workflow.open_calls = len(group)
        for call in group:
            self._think(workflow, call, 0, now)

    def _start(
        self, workflow: WorkflowState, graph: _Graph, ready: Iterable[int], now: float
    ) -> None:
        """Start calls of a graph."""
        for index in ready:
            workflow.open_calls += 1
            self._think(workflow, graph.calls[index], index, now)

    def _think(self, workflow: WorkflowState, call: CallSpec, index: int, now: float) -> None:
        """Send a call when its think time is over."""
        if call.think_s > 0:
            told = workflow, call, index
            self._loop.at(now + call.think_s, ARRIVAL, self._thought, told)
        else:
            self._send(workflow, call, index, now)

    def _thought(self, now: float, told: tuple[WorkflowState, CallSpec, int]) -> None:
        workflow, call, index = told
        if workflow.error is None:
            self._send(workflow, call, index, now)
        else:
            self._call_over(workflow, index, now)

    def _end_workflow(self, workflow: WorkflowState, now: float) -> None:
        spec = workflow.spec
        self.coordinator.workflow_finished(spec.workflow_id)
        if self._truth is not None:
            self._truth.forget(spec.workflow_id)
        self._open -= 1
        self.records.workflow_ended(workflow, now)
        if self._progress is not None:
            self._progress(len(self.records.workflows))

    # Calls

    def _send(self, workflow: WorkflowState, spec: CallSpec, index: int, now: float) -> None:
        call_id = f"{workflow.spec.workflow_id}.{workflow.calls}"
        workflow.calls += 1
        self._pending[call_id] = SimCall(workflow, spec, now, index=index)
        call = Call(
            call_id=call_id,
            workflow_id=workflow.spec.workflow_id,
            arrived_s=now,
            prompt_tokens=spec.prompt_tokens,
            workflow_type=workflow.spec.type if self._truth is None else workflow.spec.workflow_id,
            stage=spec.stage,
            tenant=workflow.spec.tenant,
            deadline_s=workflow.deadline_s,
            expected_output_tokens=None if self._truth is None else spec.output_tokens,
            prefix=chunk_hashes(spec.layers, self._options.prefix_chunk_tokens),
            prefix_chunk_tokens=self._options.prefix_chunk_tokens,
        )
        self._carry_out(self.coordinator.call_arrived(call, now), now)

    def _carry_out(self, decisions: Iterable[Decision], now: float) -> None:
        for decision in decisions:
            if isinstance(decision, Placement):
                self._dispatch(decision, now)
            else:
                self._fail(decision.call_id, decision.reason, now)

    def _dispatch(self, placement: Placement, now: float) -> None:
        pending = self._pending[placement.call_id]
        first = placement.prefill
        pending.rest = None if first is None else placement
        pending.cached_tokens = None
        output = pending.spec.output_tokens if first is None else 1
        sequence = self._sequence(pending, first or placement, output)
        at = now + self._options.router_latency_s
        self._loop.at(at, DELIVERY, self._deliver, sequence)

    def _sequence(
        self, pending: SimCall, placement: Placement, output_tokens: int, loaded_tokens: int = 0
    ) -> Sequence:
        """Return a call as the engine gets it that it is placed on."""
        pending.engine = engine = self.engines[placement.engine_id]
        return Sequence(
            placement,
            pending.spec.prompt_tokens,
            output_tokens,
            chain=links(pending.spec.layers, engine.model.block_size),
            tag=pending,
            loaded_tokens=loaded_tokens,
        )

    def _hand_over(self, sequence: Sequence, placement: Placement, now: float) -> None:
        """Move the KV of a prompt that has been computed to the engine that answers."""
        pending, prompt = sequence.tag, sequence.prompt_tokens
        pending.rest, pending.cached_tokens = None, sequence.cached_tokens
        result = CallResult(True, prompt, sequence.cached_tokens, 1)
        self._carry_out(self.coordinator.call_prefilled(sequence.call_id, result, now), now)
        rest = self._sequence(pending, placement, pending.spec.output_tokens, prompt - 1)
        pool, size = pending.engine.batch.pool, pending.engine.model.block_size
        there = pool.lookup(rest.holding.chain, (prompt - 1) // size).blocks * size
        took_s = (prompt - there) / self._options.kv_transfer_rate
        at = now + took_s + self._options.router_latency_s
        self._loop.at(at, DELIVERY, self._deliver, rest)

    def _deliver(self, now: float, sequence: Sequence) -> None:
        engine = sequence.tag.engine
        if not engine.fits(sequence):
            result = CallResult(ok=False, reason="too-long")
            self._carry_out(self.coordinator.call_finished(sequence.call_id, result, now), now)
            self._fail(sequence.call_id, "too-long", now)
            return
        before_s = engine.end_s
        engine.submit(sequence, now)
        if engine.end_s != before_s:
            self._loop.at(engine.end_s, STEP_END, self._step_ended, engine)

    def _fail(self, call_id: str, reason: str, now: float) -> None:
        pending = self._pending.pop(call_id)
        pending.workflow.error = reason
        self.records.failed(pending, reason, now)
        self._call_over(pending.workflow, pending.index, now)

    def _call_over(self, workflow: WorkflowState, index: int, now: float) -> None:
        graph = workflow.graph
        workflow.open_calls -= 1
        if graph is not None and workflow.error is None:
            self._start(workflow, graph, graph.ended(index), now)
        if not workflow.open_calls:
            if graph is None:
                self._next_group(workflow, now)
            else:
                self._end_workflow(workflow, now)

    # Engines

    def _step_ended(self, now: float, engine: SimEngine) -> None:
        if engine.end_s != now:
            return  # the stretch was cut after this event was set
        started, finished = engine.step_ended(now)
        if engine.end_s < math.inf:
            self._loop.at(engine.end_s, STEP_END, self._step_ended, engine)
        for sequence in started:
            if sequence.tag.rest is None:
                self.coordinator.call_started(sequence.call_id, now)
        for sequence in finished:
            if sequence.tag.rest is None:
                self._answered(sequence, now)
            else:
                self._hand_over(sequence, sequence.tag.rest, now)

    def _answered(self, sequence: Sequence, now: float) -> None:
        pending = self._pending.pop(sequence.call_id)
        spec = pending.spec
        result = CallResult(
            ok=True,
            prompt_tokens=spec.prompt_tokens,
            cached_tokens=sequence.cached_tokens,
            output_tokens=spec.output_tokens,
        )
        decisions = self.coordinator.call_finished(sequence.call_id, result, now)
        self.records.answered(pending, sequence, now)
        self._carry_out(decisions, now)
        self._call_over(pending.workflow, pending.index, now)

    def _tick(self, now: float, _: None) -> None:
        """Read telemetry and progress, as the router does."""
        coordinator = self.coordinator
        for name, engine in self.engines.items():
            coordinator.engine_reported(name, engine.report())
            for sequence, tokens in engine.progressed(now):
                coordinator.call_progressed(sequence.call_id, tokens, now)
        self._carry_out(coordinator.tick(now), now)
        if self._open or self._more:
            at = now + self._options.report_interval_s
            if not self._pending:
                at = max(at, self._loop.next_s - _IDLE_S)
            self._loop.at(at, TICK, self._tick)
