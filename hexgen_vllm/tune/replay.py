"""From recent workflows to workflows that the simulator can play.

Lengths and timings are recorded, contents are not. Calls that overlapped in time were parallel.
What prompts share follows from what prefix caches had of them: half of all calls of a stage found
its template, so the template is as long as the median hit; what a call found beyond it is taken
for the workflow's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workloads.trace import read_trace, resample
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    Layer,
    WorkflowSpec,
    generator,
    renamed,
    workflow_stream,
)
from hexgen_vllm.tune.recent import RecentCall, RecentWorkflow, parse

_SAME_TIME_S = 1e-6


class Recent:
    """Workflows to draw from, with what the recording says of rate and deadline.

    Attributes:
        specs: the workflows.
        rate_per_s: mean arrivals, ``None`` when the recording has no times.
        deadline_s: median deadline, ``None`` when none was recorded.
        latencies_s: as recorded, ``None`` for workflows that did not finish.
    """

    def __init__(self, specs: Sequence[WorkflowSpec], recorded: Sequence[RecentWorkflow]) -> None:
        self.specs = tuple(specs)
        self.rate_per_s = _rate(recorded)
        deadlines = [w.deadline_s for w in recorded if w.deadline_s is not None]
        self.deadline_s = median(deadlines) if deadlines else None
        self.latencies_s = [w.latency_s for w in recorded]

    def draw(self, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
        """Return ``count`` workflows drawn with replacement, all arriving at 0."""
        if len({spec.tenant for spec in self.specs}) == 1:
            return resample(self.specs, count, seed=seed)
        rng = generator(seed, "recent")
        return tuple(renamed(rng.choice(self.specs), f"recent-{seed}-{i}") for i in range(count))


class Generated(Recent):
    """The generated text-to-SQL workload, for a fleet that has served nothing yet."""

    def __init__(self, options: Text2SqlOptions | None = None) -> None:
        super().__init__((), ())
        self._options = options

    def draw(self, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
        """Return ``count`` generated workflows, all arriving at 0."""
        return text2sql(count, seed=seed, options=self._options or Text2SqlOptions())


def read(path: Path) -> Recent:
    """Read a ``.jsonl`` file of recent workflows, or any other file as a public trace.

    Raises:
        ConfigError: the file cannot be read or is wrong; names the place.
    """
    if path.suffix != ".jsonl":
        return Recent(read_trace(path), ())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    return from_recorded(parse(lines, str(path)))


def from_recorded(recorded: Sequence[RecentWorkflow]) -> Recent:
    """Return recorded workflows as a source of workload."""
    templates = _templates(recorded)
    return Recent([_spec(f"recent-{i}", w, templates) for i, w in enumerate(recorded)], recorded)


def _rate(recorded: Sequence[RecentWorkflow]) -> float | None:
    times = [w.arrived_s for w in recorded]
    if len(times) < 2 or max(times) <= min(times):
        return None
    return (len(times) - 1) / (max(times) - min(times))


def _templates(recorded: Iterable[RecentWorkflow]) -> dict[tuple[str, str], int]:
    """Return the length of the template of every (type, stage)."""
    hits: dict[tuple[str, str], list[int]] = {}
    shortest: dict[tuple[str, str], int] = {}
    for workflow in recorded:
        for call in workflow.calls:
            key = workflow.type, call.stage
            hits.setdefault(key, []).append(min(call.cached or 0, call.prompt - 1))
            shortest[key] = min(call.prompt - 1, shortest.get(key, call.prompt))
    return {key: min(round(median(values)), shortest[key]) for key, values in hits.items()}


def _spec(
    workflow_id: str, recorded: RecentWorkflow, templates: dict[tuple[str, str], int]
) -> WorkflowSpec:
    return WorkflowSpec(
        workflow_id,
        recorded.type,
        tuple(
            tuple(_call(workflow_id, recorded.type, call, templates) for call in group)
            for group in groups(recorded.calls)
        ),
        tenant=recorded.tenant,
    )


def _call(
    workflow_id: str, kind: str, call: RecentCall, templates: dict[tuple[str, str], int]
) -> CallSpec:
    template = templates[kind, call.stage]
    own = max(min(call.cached or 0, call.prompt - 1) - template, 0)
    layers = (
        Layer(f"template:{kind}/{call.stage}", template),
        Layer(workflow_stream(workflow_id), own),
    )
    kept = tuple(layer for layer in layers if layer.tokens)
    return CallSpec(call.stage, call.prompt, call.output, kept)


def groups(calls: Sequence[RecentCall]) -> list[tuple[RecentCall, ...]]:
    """Return calls in groups: what began before the last one had ended is parallel to it."""
    found: list[list[RecentCall]] = []
    end_s = 0.0
    for call in sorted(calls, key=lambda c: (c.at_s, c.stage)):
        if not found or call.at_s >= end_s - _SAME_TIME_S:
            found.append([call])
            end_s = call.at_s + call.took_s
        else:
            found[-1].append(call)
            end_s = max(end_s, call.at_s + call.took_s)
    return [tuple(group) for group in found]
