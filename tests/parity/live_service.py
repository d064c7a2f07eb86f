"""Workflows as clients of the router's live service, in time that is moved by hand.

Not the simulator's loop: clients and handlers are coroutines that wait for the service's futures,
as request handlers of the router do. Engines are simulated ones behind futures of their own.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from heapq import heappop, heappush
from typing import Any

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import Refused
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.router.service import Service
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.sim.policies import Policy
from hexgen_vllm.sim.simulator import (
    ARRIVAL,
    DELIVERY,
    STEP_END,
    TICK,
    SimOptions,
    engine_of,
)
from hexgen_vllm.sim.workloads.prompts import chunk_hashes, links
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.types import Call, CallResult, Decision, EngineSpec

_TURNS = 12  # of the event loop until everything that can go on has gone on


class Answer:
    """What a fake engine will say to one call."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.last: asyncio.Future[int] = loop.create_future()  # tokens that were cached


class LiveService:
    """A service, its clients and its engines."""

    def __init__(self, models: Iterable[EngineModel], policy: Policy, options: SimOptions) -> None:
        self.clock, self.options = ManualClock(0.0), options
        self.latencies: list[float] = []  # of workflows that were answered in full
        self.log: deque[tuple[float, Decision]] = deque()
        self.service = self._service(policy.dispatch)
        self.engines: dict[str, SimEngine] = {}
        self._timers: list[tuple[float, int, int, asyncio.Future[None]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._set = self._open = self._busy = 0
        for model in models:
            self._join(model, policy)

    async def play(
        self, specs: Iterable[WorkflowSpec], deadline_s: Callable[[WorkflowSpec], float]
    ) -> None:
        """Play workflows to their end."""
        for spec in specs:
            self._open += 1
            arrives = self._timer(spec.arrival_s, ARRIVAL)
            self._start(self._client(spec, deadline_s(spec), arrives))
        self._start(self._ticks(self._timer(self.options.report_interval_s, TICK)))
        await _settle()
        while self._timers:
            at_s, _, _, timer = heappop(self._timers)
            self.clock.reach(at_s)
            timer.set_result(None)
            await _settle()
            while self._busy:
                await asyncio.sleep(0)
        await asyncio.gather(*self._tasks)

    def _service(self, dispatch: DispatchOptions) -> Service:
        coordinator = Coordinator(dispatch)
        coordinator.log = self.log
        return Service(coordinator, self.clock, Ledger())

    def _join(self, model: EngineModel, policy: Policy) -> None:
        engine = engine_of(model, policy, self.options, seed=0)
        self.engines[model.engine_id] = engine
        slots, kv_tokens = model.max_num_seqs, model.kv_tokens
        self.service.engine_joined(
            EngineSpec(model.engine_id, frozenset(), policy.kind, slots, kv_tokens)
        )
        self.service.engine_reported(model.engine_id, engine.report())

    def _timer(self, at_s: float, priority: int) -> asyncio.Future[None]:
        self._set += 1
        timer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._timers, (at_s, priority, self._set, timer))
        return timer

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    # Clients

    async def _client(
        self, spec: WorkflowSpec, deadline_s: float, arrives: asyncio.Future[None]
    ) -> None:
        await arrives
        began_s, calls = self.clock.now(), 0
        due_s = began_s + deadline_s
        for group in spec.stages:
            numbered = enumerate(group, calls)
            calls += len(group)
            ended = await asyncio.gather(*(self._call(spec, c, n, due_s) for n, c in numbered))
            if not all(ended):
                break
        else:
            self.latencies.append(self.clock.now() - began_s)
        self.service.workflow_finished(spec.workflow_id)
        self._open -= 1

    async def _call(self, spec: WorkflowSpec, call: CallSpec, number: int, due_s: float) -> bool:
        name, service = f"{spec.workflow_id}.{number}", self.service
        result = CallResult(ok=False, reason="abort")
        try:
            placement = await service.place(self._known(name, spec, call, due_s))
            engine, answer = self.engines[placement.engine_id], Answer()
            sequence = Sequence(
                placement,
                call.prompt_tokens,
                call.output_tokens,
                chain=links(call.layers, engine.model.block_size),
                tag=answer,
            )
            reaches = self._timer(self.clock.now() + self.options.router_latency_s, DELIVERY)
            self._start(self._deliver(engine, sequence, reaches))
            await answer.first
            service.started(name)
            result = CallResult(
                ok=True,
                prompt_tokens=call.prompt_tokens,
                cached_tokens=await answer.last,
                output_tokens=call.output_tokens,
            )
        except Refused as refused:
            result = CallResult(ok=False, reason=refused.reason)
        finally:
            service.finished(name, result)
        return result.ok

    def _known(self, name: str, spec: WorkflowSpec, call: CallSpec, due_s: float) -> Call:
        chunk = self.options.prefix_chunk_tokens
        return Call(
            name,
            spec.workflow_id,
            self.clock.now(),
            call.prompt_tokens,
            workflow_type=spec.type,
            stage=call.stage,
            tenant=spec.tenant,
            deadline_s=due_s,
            prefix=chunk_hashes(call.layers, chunk),
            prefix_chunk_tokens=chunk,
        )

    # Engines

    async def _deliver(
        self, engine: SimEngine, sequence: Sequence, reaches: asyncio.Future[None]
    ) -> None:
        await reaches
        before_s = engine.end_s
        engine.submit(sequence, self.clock.now())
        if engine.end_s != before_s:
            self._watch(engine)

    def _watch(self, engine: SimEngine) -> None:
        if engine.end_s < math.inf:
            self._start(self._step(engine, self._timer(engine.end_s, STEP_END)))

    async def _step(self, engine: SimEngine, ends: asyncio.Future[None]) -> None:
        await ends
        now = self.clock.now()
        if engine.end_s != now:
            return  # the stretch was cut
        started, finished = engine.step_ended(now)
        self._watch(engine)
        self._busy += 1
        for sequence in started:
            sequence.tag.first.set_result(None)
            await _settle()
        for sequence in finished:
            sequence.tag.last.set_result(sequence.cached_tokens)
            await _settle()
        self._busy -= 1

    async def _ticks(self, ticks: asyncio.Future[None]) -> None:
        while True:
            await ticks
            now = self.clock.now()
            for name, engine in self.engines.items():
                self.service.engine_reported(name, engine.report())
                for sequence, tokens in engine.progressed(now):
                    self.service.progressed(sequence.call_id, tokens)
            self.service.tick()
            self._busy += 1
            await _settle()
            self._busy -= 1
            if not self._open:
                return
            ticks = self._timer(now + self.options.report_interval_s, TICK)


async def _settle() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
