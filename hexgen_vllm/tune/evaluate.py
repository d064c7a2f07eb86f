"""Plays candidates: one simulation for each (values, seed), on several cores if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType

from hexgen_vllm.records import WorkflowRecord
from hexgen_vllm.report.summary import attainment
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.limits import Limits, Uncontended, limits, uncontended
from hexgen_vllm.sim.policies import Policy
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    generator,
    poisson,
    timed,
)
from hexgen_vllm.tune.knobs import Values, applied
from hexgen_vllm.tune.objective import Objective
from hexgen_vllm.tune.online import TUNED
from hexgen_vllm.tune.replay import Recent
from hexgen_vllm.tune.search import Task


@dataclass(frozen=True)
class Setting:
    """What candidates are played on; equal for all of them.

    Attributes:
        fleet: the engines.
        recent: workflows to draw from.
        workflows: that count in one run.
        warmup: that are played before them.
        rate_per_s: mean arrivals.
        deadline_s: of every workflow, seconds from its arrival; a multiple where it has its own.
        base_s: base SLO that deadlines are multiples of, seconds.
        simulation: the service around the engines.
        own: deadlines are multiples of each workflow's own time alone. Latencies are then told
            as such multiples, too.
    """

    fleet: tuple[EngineModel, ...]
    recent: Recent
    workflows: int
    warmup: int
    rate_per_s: float
    deadline_s: float
    base_s: float
    simulation: SimOptions
    own: bool = False

    def specs(self, seed: int) -> tuple[WorkflowSpec, ...]:
        """Return the workflows of a seed with their arrivals."""
        drawn = self.recent.draw(self.warmup + self.workflows, seed)
        rng = generator(seed, "arrivals")
        return timed(drawn, poisson(len(drawn), self.rate_per_s, rng))

    def records(self, policy: Policy, seed: int) -> list[WorkflowRecord]:
        """Play one run; return the records that count, in order of arrival."""
        options = replace(self.simulation, record_calls=False)
        specs = self.specs(seed)
        alone = {s.workflow_id: uncontended(self.fleet, s) for s in specs} if self.own else {}

        def deadline_s(spec: WorkflowSpec) -> float:
            own = alone.get(spec.workflow_id)
            return self.deadline_s if own is None else own.deadline_s(self.deadline_s)

        simulation = Simulation(self.fleet, policy, deadline_s, options, seed=seed)
        simulation.run(specs)
        ordered = sorted(simulation.workflows, key=lambda w: (w.arrived_s, w.workflow_id))
        counted = ordered[self.warmup :]
        return [_scaled(r, alone.get(r.workflow_id), self.deadline_s) for r in counted]

    def on_time(self, policy: Policy, seed: int) -> float:
        """Play one run; return the share of workflows within their deadline."""
        records = self.records(policy, seed)
        return attainment([r.latency_s for r in records], self.deadline_s)

    @cached_property
    def bounds(self) -> Limits:
        """Limits of fleet and workload."""
        return limits(self.fleet, self.recent.draw(self.workflows, 0))


def _scaled(record: WorkflowRecord, own: Uncontended | None, scale: float) -> WorkflowRecord:
    """Return a record with its times as multiples of the workflow's own time, if it has one."""
    if own is None:
        return record
    took = None if record.latency_s is None else own.scale(record.latency_s)
    return replace(record, deadline_s=scale, latency_s=took)


def capacity_of(fleet: Sequence[EngineModel], bounds: Limits) -> float:
    """Return λ*: without prefix cache when no engine has one."""
    cached = any(model.prefix_caching for model in fleet)
    return bounds.rate_per_s if cached else bounds.cold_rate_per_s


class Evaluator:
    """Evaluates candidates for :class:`~hexgen_vllm.tune.search.Search`; close it at the end.

    Args:
        setting: what they are played on.
        policy: what is tuned.
        objective: the loss.
        jobs: simulations at a time; 1 stays in this process.
    """

    def __init__(
        self, setting: Setting, policy: Policy, objective: Objective, jobs: int = 1
    ) -> None:
        self._setting, self._policy, self._objective = setting, policy, objective
        self._pool = ProcessPoolExecutor(jobs) if jobs > 1 else None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, tasks: Sequence[Task]) -> list[float]:
        """Return the loss of every (values, seed)."""
        return self.play([(applied(self._policy, values), seed) for values, seed in tasks])

    def play(self, policies: Sequence[tuple[Policy, int]]) -> list[float]:
        """Return the loss of every (policy, seed)."""
        if self._pool is None:
            records = [self._setting.records(p, seed) for p, seed in policies]
        else:
            found = [self._pool.submit(self._setting.records, p, seed) for p, seed in policies]
            records = [future.result() for future in found]
        return [self._objective(each) for each in records]


def tuned(policy: Policy, values: Values) -> Policy:
    """Return ``policy`` with ``values``, under a name that says so."""
    return replace(applied(policy, values), name=f"{policy.name}{TUNED}")
