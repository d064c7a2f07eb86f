"""The runs behind the evaluation: planned from scenario files, played in parallel, kept on disk.

Every run is a file named by all that determines it: scenario, policy, load, seed, size, and the
sources of policy and simulator. So an interrupted evaluation goes on where it stopped, and a
changed policy is never mixed with old results.

Knobs are tuned in the scenarios of ``train/``, on seeds of their own, those of the rivals as ours:
one value for all scenarios of the report, the one with the shortest deadlines in the geometric
mean. The paper's policy gets more: its best alpha in each cell of the report itself. Caps on open
workflows are found in the scenario that they are used in, on a seed that is not reported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.evaluation.evaluation import (
    FULL,
    ORACLE,
    OURS,
    PROTECT,
    TRUE_RATES,
    queue_grows,
    tenths,
)
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import PREFILL_WEIGHT
from hexgen_vllm.report import results as files
from hexgen_vllm.sim.limits import Limits
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.results import counted, row, simulate
from hexgen_vllm.sim.scenario import Scenario, ScenarioRun
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.workloads.workload import WorkflowSpec

Row = dict[str, Any]
Knobs = tuple[tuple[str, float], ...]

PAPER: Final = "paper"
RIVALS: Final = (
    "round_robin+fcfs",
    "weighted_round_robin+fcfs",
    "least_outstanding+fcfs",
    "least_outstanding+edf",
    "least_outstanding+plas",
    "weighted_least+edf",
    "power_of_two+fcfs",
    "sticky+fcfs",
    "sticky+edf",
    "wlcaff+fcfs",
    "wlcaff+edf",
    "wlcaff+srpt",
    "llm_d+fcfs",
    "llm_d+edf",
    "cache_aware+fcfs",
    "dynamo+edf",
    "earliest_finish",
)
CAPPED: Final = ("least_outstanding+edf", "weighted_least+edf", "sticky+edf", "wlcaff+edf")
GRIDS: Final[dict[str, tuple[Knobs, ...]]] = {
    OURS: tuple(
        (("externality", x), ("stretch", c)) for x, c in product((0.5, 1.0, 1.5), (0.0, 2.0, 4.0))
    ),
    "wlcaff+fcfs": tuple((("affinity_tokens", t),) for t in (100.0, 200.0, 500.0, 1000.0)),
    "wlcaff+edf": tuple((("affinity_tokens", t),) for t in (100.0, 200.0, 500.0, 1000.0)),
}
ALPHAS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CAPS: Final = (6, 10, 15, 22, 32, 48)
"""Open workflows per engine."""
TUNING_SEED: Final = 101
_SOURCES: Final = ("policy", "sim", "report")
_KEPT_LATENCIES: Final = 2_000


@dataclass(frozen=True)
class Size:
    """How much is played: ``None`` and nothing take what the scenario files say, all of it.

    Attributes:
        workflows: that count in a run.
        seeds: how many.
        loads: of the scenarios' loads, only these.
        rivals: which.
        alphas, caps: grids of the paper's knob and of caps.
        tuned: knobs are tuned first.
    """

    workflows: int | None = None
    seeds: int | None = None
    loads: tuple[float, ...] = ()
    rivals: tuple[str, ...] = RIVALS
    alphas: tuple[float, ...] = ALPHAS
    caps: tuple[int, ...] = CAPS
    tuned: bool = True

    def loads_of(self, scenario: Scenario) -> tuple[float, ...]:
        """Return the loads that are played of a scenario."""
        known = scenario.arrivals.loads
        return tuple(x for x in known if x in self.loads) if self.loads else known


@dataclass(frozen=True)
class Cell:
    """One run: a policy with knobs in one scenario file.

    Attributes:
        path: of the scenario.
        policy: a name of :mod:`hexgen_vllm.sim.policies`, or of the scenario's own policies.
        label: what the result is called.
        load, seed, workflows: of the run.
        knobs: placement options that differ from the defaults.
    """

    path: Path
    policy: str
    label: str
    load: float
    seed: int
    workflows: int
    knobs: Knobs = ()

    def key(self) -> str:
        """Return a name for the result."""
        text = self.path.read_text(encoding="utf-8")
        parts = (text, self.policy, self.load, self.seed, self.workflows, self.knobs, _sources())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@cache
def _sources() -> str:
    """Return a digest of the code that decides results."""
    package = Path(files.__file__).resolve().parents[1]
    found = [package / "types.py", package / "config.py"]
    for folder in _SOURCES:
        found += sorted((package / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def training(paths: Mapping[Path, Scenario], size: Size) -> list[Cell]:
    """Return the runs that tune the knobs of :data:`GRIDS`."""
    return [
        Cell(path, name, _labelled(name, knobs), at, TUNING_SEED, _workflows(scenario, size), knobs)
        for path, scenario in paths.items()
        for at in size.loads_of(scenario)
        if at <= FULL
        for name, grid in GRIDS.items()
        if name == OURS or name in size.rivals
        for knobs in grid
    ]


def best_knobs(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> dict[str, Knobs]:
    """Return, per policy, the knobs with the shortest deadlines in the geometric mean."""
    logs: dict[tuple[str, Knobs], list[float]] = {}
    for cell, result in zip(cells, rows, strict=True):
        deadline = result["min_deadline_95_s"]
        logs.setdefault((cell.policy, cell.knobs), []).append(
            math.inf if deadline is None else math.log(deadline)
        )
    best: dict[str, tuple[float, Knobs]] = {}
    for (name, knobs), found in logs.items():
        mean = fmean(found)
        if name not in best or mean < best[name][0]:
            best[name] = mean, knobs
    return {name: knobs for name, (_, knobs) in best.items()}


def planned(
    path: Path, scenario: Scenario, size: Size, tuned: Mapping[str, Knobs], caps: Mapping[str, int]
) -> list[Cell]:
    """Return the runs of a scenario that are reported.

    Args:
        path: of its file.
        scenario: what it says.
        size: how much is played.
        tuned: knobs by policy.
        caps: open workflows by policy, for loads above capacity.
    """
    cells = []
    for at, seed in product(size.loads_of(scenario), scenario.seeds[: size.seeds]):
        named_so = partial_cell(path, at, seed, _workflows(scenario, size))
        if at > FULL:
            cells.append(named_so(PROTECT, PROTECT, tuned.get(OURS, ())))
            cells += [
                named_so(name, f"{name} capped", (("max_workflows", float(cap)),))
                for name, cap in caps.items()
            ]
            continue
        cells.append(named_so(OURS, OURS, tuned.get(OURS, ())))
        cells += [named_so(name, name, ()) for name in size.rivals]
        cells += [
            named_so(name, f"{name} tuned", knobs)
            for name, knobs in tuned.items()
            if name in size.rivals and knobs
        ]
        cells += [named_so(PAPER, _labelled(PAPER, k), k) for k in _alphas(size)]
        cells += [named_so(ORACLE, ORACLE, ()), named_so(TRUE_RATES, TRUE_RATES, ())]
    return cells


def partial_cell(
    path: Path, at: float, seed: int, workflows: int
) -> Callable[[str, str, Knobs], Cell]:
    """Return what makes a cell of a policy, a label and knobs."""
    return lambda policy, label, knobs: Cell(path, policy, label, at, seed, workflows, knobs)


def capping(path: Path, scenario: Scenario, size: Size) -> list[Cell]:
    """Return the runs that find the best cap of each capped rival, on a seed of their own."""
    above = [x for x in size.loads_of(scenario) if x > FULL]
    if not above:
        return []
    engines, count = len(scenario.fleet), _workflows(scenario, size)
    return [
        Cell(path, name, name, min(above), TUNING_SEED, count, (("max_workflows", cap * engines),))
        for name in CAPPED
        for cap in size.caps
    ]


def best_caps(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return, per policy, the cap with the most workflows on time."""
    best: dict[str, tuple[float, int]] = {}
    for cell, result in zip(cells, rows, strict=True):
        share, cap = result["share_on_time"], int(cell.knobs[0][1])
        if cell.policy not in best or share > best[cell.policy][0]:
            best[cell.policy] = share, cap
    return {name: cap for name, (_, cap) in best.items()}


