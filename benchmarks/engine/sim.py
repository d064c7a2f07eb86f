"""``hexgen-vllm bench sim``: how fast the simulator is, and how much memory a long run takes.

Figures of the reference fleet of four engines with text-to-SQL workflows:

- ``calls_per_s_per_core``: simulated calls per second of processor time, policy ``slack`` at 80 %
  of the fleet's capacity, the best of some repeats. ``…_64``: sixteen such fleets as one, 64
  engines, with four times the workflows. ``…_overload``: four engines at 130 % of their capacity.
- ``alpha_grid_s``: wall time of the paper's tuning, 11 values of alpha by 3 seeds by 300
  workflows, on two processes.
- ``peak_rss_mib``: most memory of a process that plays 20,000 workflows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results
from hexgen_vllm.report.summary import percentile
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.limits import limits
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    generator,
    poisson,
    timed,
)

_FLEET: Final = fleet("reference-4")
_LOAD: Final = 0.8
_OVERLOAD: Final = 1.3
_COPIES: Final = 16
_MORE: Final = 4  # times as many workflows for so many engines
_DEADLINE_S: Final = 120.0
_ALPHAS: Final = tuple(round(0.1 * i, 1) for i in range(11))
_SEEDS: Final = (1, 2, 3)
_LIMITS_WORKFLOWS: Final = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench sim``."""
    add = parser.add_argument
    add("--speed-workflows", type=int, default=500, metavar="N", help="of a run for speed")
    add("--repeats", type=int, default=3, metavar="N", help="runs for speed; the best counts")
    add("--memory-workflows", type=int, default=20_000, metavar="N", help="of the run for memory")
    add("--grid-workflows", type=int, default=300, metavar="N", help="of a run of the grid")
    add("--jobs", type=int, default=2, metavar="N", help="processes of the alpha grid")
    add("--json", type=Path, metavar="OUT", help="write the figures here")


def main(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        ConfigError: a number is below 1.
    """
    for name in ("speed_workflows", "repeats", "memory_workflows", "grid_workflows", "jobs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    results.check_writable(args.json)
    figures: dict[str, Any] = {}
    for name, what, played in (
        ("", "", partial(calls_per_s, args.speed_workflows)),
        ("_64", ", 64 engines", partial(calls_per_s, _MORE * args.speed_workflows, copies=_COPIES)),
        ("_overload", ", overload", partial(calls_per_s, args.speed_workflows, load=_OVERLOAD)),
    ):
        speed = figures[f"calls_per_s_per_core{name}"] = round(
            max(played() for _ in range(args.repeats))
        )
        print(f"simulated calls per second and core{what}: {speed:,}")
    figures["alpha_grid_s"] = round(alpha_grid_s(args.jobs, args.grid_workflows), 1)
    print(
        f"alpha grid, {len(_ALPHAS)} x {len(_SEEDS)} runs of {args.grid_workflows} workflows on "
        f"{args.jobs} processes: {figures['alpha_grid_s']} s"
    )
    figures["peak_rss_mib"] = round(peak_rss_mib(args.memory_workflows))
    print(f"peak memory of {args.memory_workflows:,} workflows: {figures['peak_rss_mib']:,} MiB")
    if args.json:
        results.write(args.json, figures)
    return 0


def calls_per_s(workflows: int, load: float = _LOAD, copies: int = 1) -> float:
    """Return simulated calls per second of processor time.

    Args:
        workflows: to play.
        load: as a share of the capacity.
        copies: of the reference fleet.
    """
    specs = workload(workflows, _SEEDS[0], load * copies)
    models = [
        replace(one, engine_id=f"{one.engine_id}-{i}") for i in range(copies) for one in _FLEET
    ]
    simulation = _simulation(named("slack"), models)
    started = time.process_time()
    simulation.run(specs)
    seconds = time.process_time() - started
    return sum(1 for spec in specs for _ in spec.calls()) / seconds


def alpha_grid_s(jobs: int, workflows: int) -> float:
    """Return the wall time of the paper's grid search."""
    started = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        tasks = [(alpha, seed) for seed in _SEEDS for alpha in _ALPHAS]
        list(pool.map(partial(_grid_point, workflows), tasks))
    return time.perf_counter() - started


def peak_rss_mib(workflows: int) -> float:
    """Return the peak memory of a fresh process that plays ``workflows`` workflows."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_play_and_weigh, workflows).result()


def _grid_point(workflows: int, task: tuple[float, int]) -> float:
    alpha, seed = task
    simulation = _simulation(named("paper", DispatchOptions(alpha=alpha)))
    simulation.run(workload(workflows, seed))
    return percentile([r.latency_s for r in simulation.workflows if r.latency_s is not None], 0.95)


def _play_and_weigh(workflows: int) -> float:
    calls_per_s(workflows)
    # Not ru_maxrss: a process takes that over from the one that starts it, however large it is.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _simulation(policy: Policy, models: Sequence[EngineModel] = _FLEET) -> Simulation:
    return Simulation(models, policy, lambda spec: _DEADLINE_S, SimOptions(record_calls=False))


@lru_cache(maxsize=len(_SEEDS))
def workload(workflows: int, seed: int, load: float = _LOAD) -> tuple[WorkflowSpec, ...]:
    """Return text-to-SQL workflows that arrive at ``load`` times the fleet's capacity."""
    drawn = text2sql(workflows, seed=seed)
    return timed(drawn, poisson(workflows, load * capacity_per_s(), generator(seed, "arrivals")))


@lru_cache(maxsize=1)
def capacity_per_s() -> float:
    """Return λ* of the fleet, workflows per second."""
    return limits(_FLEET, text2sql(_LIMITS_WORKFLOWS, seed=0)).rate_per_s
