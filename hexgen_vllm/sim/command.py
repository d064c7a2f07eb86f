"""``hexgen-vllm sim``: plays a scenario in virtual time and compares policies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.option import todays_name
from hexgen_vllm.report import results as files
from hexgen_vllm.report.plot import check_plot, draw_attainment
from hexgen_vllm.sim import against
from hexgen_vllm.sim.policies import NAMES, named
from hexgen_vllm.sim.results import Row, limits_text, row, simulate, summary_table
from hexgen_vllm.sim.scenario import Scenario, ScenarioRun
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.timeline import Timeline
from hexgen_vllm.sim.workloads.traces.formats import NAMES as NAMES_OF_FORMATS

Progress = Callable[[ScenarioRun, int, int, int], None]
"""Takes a run, its number, their count, and the workflows of it that have ended."""

_TOLD_WORKFLOWS: Final = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm sim``."""
    add = parser.add_argument
    add("scenario", type=Path, metavar="SCENARIO.yaml", help="what to play")
    add("--trace", type=Path, metavar="FILE", help="draw workflows from this trace instead")
    add("--trace-format", choices=NAMES_OF_FORMATS, help="format of --trace (default: auto)")
    add("--policy", nargs="+", metavar="NAME", dest="policies", help=f"of {', '.join(NAMES)}")
    add("--seed", nargs="+", type=int, dest="seeds", help="one run each")
    add(
        "--load",
        nargs="+",
        type=float,
        dest="loads",
        help="rates as shares of λ*, the fleet's capacity",
    )
    add("--rate", nargs="+", type=float, dest="rates", help="rates, workflows/s")
    add("--workflows", type=int, help="workflows that count")
    add(
        "--against",
        type=Path,
        metavar="LIVE.json",
        help="play the runs of this bench live result again on the scenario's fleet",
    )
    add(
        "--rates",
        choices=("fitted", "true"),
        dest="known_rates",
        help="what policies know of step costs: fitted to engine steps, as live, or the truth",
    )
    add("--json", type=Path, metavar="OUT", help="write results here")
    add("--plot", type=Path, metavar="OUT.png", help="draw attainment here, one image per load")
    add("--timeline", type=Path, metavar="OUT.json", help="write the one run as a Chrome trace")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: an option or a file cannot be used.
    """
    if args.against:
        return _against(args)
    scenario = _changed(load(args.scenario), args)
    for path in (args.json, args.plot, args.timeline):
        files.check_writable(path)
    if args.plot:
        if scenario.deadline.by == "own":
            raise ConfigError("--plot needs one deadline for all workflows: deadline.by base.")
        check_plot(args.plot)
    rows = play(scenario, _progress_line, args.timeline)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(summary_table(rows))
    if args.json:
        files.write(args.json, rows)
    if args.plot:
        _draw(rows, args.plot)
    return 0


def play(
    scenario: Scenario,
    progress: Progress | None = None,
    trace: Path | None = None,
) -> list[Row]:
    """Play all runs of a scenario and print its limits.

    Args:
        scenario: what to play.
        progress: called before each run, and each time a workflow of it has ended.
        trace: where a timeline goes; there must be only one run.

    Raises:
        ConfigError: there are several runs for one timeline.
    """
    bounds = scenario.limits()
    base_s = scenario.base_s(bounds)
    runs = scenario.runs(bounds.rate_per_s)
    if trace is not None and len(runs) > 1:
        raise ConfigError(
            f"--timeline shows one run, not {len(runs)}; choose one --policy, --load and --seed."
        )
    print(limits_text(bounds, scenario.deadline, base_s), end="\n\n")
    rows = []
    for index, run in enumerate(runs):
        timeline = None if trace is None else Timeline()
        told = None
        if progress is not None:
            told = partial(progress, run, index, len(runs))
            told(0)
        simulation = simulate(scenario, run, bounds, observer=timeline, progress=told)
        rows.append(row(scenario, run, bounds, simulation))
        if trace is not None and timeline is not None:
            shown = timeline.trace(simulation.workflows, simulation.calls)
            trace.write_text(json.dumps(shown) + "\n", encoding="utf-8")
    return rows


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw attainment, one image for each load."""
    loads = sorted({row["load"] for row in rows})
    for load_ in loads:
        shown = [row for row in rows if row["load"] == load_]
        name = path if len(loads) == 1 else path.with_stem(f"{path.stem}-{load_:.2f}")
        draw_attainment(shown, name)


def _against(args: argparse.Namespace) -> int:
    policies = args.policies or [None]
    if len(policies) > 1:
        raise ConfigError("--against takes one --policy.")
    policy = None if policies[0] is None else named(policies[0])
    files.check_writable(args.json)
    comparisons = against.play_results(args.against, args.scenario, policy)
    print(against.comparison_table(comparisons))
    if args.json:
        files.write(args.json, [comparison.simulated for comparison in comparisons])
    return 0


def _changed(scenario: Scenario, args: argparse.Namespace) -> Scenario:
    """Return ``scenario`` with what the command line says otherwise."""
    workload = scenario.workload
    if args.trace is not None:
        workload = replace(workload, trace=str(args.trace), format=args.trace_format or "auto")
    if args.workflows is not None:
        workload = replace(workload, workflows=args.workflows)
    scenario = replace(scenario, workload=workload)
    if args.loads or args.rates:
        arrivals = replace(
            scenario.arrivals,
            loads=tuple(args.loads or ()),
            rates=tuple(args.rates or ()),
            times_s=(),
        )
        scenario = replace(scenario, arrivals=arrivals)
    if args.known_rates is not None:
        simulation = replace(scenario.simulation, rates=args.known_rates)
        scenario = replace(scenario, simulation=simulation)
    if args.policies:
        known = {policy.name: policy for policy in scenario.policies}
        chosen = tuple(
            known.get(name) or known.get(todays_name(name)) or named(name) for name in args.policies
        )
        scenario = replace(scenario, policies=chosen)
    if args.seeds:
        if min(args.seeds) < 0:
            raise ConfigError("--seed must be 0 or more.")
        scenario = replace(scenario, seeds=tuple(dict.fromkeys(args.seeds)))
    return scenario


def _progress_line(run: ScenarioRun, index: int, count: int, ended: int) -> None:
    """Say which run it is; on a terminal also how far it is, in a line that is overwritten."""
    text = f"{index + 1}/{count}: {run.policy.name} at load {run.load:.2f}, seed {run.seed}"
    if sys.stderr.isatty():
        if ended % _TOLD_WORKFLOWS == 0:
            print(f"\r\x1b[K{text}, {ended} workflows", end="", file=sys.stderr, flush=True)
    elif ended == 0 and index * 10 // count > (index - 1) * 10 // count:
        print(text, file=sys.stderr, flush=True)


def _main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hexgen-vllm sim")
    add_arguments(parser)
    try:
        return main(parser.parse_args(argv))
    except HexgenError as error:
        print(f"hexgen-vllm sim: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_main())