def ablated(path: Path, scenario: Scenario, size: Size) -> list[Cell]:
    """Return the runs of a scenario that names its own policies."""
    return [
        named_so(policy.name, policy.name, ())
        for at, seed in product(size.loads_of(scenario), scenario.seeds[: size.seeds])
        for named_so in (partial_cell(path, at, seed, _workflows(scenario, size)),)
        for policy in scenario.policies
    ]


def best_alpha(rows: Iterable[Row]) -> list[Row]:
    """Return ``rows`` with the paper's policy once a cell, at its best alpha there."""
    kept, trials = [], dict[tuple[str, float, int], list[Row]]()
    for result in rows:
        if result["policy"].startswith(f"{PAPER} "):
            cell = result["scenario"], result["load"], result["seed"]
            trials.setdefault(cell, []).append(result)
        else:
            kept.append(result)
    for found in trials.values():
        best = min(found, key=_deadline)
        kept.append({**best, "alpha": best["policy"], "policy": PAPER})
    return kept


def _deadline(result: Row) -> float:
    deadline = result["min_deadline_95_s"]
    return math.inf if deadline is None or result["grows"] else float(deadline)


def _alphas(size: Size) -> list[Knobs]:
    return [(("alpha", alpha),) for alpha in size.alphas]


def _labelled(name: str, knobs: Knobs) -> str:
    return " ".join((name, *(f"{knob}={value:g}" for knob, value in knobs)))


