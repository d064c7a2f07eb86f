"""Seeded map–reduce workflows: a document is split, parts are summarised in parallel, then joined.

The width of the fan-out varies from document to document, and a stage ends with its slowest part:
what counts is the longest of many, not the mean. Lengths are plausible, not measured.
"""

from __future__ import annotations

from typing import Final

from hexgen_vllm.sim.quantiles import quantiles
from hexgen_vllm.sim.workload import CallSpec, Layer, WorkflowSpec, generator

TYPE: Final = "map_reduce"

MAP_TEMPLATE: Final = 420
REDUCE_TEMPLATE: Final = 380
PARTS: Final = quantiles((0, 3), (50, 8), (90, 16), (100, 24))
PART: Final = quantiles((0, 900), (50, 3200), (100, 4000))
SUMMARY: Final = quantiles((0, 60), (50, 190), (95, 360), (100, 480))
JOINED: Final = quantiles((0, 180), (50, 460), (95, 900), (100, 1200))


def map_reduce(
    count: int, *, seed: int, tenants: tuple[str, ...] = ("default",)
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    return tuple(_workflow(index, seed, tenants) for index in range(count))


def _workflow(index: int, seed: int, tenants: tuple[str, ...]) -> WorkflowSpec:
    rng, name = generator(seed, TYPE, index), f"{TYPE}-{seed}-{index}"
    template = (Layer(f"template:{TYPE}/map", MAP_TEMPLATE),)
    parts = tuple(
        CallSpec("map", MAP_TEMPLATE + PART.draw(rng), SUMMARY.draw(rng), template)
        for _ in range(PARTS.draw(rng))
    )
    summaries = sum(part.output_tokens for part in parts)
    reduce = CallSpec(
        "reduce",
        REDUCE_TEMPLATE + summaries,
        JOINED.draw(rng),
        (Layer(f"template:{TYPE}/reduce", REDUCE_TEMPLATE),),
    )
    return WorkflowSpec(name, TYPE, (parts, (reduce,)), tenant=rng.choice(tenants))
