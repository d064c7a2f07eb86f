"""Recent workflows as a source of workload, with what was recorded of rates and deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workloads.trace import read_trace, resample
from hexgen_vllm.sim.workloads.traces.formats import AUTO, TraceSource
from hexgen_vllm.sim.workloads.traces.model import TraceWorkflow
from hexgen_vllm.sim.workloads.traces.played import reservoir
from hexgen_vllm.sim.workloads.traces.specs import compact, specs_of
from hexgen_vllm.sim.workloads.workload import WorkflowSpec, generator, renamed

_MOST: Final = 5_000  # workflows that are remembered of a long trace


class Recent:
    """Workflows to draw from, with what the recording says of rate and deadline.

    Attributes:
        specs: the workflows.
        rate_per_s: mean arrivals, ``None`` when the recording has no times.
        deadline_s: median deadline, ``None`` when none was recorded.
        latencies_s: as recorded, ``None`` for workflows that did not finish.

    Args:
        specs: the workflows.
        recorded: what was recorded of them.
        share: they are of all that were recorded.
    """

    def __init__(
        self,
        specs: Sequence[WorkflowSpec],
        recorded: Sequence[TraceWorkflow],
        *,
        share: float = 1.0,
    ) -> None:
        self.specs = tuple(specs)
        rate_per_s = _rate(recorded)
        self.rate_per_s = None if rate_per_s is None else rate_per_s / share
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


def read(path: Path, format_: str = AUTO) -> Recent:
    """Read workflows of any format; of a long file a sample.

    Raises:
        ConfigError: the file cannot be read or is wrong; names the place.
    """
    known = TraceSource(path, format_).known_format("hexgen" if path.suffix == ".jsonl" else "")
    source = TraceSource(path, known)
    if known == "text2sql":
        return Recent(read_trace(path), ())
    found, seen = reservoir(map(compact, source.workflows()), _MOST, generator(0, "recent"))
    if not found:
        raise ConfigError(f"{path} holds no workflow.")
    return _recent(found, seen, templates=known == "hexgen")


def _recent(found: Sequence[TraceWorkflow], seen: int, *, templates: bool) -> Recent:
    return Recent(specs_of(found, templates=templates), found, share=len(found) / seen)


def _rate(recorded: Sequence[TraceWorkflow]) -> float | None:
    times = [w.arrived_s for w in recorded if w.arrived_s is not None]
    if len(times) < 2 or max(times) <= min(times):
        return None
    return (len(times) - 1) / (max(times) - min(times))
