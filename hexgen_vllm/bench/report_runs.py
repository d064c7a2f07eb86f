"""The runs behind the evaluation: planned from scenario files, played in parallel, kept on disk.

Every run is a file named by all that determines it: scenario, policy, load, seed, size, and the
sources of policy and simulator. So an interrupted evaluation goes on where it stopped, and a
changed policy is never mixed with old results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.bench import results as files
from hexgen_vllm.metrics.summary import percentile
from hexgen_vllm.sim.limits import Limits
from hexgen_vllm.sim.results import row, simulate
from hexgen_vllm.sim.scenario import Run, Scenario
from hexgen_vllm.sim.scenario_file import load

Row = dict[str, Any]

HEXGEN: Final = "hexgen"
PROTECT: Final = "slack protect"
ORACLE: Final = "oracle"
ALPHAS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TUNED_AT: Final = (0.45, 0.8, 1.3)  # the paper's policy gets its best alpha near each load
TUNING_SEED: Final = 101
_SOURCES: Final = ("policy", "sim", "metrics")
_KEPT_LATENCIES: Final = 2_000


@dataclass(frozen=True)
class Size:
    """How much is played: ``None`` takes what the scenario file says."""

    workflows: int | None = None
    seeds: int | None = None
    loads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of one scenario file; ``alpha`` is the paper's knob, ``None`` for other policies."""

    path: Path
    policy: str
    load: float
    seed: int
    workflows: int
    alpha: float | None = None

    def key(self) -> str:
        """Return a name for the result."""
        text = self.path.read_text(encoding="utf-8")
        parts = (text, self.policy, self.load, self.seed, self.workflows, self.alpha, _sources())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@cache
def _sources() -> str:
    """Return a digest of the code that decides results."""
    package = Path(__file__).resolve().parents[1]
    found = [package / "types.py", package / "config.py"]
    for folder in _SOURCES:
        found += sorted((package / folder).glob("*.py"))
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def planned(path: Path, scenario: Scenario, size: Size) -> list[Cell]:
    """Return the cells of a scenario, all policies but the paper's."""
    names = [p.name for p in scenario.policies if p.name != HEXGEN]
    return [
        Cell(path, name, load_, seed, _workflows(scenario, size))
        for load_ in _loads(scenario, size)
        for seed in scenario.seeds[: size.seeds]
        for name in names
        if not _needless(name, load_)
    ]


def tuning(path: Path, scenario: Scenario, size: Size) -> list[Cell]:
    """Return the cells that find the best alpha of the paper's policy, on a seed of their own."""
    if all(p.name != HEXGEN for p in scenario.policies):
        return []
    loads = _loads(scenario, size)
    chosen = sorted({min(loads, key=lambda x: abs(x - at)) for at in TUNED_AT})
    return [
        Cell(path, HEXGEN, load_, TUNING_SEED, _workflows(scenario, size), alpha)
        for load_ in chosen
        for alpha in ALPHAS
    ]


def tuned(
    path: Path, scenario: Scenario, size: Size, trials: Iterable[Row]
) -> tuple[list[Cell], dict[float, float]]:
    """Return the cells of the paper's policy with its best alpha, and that alpha by load."""
    best = best_alphas(trials)
    alphas = {at: best[min(best, key=lambda x: abs(x - at))] for at in _loads(scenario, size)}
    cells = [
        Cell(path, HEXGEN, load_, seed, _workflows(scenario, size), alpha)
        for load_, alpha in alphas.items()
        for seed in scenario.seeds[: size.seeds]
    ]
    return cells, alphas


def best_alphas(trials: Iterable[Row]) -> dict[float, float]:
    """Return the best alpha by load: shortest deadline for 95 %, above λ* most on time."""
    groups: dict[float, list[Row]] = {}
    for trial in trials:
        groups.setdefault(trial["load"], []).append(trial)
    return {at: min(group, key=_badness)["alpha"] for at, group in groups.items()}


def _badness(trial: Row) -> tuple[float, float]:
    deadline = trial["min_deadline_95_s"]
    deadline = float("inf") if deadline is None else deadline
    return (-trial["on_time"], deadline) if trial["load"] > 1 else (deadline, -trial["on_time"])


def _needless(name: str, at: float) -> bool:
    return at > 1 if name == ORACLE else name.startswith(PROTECT) and at <= 1


def _workflows(scenario: Scenario, size: Size) -> int:
    return size.workflows or scenario.workload.workflows


def _loads(scenario: Scenario, size: Size) -> tuple[float, ...]:
    loads = scenario.arrivals.loads
    return tuple(x for x in loads if x in size.loads) if size.loads else loads


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
    return [files.read(_file(cell, folder))[0] for cell in cells]


def _file(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.key()}.json"


def _play(cell: Cell, path: Path) -> None:
    files.write(path, [played(cell)])


def played(cell: Cell) -> Row:
    """Play one cell."""
    scenario, bounds = _prepared(cell.path, cell.workflows)
    policy = next(p for p in scenario.policies if p.name == cell.policy)
    if cell.alpha is not None:
        policy = replace(policy, dispatch=replace(policy.dispatch, alpha=cell.alpha))
    run = Run(policy, cell.load * bounds.rate_per_s, cell.load, cell.seed)
    figures = row(scenario, run, bounds, simulate(scenario, run, bounds))
    return _short(figures, cell)


@cache
def _prepared(path: Path, workflows: int) -> tuple[Scenario, Limits]:
    scenario = load(path)
    scenario = replace(scenario, workload=replace(scenario.workload, workflows=workflows))
    return scenario, scenario.limits()


def _short(figures: Mapping[str, Any], cell: Cell) -> Row:
    """Return what the report needs of a row."""
    latencies = figures["latencies_s"]
    kept = {name: v for name, v in figures.items() if name not in ("calls", "arrivals_s")}
    kept["latencies_s"] = latencies[:_KEPT_LATENCIES]
    return {
        **kept,
        "scenario": cell.path.stem,
        "load": cell.load,
        "alpha": cell.alpha,
        "collapsed": collapsed(latencies),
        "worst_s": None if None in latencies else max(latencies),
    }


def collapsed(latencies_s: Sequence[float | None]) -> bool:
    """Return whether latency grew without end: the last quarter took twice as long as the second.

    Args:
        latencies_s: in order of arrival, ``None`` for a workflow that did not finish.
    """
    done = [float("inf") if v is None else v for v in latencies_s]
    n = len(done) // 4
    if n < 1:
        return False
    return percentile(done[-n:], 0.5) > 2 * percentile(done[n : 2 * n], 0.5)