def _workflows(scenario: Scenario, size: Size) -> int:
    return size.workflows or scenario.workload.workflows


def play_all(
    cells: Sequence[Cell],
    folder: Path,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Return the results of ``cells``, in order; those found in ``folder`` are not played again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not _file(cell, folder).exists()]
    with ProcessPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(_play, cell, _file(cell, folder)) for cell in missing]
        for count, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress is not None:
                progress(count, len(missing))
    found = [files.read(_file(cell, folder))[0] for cell in cells]
    return [{**one, "policy": cell.label} for one, cell in zip(found, cells, strict=True)]


def _file(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.key()}.json"


def _play(cell: Cell, path: Path) -> None:
    files.write(path, [played(cell)])


def played(cell: Cell) -> Row:
    """Play one cell."""
    scenario, bounds = _prepared(cell.path, cell.workflows)
    if cell.policy == TRUE_RATES:
        scenario = replace(scenario, simulation=replace(scenario.simulation, rates="true"))
    run = ScenarioRun(_policy(cell, scenario), cell.load * bounds.rate_per_s, cell.load, cell.seed)
    specs = scenario.specs(run)
    simulation = simulate(scenario, run, bounds, specs)
    records, _ = counted(scenario, simulation)
    sizes = {spec.workflow_id: size_of(spec) for spec in specs}
    by_tenth = tenths([sizes[w.workflow_id] for w in records], [w.on_time for w in records])
    tenants: dict[str, list[bool]] = {}
    for spec in specs:
        tenants.setdefault(spec.tenant, [])
    owner = {spec.workflow_id: spec.tenant for spec in specs}
    for record in records:
        tenants[owner[record.workflow_id]].append(record.on_time)
    ended = [
        (w.arrived_s, None if w.latency_s is None else w.arrived_s + w.latency_s) for w in records
    ]
    figures = row(scenario, run, bounds, simulation)
    latencies = figures["latencies_s"]
    kept = {name: v for name, v in figures.items() if name not in ("calls", "arrivals_s")}
    return {
        **kept,
        "latencies_s": latencies[:_KEPT_LATENCIES],
        "scenario": cell.path.stem,
        "load": cell.load,
        "grows": cell.load <= FULL and queue_grows(ended),
        "share_on_time": fmean(w.on_time for w in records),
        "tenths": by_tenth,
        "longest_tenth": by_tenth[-1],
        "tenants": {name: fmean(met) for name, met in sorted(tenants.items()) if met},
        "worst_s": None if None in latencies else max(latencies),
    }


def _policy(cell: Cell, scenario: Scenario) -> Policy:
    own = {policy.name: policy for policy in scenario.policies}
    policy = own.get(cell.policy)
    if policy is None:
        protect = cell.policy == PROTECT
        name = OURS if protect or cell.policy == TRUE_RATES else cell.policy
        policy = named(name, DispatchOptions(overload="protect") if protect else None)
    knobs: dict[str, Any] = {
        name: int(value) if name == "max_workflows" else value for name, value in cell.knobs
    }
    return replace(policy, dispatch=replace(policy.dispatch, **knobs), name=cell.label)


def size_of(spec: WorkflowSpec) -> float:
    """Return the work of a workflow in output tokens."""
    return sum(c.output_tokens + PREFILL_WEIGHT * c.prompt_tokens for c in spec.calls())


@cache
def _prepared(path: Path, workflows: int) -> tuple[Scenario, Limits]:
    scenario = load(path)
    scenario = replace(scenario, workload=replace(scenario.workload, workflows=workflows))
    return scenario, scenario.limits()
