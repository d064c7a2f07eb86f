"""Live runs played again in virtual time, to see how far the simulator can be trusted.

A row of ``hexgen-vllm bench live`` says which workflows came when; seed and rate determine them,
token for token. With a calibrated fleet the simulator plays the same workflows under the same
policy, and P50 and P95 of workflow latency stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files
from hexgen_vllm.report.summary import percentile
from hexgen_vllm.report.table import aligned, seconds
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.policies import NAMES, Policy, named
from hexgen_vllm.sim.results import TRUE_RATES, Row, row, simulate
from hexgen_vllm.sim.scenario import (
    ArrivalOptions,
    DeadlineOptions,
    Scenario,
    ScenarioRun,
    WorkloadOptions,
)
from hexgen_vllm.sim.scenario_file import load_fleet, load_simulation
from hexgen_vllm.sim.simulator import SimOptions
from hexgen_vllm.sim.workloads.workload import WorkflowSpec

GOALS: Final = {"P50": 0.10, "P95": 0.15}
"""Largest error that counts as good, by percentile."""
_SHARES: Final = {"P50": 0.50, "P95": 0.95}
_NEEDED: Final = (
    "policy",
    "seed",
    "rate",
    "workflows",
    "warmup",
    "workload",
    "length_scale",
    "burstiness",
    "deadline_s",
    "latencies_s",
    "arrivals_s",
)
_SAME_S: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Comparison:
    """One live run and its simulation.

    Attributes:
        live, simulated: result rows.
        policy: what was simulated.
    """

    live: Row
    simulated: Row
    policy: str

    def figures(self, name: str) -> tuple[float, float]:
        """Return live and simulated ``P50`` or ``P95`` of workflow latency, seconds."""
        live, simulated = (
            percentile([v for v in one["latencies_s"] if v is not None], _SHARES[name])
            for one in (self.live, self.simulated)
        )
        return live, simulated

    def error(self, name: str) -> float:
        """Return the simulated over the live figure, less 1."""
        live, simulated = self.figures(name)
        return simulated / live - 1.0


def compare(
    rows: Iterable[Row],
    fleet: Sequence[EngineModel],
    policy: Policy | None = None,
    simulation: SimOptions | None = None,
) -> list[Comparison]:
    """Simulate every live run in ``rows``.

    Args:
        rows: of a result file of ``bench live``.
        fleet: calibrated engines.
        policy: what the live service ran; by default what the row is named after.
        simulation: the service around the engines.

    Raises:
        ConfigError: a row cannot be played again.
    """
    found = []
    for live in rows:
        scenario = scenario_of(live, tuple(fleet), policy)
        scenario = replace(scenario, simulation=simulation or scenario.simulation)
        # Loads are shares of a capacity that has no part in this.
        run = ScenarioRun(scenario.policies[0], float(live["rate"]), 0.0, scenario.seeds[0])
        specs = scenario.specs(run)
        _check_same(live, scenario, specs)
        bounds = scenario.limits(specs)
        simulated = row(scenario, run, bounds, simulate(scenario, run, bounds, specs))
        found.append(Comparison(live, simulated, run.policy.name))
    return found


def scenario_of(
    live: Mapping[str, Any], fleet: tuple[EngineModel, ...], policy: Policy | None = None
) -> Scenario:
    """Return the scenario that a live run played.

    Raises:
        ConfigError: something is missing or cannot be simulated.
    """
    missing = [key for key in _NEEDED if live.get(key) is None]
    if missing:
        raise ConfigError(f"a live run lacks {', '.join(missing)}; play it again.")
    if live.get("hints", "none") != "none":
        raise ConfigError("runs whose client gave hints cannot be simulated yet.")
    generated, _, retries = str(live["workload"]).partition("/")
    workload = WorkloadOptions(
        workflows=live["workflows"],
        warmup=live["warmup"],
        length_scale=live["length_scale"],
        databases=live.get("databases", WorkloadOptions().databases),
    )
    if generated == "text2sql":
        workload = replace(workload, retries=retries)
    else:
        workload = replace(workload, trace=str(live["workload"]))
    return Scenario(
        fleet=fleet,
        arrivals=ArrivalOptions(rates=(live["rate"],), burstiness=live["burstiness"]),
        workload=workload,
        deadline=DeadlineOptions(scale=1.0, base_s=live["deadline_s"]),
        policies=(policy or _policy_of(live),),
        seeds=(live["seed"],),
    )


def _policy_of(live: Mapping[str, Any]) -> Policy:
    name = str(live["policy"])
    if name not in NAMES:
        raise ConfigError(f"the live policy is called {name}; say with --policy what it is.")
    return named(name)


def _check_same(live: Row, scenario: Scenario, specs: Sequence[WorkflowSpec]) -> None:
    """Refuse a live run that this version would generate differently.

    Raises:
        ConfigError: arrivals differ.
    """
    arrivals = [spec.arrival_s for spec in specs[scenario.workload.warmup :]]
    recorded = live["arrivals_s"]
    same = len(arrivals) == len(recorded) and all(
        abs(a - b) < _SAME_S for a, b in zip(arrivals, recorded, strict=True)
    )
    if not same:
        raise ConfigError(
            "the arrivals of a live run are not those of its seed; it is from another version."
        )


def play_results(path: Path, fleet: Path, policy: Policy | None) -> list[Comparison]:
    """Simulate every run of the result file ``path`` on the engines of the file ``fleet``.

    Raises:
        ConfigError: the file does not exist or holds no run that can be played again.
    """
    rows = files.read(path)
    if not rows:
        raise ConfigError(f"{path} holds no live run.")
    return compare(rows, load_fleet(fleet), policy, load_simulation(fleet))


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return one line for each run."""
    heads = ["policy", "seed", "rate/s", "workflows"]
    for name in GOALS:
        heads += [f"live {name}", f"simulated {name}", "error"]
    lines = []
    for one in comparisons:
        cells = [one.policy, str(one.live["seed"]), f"{one.live['rate']:g}"]
        cells.append(str(one.live["workflows"]))
        for name in GOALS:
            cells += [*map(seconds, one.figures(name)), f"{one.error(name):+.1%}"]
        lines.append(cells)
    worst = {name: max(abs(one.error(name)) for one in comparisons) for name in GOALS}
    said = ", ".join(
        f"{name} within {worst[name]:.1%} (goal {goal:.0%})" for name, goal in GOALS.items()
    )
    known = any(one.simulated["rates"] == "true" for one in comparisons)
    title = f"{TRUE_RATES}\n\n" if known else ""
    return f"{title}{aligned(heads, lines)}\n\nworkflow latency in seconds; {said}"
