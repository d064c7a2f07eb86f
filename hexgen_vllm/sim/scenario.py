"""What a simulation plays: fleet, workload, arrivals, deadlines, policies, seeds.

Values only; :mod:`hexgen_vllm.sim.scenario_file` reads them from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import check, option
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.limits import Limits, limits, uncontended
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.simulator import SimOptions
from hexgen_vllm.sim.workloads.agents import dag, mac_sql, map_reduce, mixed_tenants, react
from hexgen_vllm.sim.workloads.text2sql import Text2SqlOptions, text2sql
from hexgen_vllm.sim.workloads.traces import formats as trace_formats
from hexgen_vllm.sim.workloads.traces.formats import TraceSource
from hexgen_vllm.sim.workloads.traces.model import SILENCE_S
from hexgen_vllm.sim.workloads.traces.played import as_recorded, drawn
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    gamma_bursts,
    generator,
    poisson,
    recorded,
    scaled,
    timed,
    unshared,
)


@dataclass(frozen=True)
class WorkloadOptions:
    """Which workflows are played."""

    kind: str = option(
        "text2sql",
        "generated workflows; mixed is text2sql, react and map_reduce by three tenants",
        choices=("text2sql", "mac_sql", "react", "map_reduce", "dag", "mixed"),
    )
    trace: str | None = option(None, "file or folder of recorded workflows instead")
    format: str = option("auto", "format of the trace", choices=trace_formats.NAMES)
    order: str = option(
        "drawn",
        "drawn from the trace with the seed, or a stretch as recorded, each seed another",
        choices=("drawn", "recorded"),
    )
    silence_s: float = option(
        SILENCE_S, "a workflow of the trace is over when nothing came for so long", least=0.0
    )
    block_tokens: int = option(
        0, "tokens of a hashed block of the trace; 0 is what the format says", least=0
    )
    workflows: int = option(300, "workflows that count", least=1, most=1_000_000)
    warmup: int = option(0, "workflows played before those that count", least=0, most=1_000_000)
    length_scale: float = option(1.0, "factor on all lengths", least=1e-4, most=100.0)
    shared_prefixes: bool = option(True, "prompts have beginnings in common")
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
        if self.trace is None:
            found = self._generated(count, seed)
        elif self.order == "recorded":
            found = as_recorded(self._source(self.trace), count, seed)
        else:
            found = drawn(self._source(self.trace), count, seed)
        if not self.shared_prefixes:
            found = tuple(map(unshared, found))
        if self.length_scale == 1.0:
            return found
        return tuple(scaled(spec, self.length_scale) for spec in found)

    @property
    def name(self) -> str:
        """What is played, for tables."""
        if self.trace is not None:
            return self.trace
        return f"{self.kind}/{self.retries}" if self.kind == "text2sql" else self.kind

    def _source(self, trace: str) -> TraceSource:
        return TraceSource(Path(trace), self.format, self.silence_s, self.block_tokens)

    def _generated(self, count: int, seed: int) -> tuple[WorkflowSpec, ...]:
        options = Text2SqlOptions(self.databases, self.zipf, self.retries, self.tenants)
        if self.kind == "react":
            return react(count, seed=seed, tenants=self.tenants)
        if self.kind == "dag":
            return dag(count, seed=seed, tenants=self.tenants)
        if self.kind == "map_reduce":
            return map_reduce(count, seed=seed, tenants=self.tenants)
        makers = {"mac_sql": mac_sql, "mixed": mixed_tenants}
        return makers.get(self.kind, text2sql)(count, seed=seed, options=options)


@dataclass(frozen=True)
class ArrivalOptions:
    """When workflows arrive.

    Exactly one of ``loads``, ``rates`` and ``times_s`` is given. With the pattern ``recorded`` it
    may be none: then they arrive as they did, or ``speed`` times as fast.
    """

    loads: tuple[float, ...] = option((), "rates as shares of the fleet's capacity λ*")
    rates: tuple[float, ...] = option((), "rates, workflows/s")
    times_s: tuple[float, ...] = option((), "recorded arrivals, seconds, ascending")
    pattern: str = option(
        "random",
        "random by burstiness, or the gaps of the trace, stretched to the rate (needs "
        "workload.order recorded)",
        choices=("random", "recorded"),
    )
    speed: float = option(1.0, "factor on the pace of recorded arrivals", least=1e-6)
    burstiness: float = option(
        1.0, "variation of arrival gaps: 1 is Poisson, more is bursts", least=0.01, most=100.0
    )

    def __post_init__(self) -> None:
        check(self)
        count = sum(map(bool, (self.loads, self.rates, self.times_s)))
        if self.pattern == "recorded":
            if count > 1 or self.times_s:
                raise ConfigError("pattern recorded takes loads or rates, or neither.")
        elif count != 1:
            raise ConfigError("exactly one of loads, rates and times_s must be given.")
        for rate in (*self.loads, *self.rates):
            if not (math.isfinite(rate) and rate > 0):
                raise ConfigError(f"loads and rates must be more than 0, not {rate:g}.")
        recorded(self.times_s, speed=self.speed)

    @property
    def at_recorded_pace(self) -> bool:
        """Whether neither a rate nor a list of arrivals is given."""
        return not (self.loads or self.rates or self.times_s)

    def times(
        self, count: int, rate: float, seed: int, seen_s: Sequence[float] = ()
    ) -> tuple[float, ...]:
        """Return ``count`` arrivals; as many must be recorded if any are.

        Args:
            count: how many.
            rate: mean arrivals per second.
            seed: of random ones.
            seen_s: when they arrived in the trace, ascending from 0.
        """
        if self.times_s:
            return recorded(self.times_s[:count], speed=self.speed)
        if self.pattern == "recorded":
            return recorded(
                seen_s, speed=self.speed if self.at_recorded_pace else rate / pace(seen_s)
            )
        rng = generator(seed, "arrivals")
        if self.burstiness == 1.0:
            return poisson(count, rate, rng)
        return gamma_bursts(count, rate, self.burstiness, rng)


def pace(times_s: Sequence[float]) -> float:
    """Return the mean arrivals per second of ascending times, ``inf`` when all are equal."""
    span_s = times_s[-1] - times_s[0] if times_s else 0.0
    return len(times_s) / span_s if span_s > 0 else math.inf


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

    def of(self, base_s: float, fleet: Sequence[EngineModel]) -> Callable[[WorkflowSpec], float]:
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
        replayed = self.workload.trace is not None and self.workload.order == "recorded"
        if self.arrivals.pattern == "recorded" and not replayed:
            raise ConfigError("pattern recorded needs a trace in the workload, and order recorded.")

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
            rates = [arrivals.speed * pace(arrivals.times_s)]
        elif arrivals.at_recorded_pace:
            first = self.workload.specs(self.seeds[0])
            rates = [arrivals.speed * pace([spec.arrival_s for spec in first])]
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
        found = self.workload.specs(run.seed)
        seen_s = [spec.arrival_s for spec in found]
        return timed(found, self.arrivals.times(len(found), run.rate, run.seed, seen_s))
