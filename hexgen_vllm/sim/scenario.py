"""What a simulation plays: fleet, workload, arrivals, deadlines, policies, seeds.

Values only; :mod:`hexgen_vllm.sim.scenario_file` reads them from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hexgen_vllm.config import check, option
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.limits import Limits, limits, uncontended
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.simulator import SimOptions
from hexgen_vllm.sim.workloads.agents import mac_sql, map_reduce, mixed_tenants, react
from hexgen_vllm.sim.workloads.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workloads.trace import read_trace, resample
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    gamma_bursts,
    generator,
    poisson,
    recorded,
    scaled,
    timed,
)


@dataclass(frozen=True)
class WorkloadOptions:
    """Which workflows are played."""

    kind: str = option(
        "text2sql",
        "generated workflows; mixed is text2sql, react and map_reduce by three tenants",
        choices=("text2sql", "mac_sql", "react", "map_reduce", "mixed"),
    )
    trace: str | None = option(None, "file in the public trace format, drawn from with the seed")
    workflows: int = option(300, "workflows that count", least=1, most=1_000_000)
    warmup: int = option(0, "workflows played before those that count", least=0, most=1_000_000)
    length_scale: float = option(1.0, "factor on all lengths", least=1e-4, most=100.0)
    databases: int = option(10, "databases of the generated workload", least=1, most=10_000)
    zipf: float = option(1.0, "how unequal their popularity is", least=0.0, most=10.0)
    retries: str = option(
        "skewed", "revise rounds of the generated workload", choices=("skewed", "uniform", "mixed")
    )
    tenants: tuple[str, ...] = option(("default",), "tenants that send workflows, equally often")

    def __post_init__(self) -> None:
        check(self)

    def specs(self, seed: int) -> tuple[WorkflowSpec, ...]:
        """Return all workflows, those of the warm-up first, arriving at 0.

        Raises:
            ConfigError: the trace cannot be read.
        """
        count = self.warmup + self.workflows
        if self.trace is not None:
            drawn = resample(read_trace(self.trace), count, seed=seed)
        else:
            drawn = self._generated(count, seed)
        if self.length_scale == 1.0:
            return drawn
        return tuple(scaled(spec, self.length_scale) for spec in drawn)

    @property
    def name(self) -> str:
        """What is played, for tables."""
        if self.trace is not None:
            return self.trace
        return f"{self.kind}/{self.retries}" if self.kind == "text2sql" else self.kind

    def _generated(self, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
        options = Text2SqlOptions(self.databases, self.zipf, self.retries, self.tenants)
        if self.kind == "react":
            return react(count, seed=seed, tenants=self.tenants)
        if self.kind == "map_reduce":
            return map_reduce(count, seed=seed, tenants=self.tenants)
        makers = {"mac_sql": mac_sql, "mixed": mixed_tenants}
        return makers.get(self.kind, text2sql)(count, seed=seed, options=options)


@dataclass(frozen=True)
class ArrivalOptions:
    """When workflows arrive; exactly one of ``loads``, ``rates`` and ``times_s`` is given."""

    loads: tuple[float, ...] = option((), "rates as shares of the fleet's capacity λ*")
    rates: tuple[float, ...] = option((), "rates, workflows/s")
    times_s: tuple[float, ...] = option((), "recorded arrivals, seconds, ascending")
    speed: float = option(1.0, "factor on the pace of recorded arrivals", least=1e-6)
    burstiness: float = option(
        1.0, "variation of arrival gaps: 1 is Poisson, more is bursts", least=0.01, most=100.0
    )

    def __post_init__(self) -> None:
        check(self)
        if sum(map(bool, (self.loads, self.rates, self.times_s))) != 1:
            raise ConfigError("exactly one of loads, rates and times_s must be given.")
        for rate in (*self.loads, *self.rates):
            if not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"loads and rates must be more than 0, not {rate:g}.")
        recorded(self.times_s, speed=self.speed)

    def times(self, count: int, rate: float, seed: int) -> tuple[float, ...]:
        """Return ``count`` arrivals; as many must be recorded if any are."""
        if self.times_s:
            return recorded(self.times_s[:count], speed=self.speed)
        rng = generator(seed, "arrivals")
        if self.burstiness == 1.0:
            return poisson(count, rate, rng)
        return gamma_bursts(count, rate, self.burstiness, rng)


@dataclass(frozen=True)
class DeadlineOptions:
    """How long workflows may take."""

    scale: float = option(2.0, "deadline in multiples of what by says", least=1e-3)
    by: str = option(
        "base",
        "base is the base SLO, the same for all workflows; own is a workflow's own time alone on "
        "the average engine, think times once",
        choices=("base", "own"),
    )
    base_s: float | None = option(
        None,
        "base SLO, seconds; none is the mean critical path on the average idle engine",
        least=1e-3,
    )
    tenants: Mapping[str, float] = option({}, "scale of single tenants, by name")

    def __post_init__(self) -> None:
        check(self)
        for tenant, scale in self.tenants.items():
            if not (math.isfinite(scale) and scale > 0):
                raise ConfigError(f"the scale of tenant {tenant} must be more than 0.")

    def of(
        self, base_s: float, fleet: Sequence[EngineModel]
    ) -> Callable[[WorkflowSpec], float]:
        """Return the function from a workflow to its deadline in seconds."""
        scale, tenants = self.scale, self.tenants
        if self.by == "own":
            return lambda spec: uncontended(fleet, spec).deadline_s(tenants.get(spec.tenant, scale))
        if not tenants:
            return lambda spec: scale * base_s
        return lambda spec: tenants.get(spec.tenant, scale) * base_s


@dataclass(frozen=True)
class ScenarioRun:
    """One simulation of a scenario."""

    policy: Policy
    rate: float
    load: float
    seed: int


@dataclass(frozen=True)
class Scenario:
    """Everything that determines a set of runs.

    Attributes:
        fleet: the engines.
        arrivals: when workflows come.
        workload: which.
        deadline: how long they may take.
        policies: what is compared.
        seeds: one run each, for every policy and rate.
        simulation: the service around the engines.
    """

    fleet: tuple[EngineModel, ...]
    arrivals: ArrivalOptions
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)
    deadline: DeadlineOptions = field(default_factory=DeadlineOptions)
    policies: tuple[Policy, ...] = field(default_factory=lambda: (named("slack"),))
    seeds: tuple[int, ...] = (0,)
    simulation: SimOptions = field(default_factory=SimOptions)

    def __post_init__(self) -> None:
        arrivals, wanted = len(self.arrivals.times_s), self.workload.warmup
        wanted += self.workload.workflows
        if 0 < arrivals < wanted:
            raise ConfigError(f"times_s has {arrivals} arrivals, the workload {wanted} workflows.")

    def limits(self, specs: tuple[WorkflowSpec, ...] | None = None) -> Limits:
        """Return the bounds of fleet and workload, by the first seed unless ``specs`` are given."""
        return limits(self.fleet, specs or self.workload.specs(self.seeds[0]))

    def base_s(self, bounds: Limits) -> float:
        """Return the base SLO."""
        return self.deadline.base_s or bounds.base_s

    def runs(self, capacity_per_s: float) -> list[ScenarioRun]:
        """Return all runs; at each rate and seed all policies follow each other."""
        arrivals = self.arrivals
        if arrivals.times_s:
            span = (arrivals.times_s[-1] - arrivals.times_s[0]) / arrivals.speed
            rates = [len(arrivals.times_s) / span if span > 0 else math.inf]
        else:
            rates = [*arrivals.rates, *(load * capacity_per_s for load in arrivals.loads)]
        return [
            ScenarioRun(policy, rate, rate / capacity_per_s, seed)
            for rate in rates
            for seed in self.seeds
            for policy in self.policies
        ]

    def specs(self, run: ScenarioRun) -> tuple[WorkflowSpec, ...]:
        """Return the workflows of a run with their arrivals."""
        drawn = self.workload.specs(run.seed)
        return timed(drawn, self.arrivals.times(len(drawn), run.rate, run.seed))
