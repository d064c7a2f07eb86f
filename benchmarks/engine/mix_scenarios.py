"""What ``bench mix`` plays: interactive calls beside a backlog, few places, overload, agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    Layer,
    WorkflowSpec,
    generator,
    scaled,
    workflow_stream,
)
from hexgen_vllm.types import NO_DEADLINE, StepCost

CHAT, SQL, BATCH, SHORT, LONG, AGENT = "chat", "text2sql", "batch", "short", "long", "agent"
COPY_TOKENS_PER_S: Final = 250_000.0
"""KV of an 8B-class model to host memory and back at some 30 GB/s."""

_ON_S, _CYCLE_S = 12.0, 48.0
_BACKLOG: Final = 3000
_SYSTEM_TOKENS: Final = 800
_AGENTS_PER_S: Final = 0.1
_TOOLS_TOKENS, _MOST_CONTEXT = 3000, 96_000
_THINK_S: Final = 2.0


@dataclass(frozen=True)
class Mix:
    """A load on one engine.

    Attributes:
        engine: the engine.
        interactive: workflows with deadlines.
        batch: workflows without.
        deadlines_s: seconds that a workflow has, ``inf`` for none.
        from_s, to_s: what is measured: workflows that begin and are due between these moments.
        think: seconds that a workflow is away after a group of its calls.
    """

    engine: EngineModel
    interactive: tuple[WorkflowSpec, ...]
    batch: tuple[WorkflowSpec, ...]
    deadlines_s: Callable[[WorkflowSpec], float]
    from_s: float
    to_s: float
    think: Callable[[WorkflowSpec, int], float] | None = None

    @property
    def all(self) -> tuple[WorkflowSpec, ...]:
        """All workflows, in order of arrival."""
        return tuple(sorted((*self.interactive, *self.batch), key=lambda s: s.arrival_s))


def engine_8b(slots: int) -> EngineModel:
    """Return an engine with an 8B-class model: 8 ms a step, 20,000 prompt tokens a second."""
    cost = StepCost(c0=0.008, c1=3e-5, c2=5.7e-8, p0=0.0, p1=5e-5, p2=0.0)
    return EngineModel("e", cost, max_num_seqs=slots, kv_tokens=400_000)


def mixed(seed: int, *, slots: int, bursts: bool, seconds: float) -> Mix:
    """Return chat calls (8 s) and text-to-SQL workflows (20 s) beside a backlog of generations.

    Args:
        seed: of everything random.
        slots: calls in a full batch.
        bursts: 12 s at four times the rate, then 36 s of nothing; else all the time.
        seconds: until when it lasts.
    """
    times = seconds / 4 if bursts else seconds
    factor = 4.0 if bursts else 1.0
    interactive = _chats(seed, factor, times) + _sql(seed, 0.1 * factor, times)
    if bursts:
        interactive = [replace(one, arrival_s=_burst(one.arrival_s)) for one in interactive]
    due = {CHAT: 8.0, SQL: 20.0}
    return Mix(
        engine_8b(slots),
        tuple(interactive),
        tuple(_backlog(seed)),
        lambda spec: due.get(spec.type, NO_DEADLINE),
        60.0,
        seconds,
    )


def _burst(at_s: float) -> float:
    turn, rest = divmod(at_s, _ON_S)
    return turn * _CYCLE_S + rest


def _arrivals(seed: int, name: str, rate: float, seconds: float) -> list[float]:
    rng, at_s = generator(seed, "arrivals", name), 0.0
    found: list[float] = []
    while (at_s := at_s + rng.expovariate(rate)) <= seconds:
        found.append(at_s)
    return found


def _chats(seed: int, rate: float, seconds: float) -> list[WorkflowSpec]:
    rng = generator(seed, CHAT)
    found = []
    for i, at_s in enumerate(_arrivals(seed, CHAT, rate, seconds)):
        prompt, output = _SYSTEM_TOKENS + rng.randint(300, 2500), rng.randint(60, 340)
        call = CallSpec(CHAT, prompt, output, (Layer("system", _SYSTEM_TOKENS),))
        found.append(WorkflowSpec(f"chat-{seed}-{i}", CHAT, ((call,),), at_s))
    return found


def _sql(seed: int, rate: float, seconds: float) -> list[WorkflowSpec]:
    at = _arrivals(seed, SQL, rate, seconds)
    return [
        replace(scaled(spec, 0.3), arrival_s=at_s)
        for spec, at_s in zip(text2sql(len(at), seed=seed), at, strict=True)
    ]


def _backlog(seed: int) -> list[WorkflowSpec]:
    rng = generator(seed, BATCH)
    found = []
    for i in range(_BACKLOG):
        call = CallSpec(BATCH, rng.randint(300, 1500), rng.randint(2000, 8000))
        found.append(WorkflowSpec(f"batch-{seed}-{i}", BATCH, ((call,),), 0.001 * i))
    return found


def overload(seed: int, *, seconds: float) -> Mix:
    """Return more work than 16 places can do: one call in five is ten times as long.

    Each has 5 s and 30 ms for each of its tokens.
    """
    rng = generator(seed, "overload")
    model = replace(engine_8b(16))
    usual = 0.8 * 150 + 0.2 * 1500
    per_s = 16 / (usual * model.cost.step_s(16, 16 * 1500))
    found = []
    for i, at_s in enumerate(_arrivals(seed, "overload", 0.95 * per_s, seconds)):
        long = rng.random() < 0.2
        output = rng.randint(1000, 2000) if long else rng.randint(50, 250)
        kind = LONG if long else SHORT
        call = CallSpec(kind, rng.randint(300, 1500), output)
        found.append(WorkflowSpec(f"{kind}-{seed}-{i}", kind, ((call,),), at_s))
    return Mix(
        model,
        tuple(found),
        (),
        lambda spec: 5.0 + 0.03 * spec.stages[0][0].output_tokens,
        60.0,
        seconds,
    )


def agents(seed: int, *, seconds: float) -> Mix:
    """Return agents whose contexts grow to 30 or 100 thousand tokens, in 6 to 20 turns.

    A tool answers after 2 s in the mean, with 3,000 tokens in the median. One comes every 10 s in
    the mean, at random moments of ``seconds``; their number is fixed, because a tenth more of them
    is more than the engine can do. They have no deadline until :func:`dataclasses.replace` gives
    them one.
    """
    found, away = [], {}
    moments = generator(seed, "arrivals", AGENT)
    count = int(_AGENTS_PER_S * seconds)
    for i, at_s in enumerate(sorted(moments.uniform(0.0, seconds) for _ in range(count))):
        name = f"{AGENT}-{seed}-{i}"
        rng = generator(seed, name)
        context, turns, stages = rng.randint(2000, 8000), rng.randint(6, 20), []
        for turn in range(turns):
            last = turn + 1 == turns
            output = rng.randint(300, 900) if last else rng.randint(60, 300)
            layers = (Layer("tools", _TOOLS_TOKENS), Layer(workflow_stream(name), context))
            stage = "answer" if last else "act"
            stages.append((CallSpec(stage, _TOOLS_TOKENS + context, output, layers),))
            context = min(context + output + int(rng.lognormvariate(8.0, 0.7)), _MOST_CONTEXT)
        away[name] = [_THINK_S * rng.expovariate(1.0) for _ in range(turns)]
        found.append(WorkflowSpec(name, AGENT, tuple(stages), at_s))
    return Mix(
        replace(engine_8b(64), max_num_batched_tokens=8192),
        tuple(found),
        (),
        lambda _: NO_DEADLINE,
        0.0,
        5 * seconds,
        lambda spec, turn: away[spec.workflow_id][turn],
    )
