"""``hexgen-vllm bench report``: plays the evaluation and writes its page, figures and plots.

It can be interrupted: finished runs are kept in ``--work`` and not played again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.bench import report_live
from hexgen_vllm.bench import results as files
from hexgen_vllm.bench.evaluation import Figures, goals, summary
from hexgen_vllm.bench.plot import draw_attainment, require_matplotlib
from hexgen_vllm.bench.report_page import ABLATION, Section, page
from hexgen_vllm.bench.report_runs import Row, Size, planned, play_all, tuned, tuning
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.scenario import Scenario
from hexgen_vllm.sim.scenario_file import load

QUICK: Final = Size(workflows=300, seeds=2, loads=(0.3, 0.45, 0.6, 0.7, 0.8, 0.875, 1.3, 2.0))
_DRAWN_LOADS: Final = (0.8, 1.3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench report``."""
    add = parser.add_argument
    folder = Path("examples/scenarios/evaluation")
    add("--scenarios", type=Path, default=folder, metavar="DIR", help=f"default: {folder}")
    add("--only", nargs="+", metavar="NAME", help="names of scenario files, without .yaml")
    add("--out", type=Path, default=Path("docs"), metavar="DIR", help="default: docs")
    add("--work", type=Path, default=Path(".cache/evaluation"), metavar="DIR", help="finished runs")
    add("--workers", type=int, default=2, help="processes (default: 2)")
    add("--quick", action="store_true", help="few workflows, seeds and loads: minutes, not hours")
    add("--workflows", type=int, help="workflows that count, instead of the scenarios' own")
    add("--loads", nargs="+", type=float, help="of the scenarios' loads, only these")
    add("--live", type=Path, metavar="JSON", help="results of hexgen_vllm.demo with vllm-router")
    add("--simulated", type=Path, metavar="JSON", help="results of hexgen-vllm sim, beside --live")
    add("--no-plots", action="store_true", help="draw nothing")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: an option or a file cannot be used.
    """
    if args.workers < 1 or (args.workflows is not None and args.workflows < 1):
        raise ConfigError("--workers and --workflows must be at least 1.")
    paths = _paths(args.scenarios, args.only)
    files.check_writable(args.out / "evaluation.md")
    if not args.no_plots:
        require_matplotlib()
    size = QUICK if args.quick else Size()
    size = Size(args.workflows or size.workflows, size.seeds, tuple(args.loads or size.loads))
    scenarios = {path: load(path) for path in paths}
    live, simulated = (_given(path) for path in (args.live, args.simulated))
    rows, alphas = _played(scenarios, size, args)
    sections = [_section(p, rows[p], alphas.get(p, {}), args) for p in paths]
    totals = summary({s.name: s.goals for s in sections if not s.name.startswith(ABLATION)})
    totals["summary"][report_live.KEY] = report_live.ratio(live)
    described = _described([r for found in rows.values() for r in found], quick=args.quick)
    shown = report_live.section(live, simulated) if live else ""
    _write(args, described, totals, sections, shown)
    print(json.dumps(totals["summary"], indent=1))
    return 0


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


def _played(
    scenarios: dict[Path, Scenario], size: Size, args: argparse.Namespace
) -> tuple[dict[Path, list[Row]], dict[Path, dict[float, float]]]:
    """Play everything in two rounds: the second needs the alphas found in the first."""
    first = {p: planned(p, s, size) for p, s in scenarios.items()}
    trials = {p: tuning(p, s, size) for p, s in scenarios.items()}
    rows = _play({p: [*trials[p], *first[p]] for p in scenarios}, args)
    second, alphas = {}, {}
    for path, scenario in scenarios.items():
        if trials[path]:
            found = rows[path][: len(trials[path])]
            second[path], alphas[path] = tuned(path, scenario, size, found)
    best = _play(second, args)
    return {p: [*best.get(p, []), *rows[p][len(trials[p]) :]] for p in scenarios}, alphas


def _play(cells: dict[Path, list[Any]], args: argparse.Namespace) -> dict[Path, list[Row]]:
    listed = [cell for group in cells.values() for cell in group]
    rows = iter(play_all(listed, args.work, args.workers, _progress))
    return {path: [next(rows) for _ in group] for path, group in cells.items()}


def _progress(count: int, total: int) -> None:
    if count == total or count % 20 == 0:
        print(f"{count} of {total} runs", file=sys.stderr, flush=True)


def _section(
    path: Path, rows: list[Row], alphas: dict[float, float], args: argparse.Namespace
) -> Section:
    figures = Figures(rows)
    comments = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    values = {} if path.stem.startswith(ABLATION) else goals(figures)
    drawn = () if args.no_plots or not values else _DRAWN_LOADS
    plots = tuple(
        _drawn(path.stem, at, rows, args.out) for at in drawn if any(r["load"] == at for r in rows)
    )
    if any(row.get("rates") == "true" for row in rows):
        comments += " Played with true rates."
    return Section(path.stem, comments, figures, values, alphas, plots)


def _drawn(name: str, at: float, rows: list[Row], out: Path) -> str:
    """Draw attainment at one load; return the link to it."""
    link = f"evaluation/{name}-{at:g}.png"
    draw_attainment([row for row in rows if row["load"] == at], out / link)
    return link


def _described(rows: list[Row], *, quick: bool) -> str:
    """Return in one sentence how much was played, and with which option if that matters."""
    workflows = sorted({row["workflows"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    text = " or ".join(map(str, workflows))
    how = " (`--quick`)" if quick else ""
    return f"Played{how}: {len(rows)} runs of {text} workflows, seeds {', '.join(map(str, seeds))}."


def _write(
    args: argparse.Namespace,
    size: str,
    totals: dict[str, Any],
    sections: list[Section],
    live: str,
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    text = page(str(args.scenarios), size, totals, sections, live)
    (args.out / "evaluation.md").write_text(text, encoding="utf-8")
    by_scenario = {s.name: dict(s.goals) for s in sections if s.goals}
    content = {**totals, "scenarios": by_scenario, "size": size}
    (args.out / "evaluation.json").write_text(
        json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
