"""Seeded ReAct workflows: one agent that thinks, calls a tool, reads, and thinks again.

Every turn's prompt is the whole transcript so far: the prompt of the turn before, what it wrote
and what the tool answered. So contexts grow, prefixes are reused from turn to turn, and the
number of turns is the great unknown. Tools take no time. Lengths are plausible, not measured.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.sim.quantiles import Quantiles, quantiles
from hexgen_vllm.sim.workload import CallSpec, Layer, WorkflowSpec, generator, workflow_stream

TYPE: Final = "react"

TEMPLATE: Final = 1800  # tokens: rules and descriptions of tools
TASK: Final = quantiles((0, 40), (50, 180), (95, 900), (100, 1500))
OBSERVATION: Final = quantiles((0, 20), (50, 320), (90, 1500), (95, 2400), (100, 4000))
THOUGHT: Final = quantiles((0, 20), (50, 85), (95, 260), (100, 500))
ANSWER: Final = quantiles((0, 30), (50, 190), (95, 620), (100, 1100))
TURNS: Final[Quantiles] = quantiles((0, 2), (50, 6), (90, 13), (100, 22))


def react(
    count: int, *, seed: int, tenants: tuple[str, ...] = ("default",)
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    return tuple(_workflow(index, seed, tenants) for index in range(count))


def _workflow(index: int, seed: int, tenants: tuple[str, ...]) -> WorkflowSpec:
    rng, name = generator(seed, TYPE, index), f"{TYPE}-{seed}-{index}"
    template = Layer(f"template:{TYPE}", TEMPLATE)
    transcript, calls = TASK.draw(rng), []
    turns = TURNS.draw(rng)
    for turn in range(1, turns + 1):
        final = turn == turns
        output = (ANSWER if final else THOUGHT).draw(rng)
        layers = (template, Layer(workflow_stream(name), transcript))
        stage = "answer" if final else "act"
        calls.append(CallSpec(stage, TEMPLATE + transcript, output, layers))
        transcript += output + OBSERVATION.draw(rng)
    stages = tuple((call,) for call in calls)
    return WorkflowSpec(name, TYPE, stages, tenant=rng.choice(tenants))
