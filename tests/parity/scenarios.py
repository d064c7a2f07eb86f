"""Random engines and calls for comparing the simulated engine with vLLM's scheduler."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.workloads.workload import Layer
from hexgen_vllm.types import StepCost

BLOCK_SIZE = 16
MAX_MODEL_LEN = 1024
MOST_OUTPUT = 60


@dataclass(frozen=True)
class Arrival:
    """A call that reaches the engine."""

    call_id: str
    at_s: float
    prompt_tokens: int
    output_tokens: int
    layers: tuple[Layer, ...]
    deadline_s: float
    tail_s: float
    expected_tokens: int

    def prompt(self) -> list[int]:
        """Token ids; layers of one stream have equal ids, the rest is the call's own."""
        ids = [
            random.Random(f"{stream}/{position}").randrange(2, 900)
            for stream, tokens in self.layers
            for position in range(tokens)
        ]
        own = random.Random(self.call_id)
        return ids + [own.randrange(2, 900) for _ in range(self.prompt_tokens - len(ids))]


@dataclass(frozen=True)
class EngineScenario:
    """One engine and what reaches it."""

    model: EngineModel
    arrivals: tuple[Arrival, ...]


def draw(seed: int, *, calls: int = 40, tight: bool | None = None) -> EngineScenario:
    """Return a scenario; with ``tight`` KV calls lose their place; ``None`` leaves it to chance."""
    rng = random.Random(seed)
    tight = rng.random() < 0.5 if tight is None else tight
    longest = rng.choice((60, 200, 400))
    needed = -(-(max(longest // 2, 40) + 64 + longest + MOST_OUTPUT) // BLOCK_SIZE)
    model = EngineModel(
        "engine",
        StepCost(c0=0.02, c1=5e-4, c2=2e-7, p0=1e-3, p1=1e-4, p2=1e-8),
        max_num_seqs=rng.choice((2, 4, 8, 16)),
        max_num_batched_tokens=rng.choice((32, 64, 128, 256)),
        kv_tokens=BLOCK_SIZE * (needed + rng.randint(0, 12) if tight else rng.randint(300, 600)),
        block_size=BLOCK_SIZE,
        prefix_caching=rng.random() < 0.7,
    )
    pace = rng.choice((0.02, 0.1, 0.5))
    at_s, arrivals = 0.0, []
    for index in range(calls):
        at_s += rng.expovariate(1 / pace)
        arrivals.append(_arrival(rng, index, at_s, longest))
    return EngineScenario(model, tuple(arrivals))


def _arrival(rng: random.Random, index: int, at_s: float, longest: int) -> Arrival:
    layers = []
    if rng.random() < 0.6:
        layers.append(Layer(f"template{rng.randrange(3)}", rng.choice((16, 40, longest // 2))))
        if rng.random() < 0.5:
            layers.append(Layer(f"schema{rng.randrange(2)}", rng.choice((7, 32, 64))))
    shared = sum(layer.tokens for layer in layers)
    output = rng.randint(1, MOST_OUTPUT)
    return Arrival(
        call_id=f"call{index}",
        at_s=at_s,
        prompt_tokens=shared + rng.randint(1, longest),
        output_tokens=output,
        layers=tuple(layers),
        deadline_s=at_s + rng.uniform(0.5, 20.0),
        tail_s=rng.choice((0.0, rng.uniform(0.0, 5.0))),
        expected_tokens=max(1, round(output * rng.uniform(0.5, 2.0))),
    )
