"""Seeded workflows of agents: ReAct, MAC-SQL, map and reduce, graphs, and tenants that mix them.

ReAct: one agent that thinks, calls a tool, reads, and thinks again.

Every turn's prompt is the whole transcript so far: the prompt of the turn before, what it wrote
and what the tool answered. So contexts grow, prefixes are reused from turn to turn, and the
number of turns is the great unknown. Tools take no time. Lengths are plausible, not measured.

MAC-SQL: three agents that write SQL one after the other.

Selector prunes the schema, decomposer writes SQL by sub-questions, refiner repairs it until it
runs: at most three rounds, most workflows need one. The selector and the decomposer see the
schema, the refiner sees what the decomposer wrote. Lengths follow the prompts of the published
method (MAC-SQL, arXiv 2312.11242) on BIRD: long few-shot templates, outputs of some hundred
tokens. They are plausible, not measured.

Map and reduce: a document is split, parts are summarised in parallel, then joined.

The width of the fan-out varies from document to document, and a stage ends with its slowest part:
what counts is the longest of many, not the mean. Lengths are plausible, not measured.

Graphs: a planner starts several agents, which go on by themselves and wait for each other.

A branch is a chain of calls, some after a tool; one in three of its calls also needs what another
branch has written. The answer waits for all of them. So calls do not come in groups, and the
longest way through is not the one with most calls. Lengths are plausible, not measured.

Mixed tenants: workflows of several types interleaved, each type sent by a tenant of its own.

Deadlines may then differ by tenant (``deadline: {tenants: {...}}``, in multiples of the base SLO
of the mix): short interactive loops beside long background jobs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from hexgen_vllm.sim.workloads.text2sql import (
    Quantiles,
    Text2SqlOptions,
    quantiles,
    schemas,
    text2sql,
)
from hexgen_vllm.sim.workloads.workload import (
    CallGroup,
    CallSpec,
    Layer,
    WorkflowSpec,
    generator,
    workflow_stream,
)

MAC_SQL: Final = "mac_sql"
TEMPLATES: Final = {"selector": 1450, "decomposer": 2350, "refiner": 620}
QUESTION: Final = quantiles((0, 20), (50, 140), (95, 420), (100, 560))
PRUNED: Final = quantiles((0, 250), (50, 800), (95, 1800), (100, 2400))
OUTPUT: Final[dict[str, Quantiles]] = {
    "selector": quantiles((0, 30), (50, 120), (95, 330), (100, 500)),
    "decomposer": quantiles((0, 90), (50, 330), (95, 760), (100, 1200)),
    "refiner": quantiles((0, 30), (50, 110), (95, 330), (100, 600)),
}
ROUNDS: Final = {1: 70, 2: 18, 3: 12}
MAP_REDUCE: Final = "map_reduce"
MAP_TEMPLATE: Final = 420
REDUCE_TEMPLATE: Final = 380
PARTS: Final = quantiles((0, 3), (50, 8), (90, 16), (100, 24))
PART: Final = quantiles((0, 900), (50, 3200), (100, 4000))
SUMMARY: Final = quantiles((0, 60), (50, 190), (95, 360), (100, 480))
JOINED: Final = quantiles((0, 180), (50, 460), (95, 900), (100, 1200))
REACT: Final = "react"
TEMPLATE: Final = 1800  # tokens: rules and descriptions of tools
TASK: Final = quantiles((0, 40), (50, 180), (95, 900), (100, 1500))
OBSERVATION: Final = quantiles((0, 20), (50, 320), (90, 1500), (95, 2400), (100, 4000))
THOUGHT: Final = quantiles((0, 20), (50, 85), (95, 260), (100, 500))
ANSWER: Final = quantiles((0, 30), (50, 190), (95, 620), (100, 1100))
TURNS: Final[Quantiles] = quantiles((0, 2), (50, 6), (90, 13), (100, 22))
DAG: Final = "dag"
DAG_TEMPLATES: Final = {"plan": 900, "work": 1200, "answer": 500}
BRANCHES: Final = {2: 30, 3: 40, 4: 20, 5: 10}
CHAIN: Final = {1: 25, 2: 35, 3: 25, 4: 15}
NEEDS_OTHER: Final = 1 / 3
USES_TOOL: Final = 1 / 2
TOOL_S: Final = (0.2, 3.0)
FOUND: Final = quantiles((0, 60), (50, 700), (90, 2200), (100, 4000))
WRITTEN: Final = quantiles((0, 20), (50, 140), (95, 480), (100, 800))
SHARES: Final[Mapping[str, float]] = {"analyst": 0.5, "agent": 0.3, "batch": 0.2}


def mac_sql(
    count: int, *, seed: int, options: Text2SqlOptions | None = None
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    options = options or Text2SqlOptions()
    layers, weights = zip(*schemas(options), strict=True)
    return tuple(_mac_sql_workflow(i, seed, layers, weights, options.tenants) for i in range(count))


def _mac_sql_workflow(
    index: int,
    seed: int,
    layers: tuple[Layer, ...],
    weights: tuple[float, ...],
    tenants: tuple[str, ...],
) -> WorkflowSpec:
    rng, name = generator(seed, MAC_SQL, index), f"{MAC_SQL}-{seed}-{index}"
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
    return WorkflowSpec(name, MAC_SQL, stages, tenant=rng.choice(tenants))


def _call(rng: random.Random, stage: str, shared: tuple[Layer, ...], own: int) -> CallSpec:
    layers = (Layer(f"template:{MAC_SQL}/{stage}", TEMPLATES[stage]), *shared)
    prompt = sum(layer.tokens for layer in layers) + own
    return CallSpec(stage, prompt, OUTPUT[stage].draw(rng), layers)


def map_reduce(
    count: int, *, seed: int, tenants: tuple[str, ...] = ("default",)
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    return tuple(_map_reduce_workflow(index, seed, tenants) for index in range(count))


def _map_reduce_workflow(index: int, seed: int, tenants: tuple[str, ...]) -> WorkflowSpec:
    rng, name = generator(seed, MAP_REDUCE, index), f"{MAP_REDUCE}-{seed}-{index}"
    template = (Layer(f"template:{MAP_REDUCE}/map", MAP_TEMPLATE),)
    parts = tuple(
        CallSpec("map", MAP_TEMPLATE + PART.draw(rng), SUMMARY.draw(rng), template)
        for _ in range(PARTS.draw(rng))
    )
    summaries = sum(part.output_tokens for part in parts)
    reduce = CallSpec(
        "reduce",
        REDUCE_TEMPLATE + summaries,
        JOINED.draw(rng),
        (Layer(f"template:{MAP_REDUCE}/reduce", REDUCE_TEMPLATE),),
    )
    return WorkflowSpec(name, MAP_REDUCE, (parts, (reduce,)), tenant=rng.choice(tenants))


def react(
    count: int, *, seed: int, tenants: tuple[str, ...] = ("default",)
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    return tuple(_react_workflow(index, seed, tenants) for index in range(count))


def _react_workflow(index: int, seed: int, tenants: tuple[str, ...]) -> WorkflowSpec:
    rng, name = generator(seed, REACT, index), f"{REACT}-{seed}-{index}"
    template = Layer(f"template:{REACT}", TEMPLATE)
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
    return WorkflowSpec(name, REACT, stages, tenant=rng.choice(tenants))


def dag(
    count: int, *, seed: int, tenants: tuple[str, ...] = ("default",)
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0; equal seeds give equal workflows."""
    return tuple(_dag_workflow(index, seed, tenants) for index in range(count))


