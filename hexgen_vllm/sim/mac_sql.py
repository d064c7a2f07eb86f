"""Seeded MAC-SQL workflows: three agents that write SQL one after the other.

Selector prunes the schema, decomposer writes SQL by sub-questions, refiner repairs it until it
runs: at most three rounds, most workflows need one. The selector and the decomposer see the
schema, the refiner sees what the decomposer wrote. Lengths follow the prompts of the published
method (MAC-SQL, arXiv 2312.11242) on BIRD: long few-shot templates, outputs of some hundred
tokens. They are plausible, not measured.
"""

from __future__ import annotations

import random
from typing import Final

from hexgen_vllm.sim.quantiles import Quantiles, quantiles
from hexgen_vllm.sim.text2sql import Text2SqlOptions, schemas
from hexgen_vllm.sim.workload import CallSpec, Layer, WorkflowSpec, generator, workflow_stream

TYPE: Final = "mac_sql"

TEMPLATES: Final = {"selector": 1450, "decomposer": 2350, "refiner": 620}
QUESTION: Final = quantiles((0, 20), (50, 140), (95, 420), (100, 560))
PRUNED: Final = quantiles((0, 250), (50, 800), (95, 1800), (100, 2400))
OUTPUT: Final[dict[str, Quantiles]] = {
    "selector": quantiles((0, 30), (50, 120), (95, 330), (100, 500)),
    "decomposer": quantiles((0, 90), (50, 330), (95, 760), (100, 1200)),
    "refiner": quantiles((0, 30), (50, 110), (95, 330), (100, 600)),
}
ROUNDS: Final = {1: 70, 2: 18, 3: 12}


def mac_sql(
    count: int, *, seed: int, options: Text2SqlOptions | None = None
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    options = options or Text2SqlOptions()
    layers, weights = zip(*schemas(options), strict=True)
    return tuple(_workflow(i, seed, layers, weights, options.tenants) for i in range(count))


def _workflow(
    index: int,
    seed: int,
    layers: tuple[Layer, ...],
    weights: tuple[float, ...],
    tenants: tuple[str, ...],
) -> WorkflowSpec:
    rng, name = generator(seed, TYPE, index), f"{TYPE}-{seed}-{index}"
    schema: Layer = rng.choices(layers, weights)[0]
    question, pruned = QUESTION.draw(rng), PRUNED.draw(rng)
    selector = _call(rng, "selector", (schema,), question)
    known = Layer(workflow_stream(name), pruned + question)
    decomposer = _call(rng, "decomposer", (known,), 5)
    written = Layer(known.stream, known.tokens + decomposer.output_tokens)
    rounds = rng.choices(tuple(ROUNDS), tuple(ROUNDS.values()))[0]
    refiners = [_call(rng, "refiner", (written,), rng.randint(40, 160)) for _ in range(rounds)]
    calls = (selector, decomposer, *refiners)
    stages = tuple((call,) for call in calls)
    return WorkflowSpec(name, TYPE, stages, tenant=rng.choice(tenants))


def _call(rng: random.Random, stage: str, shared: tuple[Layer, ...], own: int) -> CallSpec:
    layers = (Layer(f"template:{TYPE}/{stage}", TEMPLATES[stage]), *shared)
    prompt = sum(layer.tokens for layer in layers) + own
    return CallSpec(stage, prompt, OUTPUT[stage].draw(rng), layers)
