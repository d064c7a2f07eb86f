"""What no policy can beat, for a fleet and a workload.

- Standalone horizon of a workflow: its critical path alone on the fastest engine. A lower bound of
  its latency.
- Fluid capacity λ*: the highest rate at which work still fits into the engines if it can be split
  at will and every batch is full. With x_ej the share of calls of class j on engine e and c_ej the
  engine seconds of the class per workflow there::

      maximise λ   subject to   λ Σ_j x_ej c_ej <= 1 for every e,   Σ_e x_ej = 1,   x >= 0

  with c = prefill + output tokens x (step of a full batch / its size). Throughput beyond λ* is
  impossible, so policies differ in how close they come, and in latency below it.

Both with a cold cache (every prompt token is computed) and a perfect one (what another workflow's
call, or an earlier call of the same workflow, has computed is never computed again).

The linear programmes have a few dozen variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hexgen_vllm.errors import HexgenError
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.workloads.prompts import spans
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    WorkflowSpec,
    is_own,
    is_recorded,
)

_ZERO: Final = 1e-12
_MOST_PIVOTS: Final = 10_000
_TYPICAL_CONTEXT: Final = 4096  # only where a workload has no output at all


def maximise(
    gains: Sequence[float], rows: Sequence[Sequence[float]], bounds: Sequence[float]
) -> float:
    """Return the largest ``gains·x`` with ``rows·x <= bounds`` and ``x >= 0``.

    The simplex method with Bland's rule, which cannot cycle.

    Args:
        gains: one per variable.
        rows: one per constraint, each with one coefficient per variable.
        bounds: one per constraint, none negative, so that x = 0 is feasible.

    Raises:
        HexgenError: the programme is unbounded.
    """
    count, variables = len(rows), len(gains)
    table = [
        [*map(float, row), *(float(i == j) for j in range(count)), float(bounds[i])]
        for i, row in enumerate(rows)
    ]
    table.append([*(-g for g in gains), *([0.0] * (count + 1))])
    basis = [variables + i for i in range(count)]
    for _ in range(_MOST_PIVOTS):
        entering = next((j for j, v in enumerate(table[-1][:-1]) if v < -_ZERO), None)
        if entering is None:
            return table[-1][-1]
        ratios = [
            (table[i][-1] / table[i][entering], basis[i], i)
            for i in range(count)
            if table[i][entering] > _ZERO
        ]
        if not ratios:
            raise HexgenError("the linear programme is unbounded")
        leaving = min(ratios)[2]
        _pivot(table, leaving, entering)
        basis[leaving] = entering
    raise HexgenError("the linear programme was not solved")


def _pivot(table: list[list[float]], leaving: int, entering: int) -> None:
    pivot = table[leaving][entering]
    table[leaving] = [v / pivot for v in table[leaving]]
    for i, row in enumerate(table):
        factor = row[entering]
        if i != leaving and factor:
            table[i] = [a - factor * b for a, b in zip(row, table[leaving], strict=True)]


_Chooser = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one class of calls, per workflow."""

    uncached: float
    output: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one fleet and workload.

    Attributes:
        rate_per_s: λ*, workflows per second, with a perfect prefix cache.
        cold_rate_per_s: λ* without prefix cache.
        horizons_s: standalone horizon of every workflow, perfect cache, ascending.
        base_s: base SLO: mean critical path alone on the average engine without prefix cache.
    """

    rate_per_s: float
    cold_rate_per_s: float
    horizons_s: tuple[float, ...]
    base_s: float


class Uncontended(NamedTuple):
    """The critical path of a workflow that is alone, in seconds.

    Attributes:
        total_s: from its arrival to its end.
        work_s: of that, on engines; the rest are think times, which no engine makes shorter.
    """

    total_s: float
    work_s: float

    def deadline_s(self, scale: float) -> float:
        """Return ``scale`` times the work, and the think times once."""
        return self.total_s + (scale - 1.0) * self.work_s

    def scale(self, latency_s: float) -> float:
        """Return the least scale at which a workflow that took ``latency_s`` is on time."""
        return 1.0 + (latency_s - self.total_s) / self.work_s


def uncontended(models: Sequence[EngineModel], spec: WorkflowSpec) -> Uncontended:
    """Return the critical path of ``spec`` alone on the average engine.

    The prefix cache has nothing but what the workflow's own calls have computed.
    """
    return _path(models, spec, _new_tokens(spec, lambda stream: True, {}), _mean)


def limits(models: Sequence[EngineModel], workflows: Sequence[WorkflowSpec]) -> Limits:
    """Return the bounds of ``workflows`` on ``models``; neither may be empty."""
    seen: dict[int, int] = {}
    uncached = [uncached_tokens(spec, seen) for spec in workflows]
    cold = [[call.prompt_tokens for call in spec.calls()] for spec in workflows]
    context = _mean_context(workflows)
    horizons = sorted(_path_s(models, s, u, min) for s, u in zip(workflows, uncached, strict=True))
    paths = [_path_s(models, s, u, _mean) for s, u in zip(workflows, cold, strict=True)]
    return Limits(
        rate_per_s=capacity(models, _classes(workflows, uncached), context),
        cold_rate_per_s=capacity(models, _classes(workflows, cold), context),
        horizons_s=tuple(horizons),
        base_s=_mean(paths),
    )


def capacity(models: Sequence[EngineModel], classes: Sequence[Work], context: float) -> float:
    """Return λ* in workflows per second.

    Args:
        models: the fleet.
        classes: work per workflow, by class.
        context: mean tokens of a decoding sequence; limits full batches where KV is short.
    """
    kinds: dict[tuple[float, float], int] = {}
    for model in models:
        prefill_s = model.cost.p1 + model.cost.p0 / model.max_num_batched_tokens
        rates = (prefill_s, _token_s(model, context))
        kinds[rates] = kinds.get(rates, 0) + 1
    seconds = [[w.uncached * p + w.output * d for w in classes] for p, d in kinds]
    return _split(seconds, list(kinds.values()))


def _split(seconds: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """Solve the linear programme; ``seconds`` by kind of engine and class."""
    kinds, classes = len(seconds), len(seconds[0])
    variables = kinds * classes + 1  # flow of each class through each kind, then λ
    rows, bounds = [], []
    for kind in range(kinds):
        row = [0.0] * variables
        row[kind * classes : (kind + 1) * classes] = seconds[kind]
        rows.append(row)
        bounds.append(float(counts[kind]))
    for index in range(classes):
        row = [0.0] * variables
        row[index : kinds * classes : classes] = [-1.0] * kinds
        row[-1] = 1.0
        rows.append(row)
        bounds.append(0.0)
    return maximise([0.0] * (variables - 1) + [1.0], rows, bounds)


def uncached_tokens(spec: WorkflowSpec, seen: dict[int, int] | None = None) -> list[int]:
    """Return, per call, the prompt tokens that a perfect prefix cache does not hold.

    Args:
        spec: the workflow.
        seen: what earlier workflows of a trace have computed, kept up to date: what several of
            them share is there once the first has computed it. Templates and schemas always are.
    """

    def counts(stream: str) -> bool:
        return is_own(stream, spec.workflow_id) or is_recorded(stream)

    return _new_tokens(spec, counts, {} if seen is None else seen)


def _new_tokens(
    spec: WorkflowSpec, counts: Callable[[str], bool], seen: dict[int, int]
) -> list[int]:
    """Return, per call, what nobody has computed yet.

    Streams that do not count are there from the start.
    """
    found = []
    for call in spec.calls():
        left = call.own_tokens
        for layer, span in zip(call.layers, spans(call.layers), strict=True):
            if counts(layer.stream):
                left += max(layer.tokens - seen.get(span.key, 0), 0)
                seen[span.key] = max(layer.tokens, seen.get(span.key, 0))
        found.append(max(left, 1))
    return found


def solo_s(model: EngineModel, call: CallSpec, uncached: int) -> float:
    """Return the seconds of a call alone on an engine."""
    cost, context = model.cost, call.prompt_tokens + call.output_tokens / 2
    prefill_s = cost.prefill_s(
        uncached, call.prompt_tokens - uncached, model.max_num_batched_tokens
    )
    steps = -(-uncached // model.max_num_batched_tokens) + call.output_tokens - 1
    return prefill_s + cost.c0 * steps + (cost.c1 + cost.c2 * context) * (call.output_tokens - 1)


def _token_s(model: EngineModel, context: float) -> float:
    """Return the engine seconds of one output token in a full batch."""
    size = max(min(model.max_num_seqs, model.kv_tokens / context), 1.0)
    return model.cost.step_s(size, size * context) / size


def _path_s(
    models: Sequence[EngineModel],
    spec: WorkflowSpec,
    uncached: Sequence[int],
    among: _Chooser,
) -> float:
    """Return the critical path alone, each call at ``among`` of its times on the engines."""
    return _path(models, spec, uncached, among).total_s


def _path(
    models: Sequence[EngineModel],
    spec: WorkflowSpec,
    uncached: Sequence[int],
    among: _Chooser,
) -> Uncontended:
    """Return the critical path alone, with its think times."""
    ends: list[Uncontended] = []
    for call, tokens, before in zip(spec.calls(), uncached, spec.waits(), strict=True):
        start = max((ends[index] for index in before), default=Uncontended(0.0, 0.0))
        own_s = among([solo_s(m, call, tokens) for m in models])
        ends.append(Uncontended(start.total_s + call.think_s + own_s, start.work_s + own_s))
    return max(ends)


def _classes(
    workflows: Sequence[WorkflowSpec], uncached: Sequence[Sequence[int]]
) -> tuple[Work, ...]:
    """Return mean work per workflow by stage and template."""
    sums: dict[tuple[str, str], list[float]] = {}
    for spec, tokens in zip(workflows, uncached, strict=True):
        for call, new in zip(spec.calls(), tokens, strict=True):
            template = call.layers[0].stream if call.layers else ""
            total = sums.setdefault((call.stage, template), [0.0, 0.0])
            total[0] += new
            total[1] += call.output_tokens
    n = len(workflows)
    return tuple(Work(new / n, output / n) for _, (new, output) in sorted(sums.items()))


def _mean_context(workflows: Iterable[WorkflowSpec]) -> float:
    """Return the mean tokens of a decoding sequence, over decode steps."""
    area = output = 0.0
    for spec in workflows:
        for call in spec.calls():
            area += call.output_tokens * (call.prompt_tokens + call.output_tokens / 2)
            output += call.output_tokens
    return area / output if output else _TYPICAL_CONTEXT


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