def _dag_workflow(index: int, seed: int, tenants: tuple[str, ...]) -> WorkflowSpec:
    rng, name = generator(seed, DAG, index), f"{DAG}-{seed}-{index}"
    task = TASK.draw(rng)
    plan = _dag_call("plan", task, WRITTEN.draw(rng), ())
    chains = [
        rng.choices(tuple(CHAIN), tuple(CHAIN.values()))[0]
        for _ in range(rng.choices(tuple(BRANCHES), tuple(BRANCHES.values()))[0])
    ]
    stages: list[CallGroup] = [(plan,)]
    last = [0] * len(chains)  # of each branch: its last call, by its place in the workflow
    written = [task] * len(chains)
    count = 1
    for depth in range(max(chains)):
        group = []
        before = list(last)
        for branch, length in enumerate(chains):
            if depth >= length:
                continue
            after = {before[branch]}
            if depth and rng.random() < NEEDS_OTHER:
                after.add(before[rng.randrange(len(chains))])
            written[branch] += FOUND.draw(rng)
            think_s = rng.uniform(*TOOL_S) if rng.random() < USES_TOOL else 0.0
            stream = (Layer(workflow_stream(name, branch), written[branch]),)
            group.append(
                replace(
                    _dag_call("work", written[branch], WRITTEN.draw(rng), stream),
                    think_s=think_s,
                    after=tuple(sorted(after)),
                )
            )
            last[branch], count = count, count + 1
        stages.append(tuple(group))
    answer = _dag_call("answer", sum(written) // 4, JOINED.draw(rng), ())
    stages.append((replace(answer, after=tuple(sorted(set(last)))),))
    return WorkflowSpec(name, DAG, tuple(stages), tenant=rng.choice(tenants))


def _dag_call(stage: str, own: int, output: int, shared: tuple[Layer, ...]) -> CallSpec:
    layers = (Layer(f"template:{DAG}/{stage}", DAG_TEMPLATES[stage]), *shared)
    return CallSpec(stage, DAG_TEMPLATES[stage] + own, output, layers)


def mixed_tenants(
    count: int, *, seed: int, options: Text2SqlOptions | None = None
) -> tuple[WorkflowSpec, ...]:
    """Return ``count`` workflows, all arriving at 0, in a random order of tenants.

    Tenant ``analyst`` sends text-to-SQL, ``agent`` ReAct loops, ``batch`` map–reduce, at the
    shares of :data:`SHARES`.
    """
    makers: dict[str, Callable[[int], tuple[WorkflowSpec, ...]]] = {
        "analyst": lambda n: text2sql(n, seed=seed, options=options),
        "agent": lambda n: react(n, seed=seed),
        "batch": lambda n: map_reduce(n, seed=seed),
    }
    rng = generator(seed, "tenants")
    order = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=count)
    made = {tenant: iter(makers[tenant](order.count(tenant))) for tenant in SHARES}
    return tuple(replace(next(made[tenant]), tenant=tenant) for tenant in order)
