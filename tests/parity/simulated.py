"""One scenario through the simulated engine: what each step did."""

from __future__ import annotations

import math
from typing import NamedTuple

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.sequence import Sequence
from hexgen_vllm.sim.workloads.prompts import links
from hexgen_vllm.types import Placement
from tests.parity.scenarios import Arrival, EngineScenario


class Step(NamedTuple):
    """What one step did: tokens by call, and who was preempted for it."""

    tokens: dict[str, int]
    preempted: frozenset[str]
    at_s: float


class Log(NamedTuple):
    """All steps that computed something, when each call ended, and what may excuse differences.

    ``copied`` counts KV blocks that two calls computed at the same time, which the simulated
    prefix cache keeps once and vLLM's twice.
    """

    steps: list[Step]
    ends_s: dict[str, float]
    copied: int = 0

    def decisions(self) -> list[tuple[dict[str, int], frozenset[str]]]:
        """What was decided, without times."""
        return [(step.tokens, step.preempted) for step in self.steps]

    def preemptions(self) -> int:
        return sum(len(step.preempted) for step in self.steps)


def simulated(
    scenario: EngineScenario,
    options: EngineOptions,
    *,
    stock: bool = False,
    single: bool = False,
    measured: bool = True,
) -> Log:
    """Run the simulated engine.

    Args:
        scenario: what to run.
        options: order and displacement.
        stock: stock vLLM.
        single: cut every stretch of equal steps down to one.
        measured: price calls by what the engine measures of itself, not by the assumed rates.
    """
    observer = StepLog()
    engine = SimEngine(scenario.model, options, stock=stock, observer=observer)
    if not measured:
        engine.batch.pricing.stepped = lambda *_: False  # type: ignore[method-assign]
    ends_s: dict[str, float] = {}
    waiting = list(reversed(scenario.arrivals))
    while waiting or engine.steps:
        if single and engine.steps > 1:
            engine.cut(engine.start_s)
        if waiting and (not engine.steps or waiting[-1].at_s < engine.end_s):
            arrival = waiting.pop()
            engine.submit(_sequence(arrival, scenario.model.block_size), arrival.at_s)
            continue
        now = engine.end_s
        _, finished = engine.step_ended(now)
        ends_s.update({sequence.call_id: now for sequence in finished})
    return Log(observer.steps, ends_s, engine.batch.pool.copied)


class StepLog:
    """Writes down what every step does."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def stepped(self, engine: SimEngine, start_s: float, steps: int) -> None:
        batch = engine.batch
        tokens = {s.call_id: s.chunk for s in batch.chunks}
        missed = set(map(id, batch.missed))
        for sequence in batch.running:
            if sequence.decoding and id(sequence) not in missed:
                tokens[sequence.call_id] = 1
        preempted = frozenset(s.call_id for s in batch.evicted)
        self.steps.append(Step(tokens, preempted, start_s))
        self.steps.extend(Step(tokens, frozenset(), math.nan) for _ in range(steps - 1))


def _sequence(arrival: Arrival, block_size: int) -> Sequence:
    placement = Placement(
        arrival.call_id,
        "engine",
        "test",
        deadline_s=arrival.deadline_s,
        tail_s=arrival.tail_s,
        expected_output_tokens=min(arrival.expected_tokens, arrival.output_tokens),
    )
    sequence = Sequence(
        placement,
        arrival.prompt_tokens,
        arrival.output_tokens,
        chain=links(arrival.layers, block_size),
    )
    sequence.most_tokens = arrival.output_tokens
    return sequence
