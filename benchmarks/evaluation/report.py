"""``hexgen-vllm bench report``: plays the evaluation and writes its page, figures and plots.

It can be interrupted: finished runs are kept in ``--work`` and not played again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.evaluation import report_live
from benchmarks.evaluation.evaluation import (
    OURS,
    TRUE_RATES,
    Results,
    summary,
)
from benchmarks.evaluation.report_page import (
    ABLATION,
    Section,
    page,
)
from benchmarks.evaluation.report_runs import (
    Knobs,
    Row,
    Size,
    ablated,
    best_alpha,
    best_caps,
    best_knobs,
    capping,
    planned,
    play_all,
    training,
)
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files
from hexgen_vllm.report.plot import draw_attainment, require_matplotlib
from hexgen_vllm.sim.scenario import Scenario
from hexgen_vllm.sim.scenario_file import load

QUICK: Final = Size(
    workflows=300,
    seeds=1,
    loads=(0.6, 0.8, 0.95, 1.3),
    rivals=(
        "least_outstanding+edf",
        "sticky+fcfs",
        "sticky+edf",
        "wlcaff+fcfs",
        "wlcaff+edf",
        "llm_d+fcfs",
        "cache_aware+fcfs",
        "earliest_finish",
    ),
    alphas=(0.2, 0.5, 0.8),
    caps=(10, 15, 22),
    tuned=False,
)
_DRAWN_LOADS: Final = (0.8, 1.3)
_TRAIN: Final = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench report``."""
    add = parser.add_argument
    folder = Path("examples/scenarios/evaluation")
    add("--scenarios", type=Path, default=folder, metavar="DIR", help=f"default: {folder}")
    add("--only", nargs="+", metavar="NAME", help="names of scenario files, without .yaml")
    add("--out", type=Path, default=Path("docs"), metavar="DIR", help="default: docs")
    add("--work", type=Path, default=Path(".cache/evaluation"), metavar="DIR", help="finished runs")
    add("--workers", type=int, default=2, help="processes (default: 2)")
    add("--quick", action="store_true", help="few workflows, seeds, rivals: minutes, not hours")
    add("--workflows", type=int, help="workflows that count, instead of the scenarios' own")
    add("--seeds", type=int, help="how many of the scenarios' seeds")
    add("--loads", nargs="+", type=float, help="of the scenarios' loads, only these")
    add("--live", type=Path, metavar="JSON", help="results of hexgen_vllm.demo with vllm-router")
    add("--simulated", type=Path, metavar="JSON", help="results of hexgen-vllm sim, beside --live")
    add("--no-plots", action="store_true", help="draw nothing")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: an option or a file cannot be used.
    """
    counts = (args.workers, args.workflows, args.seeds)
    if any(count is not None and count < 1 for count in counts):
        raise ConfigError("--workers, --workflows and --seeds must be at least 1.")
    paths = _paths(args.scenarios, args.only)
    files.check_writable(args.out / "evaluation.md")
    if not args.no_plots:
        require_matplotlib()
    live, simulated = (_given(path) for path in (args.live, args.simulated))
    size = _size(args)
    scenarios = {path: load(path) for path in paths}
    tuned = _tuned(args, size)
    rows = _played(scenarios, size, tuned, args)
    sections = [_section(path, rows[path], args) for path in paths]
    compared = [r for p, found in rows.items() if not p.stem.startswith(ABLATION) for r in found]
    results = Results(compared)
    totals = summary(results, report_live.least_margin(live))
    shown = report_live.section(live, simulated) if live else ""
    said = {
        "command": _command(args),
        "folder": str(args.scenarios),
        "size": _described([r for found in rows.values() for r in found]),
        "tuned": _knobs(tuned),
    }
    _write(args.out, totals, page(said, totals, results, sections, shown), said)
    print(json.dumps(totals["summary"], indent=1))
    return 0


def _size(args: argparse.Namespace) -> Size:
    size = QUICK if args.quick else Size()
    return replace(
        size,
        workflows=args.workflows or size.workflows,
        seeds=args.seeds or size.seeds,
        loads=tuple(args.loads or size.loads),
    )


def _command(args: argparse.Namespace) -> str:
    """Return the command that was run, without what changes no figure."""
    words = ["hexgen-vllm bench report"]
    words += ["--quick"] * args.quick
    for name in ("only", "workflows", "seeds", "loads", "live", "simulated"):
        value = getattr(args, name)
        if value is not None:
            listed = value if isinstance(value, list) else [value]
            words.append(" ".join((f"--{name}", *map(str, listed))))
    return " ".join(words)


def _given(path: Path | None) -> list[Row]:
    if path is not None and not path.exists():
        raise ConfigError(f"there is no file {path}.")
    return [] if path is None else files.read(path)


def _paths(folder: Path, only: list[str] | None) -> list[Path]:
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not found:
        raise ConfigError(f"there is no scenario file in {folder}.")
    for name in only or ():
        if name not in found:
            raise ConfigError(f"there is no scenario {name!r} in {folder}.")
    return [path for name, path in found.items() if not only or name in only]


def _tuned(args: argparse.Namespace, size: Size) -> dict[str, Knobs]:
    """Return the knobs found in the training scenarios, nothing where none are played."""
    paths = sorted((args.scenarios / _TRAIN).glob("*.yaml")) if size.tuned else []
    if not paths:
        return {}
    cells = training({path: load(path) for path in paths}, replace(size, loads=()))
    return best_knobs(cells, play_all(cells, args.work, args.workers, _progress))


def _played(
    scenarios: Mapping[Path, Scenario],
    size: Size,
    tuned: Mapping[str, Knobs],
    args: argparse.Namespace,
) -> dict[Path, list[Row]]:
    """Play everything; what is capped needs the caps first."""
    trials = {p: capping(p, s, size) for p, s in scenarios.items() if not _ablates(p)}
    caps = {p: best_caps(trials[p], rows) for p, rows in _play(trials, args).items()}
    cells = {
        p: ablated(p, s, size) if _ablates(p) else planned(p, s, size, tuned, caps[p])
        for p, s in scenarios.items()
    }
    return {path: best_alpha(rows) for path, rows in _play(cells, args).items()}


def _ablates(path: Path) -> bool:
    return path.stem.startswith(ABLATION)


def _play(cells: Mapping[Path, list[Any]], args: argparse.Namespace) -> dict[Path, list[Row]]:
    listed = [cell for group in cells.values() for cell in group]
    rows = iter(play_all(listed, args.work, args.workers, _progress))
    return {path: [next(rows) for _ in group] for path, group in cells.items()}


def _progress(count: int, total: int) -> None:
    if count == total or count % 20 == 0:
        print(f"{count} of {total} runs", file=sys.stderr, flush=True)


def _section(path: Path, rows: list[Row], args: argparse.Namespace) -> Section:
    comments = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    drawn = () if args.no_plots or _ablates(path) else _DRAWN_LOADS
    plots = tuple(
        _drawn(path.stem, at, rows, args.out) for at in drawn if any(r["load"] == at for r in rows)
    )
    if rows and all(row.get("rates") == "true" for row in rows):
        comments += " Played with true rates."
    return Section(path.stem, comments, Results(rows), plots)


def _drawn(name: str, at: float, rows: list[Row], out: Path) -> str:
    """Draw attainment of ours and the five best rivals at one load; return the link to it."""
    link = f"evaluation/{name}-{at:g}.png"
    shown = [row for row in rows if row["load"] == at and row["policy"] != TRUE_RATES]
    totals: dict[str, float] = {}
    for row in shown:
        totals[row["policy"]] = totals.get(row["policy"], 0.0) - row["share_on_time"]
        totals[row["policy"]] += 1e-6 * (row["min_deadline_95_s"] or 1e5)
    best = sorted(totals, key=lambda name: (not name.startswith(OURS), totals[name]))[:7]
    draw_attainment([row for row in shown if row["policy"] in best], out / link)
    return link


def _described(rows: list[Row]) -> str:
    """Return in one sentence how much was played."""
    workflows = sorted({row["workflows"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    text = " or ".join(map(str, workflows))
    return f"{len(rows)} runs of {text} workflows, seeds {', '.join(map(str, seeds))}."


def _knobs(tuned: Mapping[str, Knobs]) -> str:
    if not tuned:
        return "not in this run: all at their defaults"
    found = [
        f"{name}: {', '.join(f'{k} {v:g}' for k, v in knobs)}" for name, knobs in tuned.items()
    ]
    return "; ".join(found)


def _write(out: Path, totals: dict[str, Any], text: str, said: Mapping[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.md").write_text(text, encoding="utf-8")
    content = {**totals, **said}
    (out / "evaluation.json").write_text(
        json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
