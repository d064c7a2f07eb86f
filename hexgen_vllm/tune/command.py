"""``hexgen-vllm tune``: searches the knobs of a policy on recent workflows and a measured fleet."""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import RENAMED, check, from_mapping, given, option, todays_name
from hexgen_vllm.option import add_arguments as add_options
from hexgen_vllm.report import results
from hexgen_vllm.report.plot import check_plot
from hexgen_vllm.sim.limits import limits
from hexgen_vllm.sim.policies import NAMES, Policy, named
from hexgen_vllm.sim.scenario_file import load_fleet, load_simulation
from hexgen_vllm.tune import report, rivals
from hexgen_vllm.tune.evaluate import Evaluator, Setting, capacity_of, tuned
from hexgen_vllm.tune.knobs import Knob, changed, defaults, knobs_for, values_of
from hexgen_vllm.tune.objective import OBJECTIVES, chosen
from hexgen_vllm.tune.online import PRESENT, TUNED
from hexgen_vllm.tune.replay import Generated, Recent, read
from hexgen_vllm.tune.rivals import against_baseline, compare_rates
from hexgen_vllm.tune.search import Search
from hexgen_vllm.tune.verdict import Entrant, Verdict, judge, race
from hexgen_vllm.wire import plain

_TUNED: Final = ("paper", "slack")


@dataclass(frozen=True)
class TuneOptions:
    """What is searched, and on what."""

    policy: str = option("slack", "what is tuned", choices=_TUNED, renamed=RENAMED)
    objective: str = option("min_deadline_95", "what for", choices=tuple(OBJECTIVES))
    knobs: tuple[str, ...] = option((), "only these knobs; none is all of the policy")
    grid: int | None = option(None, "points of a grid over the only knob, not a search", least=2)
    budget: int = option(60, "simulations of a search", least=6)
    workflows: int = option(300, "workflows of one simulation that count", least=20)
    warmup: int = option(30, "workflows before them", least=0)
    rate: float | None = option(None, "arrivals, workflows/s; none is as recorded", least=1e-6)
    load: float | None = option(None, "the same as a share of the capacity λ*", least=1e-3)
    deadline_s: float | None = option(
        None, "deadline, seconds; none is as recorded, or else by its scale", least=1e-3
    )
    deadline_scale: float = option(2.0, "deadline in multiples of the base SLO", least=1e-3)
    base_s: float | None = option(
        None, "base SLO, seconds; none is the mean critical path on an idle engine", least=1e-3
    )
    confirm: int = option(5, "fresh seeds on which a proposal has to prove itself", least=2)
    deadline_by: str = option(
        "base",
        "what deadline_scale multiplies: the base SLO, or each workflow's own time alone",
        choices=("base", "own"),
    )
    jobs: int = option(1, "simulations at a time", least=1, most=256)

    def __post_init__(self) -> None:
        check(self)
        if self.rate is not None and self.load is not None:
            raise ConfigError("rate and load cannot both be given.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm tune``."""
    add = parser.add_argument
    add("--fleet", type=Path, required=True, metavar="FLEET.yaml", help="engines, calibrated")
    add("--trace", type=Path, metavar="RECENT.jsonl", help="recent workflows, or a public trace")
    add_options(parser, TuneOptions)
    add("--seed", nargs="+", type=int, default=[1, 2, 3], dest="seeds", help="workloads to play")
    add("--dispatch", nargs="+", default=[], metavar="OPTION=X", help="placement options in force")
    add("--live", action="store_true", help="only knobs that a running router can turn")
    add("--nice", type=int, default=0, metavar="N", help="lower this process's priority by N")
    add("--weight", nargs="+", default=[], metavar="TENANT=W", help="for --objective tenants")
    add(
        "--rivals",
        nargs="+",
        metavar="POLICY",
        help="what a proposal has to beat, or none; all placements of others, with EDF, by default",
    )
    add(
        "--baseline",
        metavar="POLICY",
        type=todays_name,
        choices=NAMES,
        help="compare with this policy",
    )
    add("--sustained", action="store_true", help="with --baseline: compare sustained rates, too")
    add("--json", type=Path, metavar="OUT", help="write all candidates here")
    add("--plot", type=Path, metavar="OUT.png", help="draw loss against knobs here")
    add("--out", type=Path, metavar="CONFIG.yaml", help="write the proposed configuration here")
    add("--router-out", type=Path, metavar="ROUTER.yaml", help="and here for router --config")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: an option or a file cannot be used.
    """
    options = from_mapping(TuneOptions, given(args, TuneOptions))
    for path in (args.json, args.plot, args.out, args.router_out):
        results.check_writable(path)
    if args.plot:
        check_plot(args.plot)
    os.nice(args.nice)
    policy = named(options.policy, _dispatch(args.dispatch))
    knobs = _knobs(policy, options, live=args.live)
    others = _rivals(args, options, policy)
    setting = _setting(args, options)
    objective, heading = chosen(options.objective, _numbers(args.weight, "--weight"))
    with Evaluator(setting, policy, objective, options.jobs) as evaluate:
        search = Search(evaluate, args.seeds, defaults(policy, knobs))
        _search(search, knobs, options)
        print(_workload(setting))
        print(report.table(search, knobs, heading, by_value=options.grid is not None))
        verdict = _verdict(evaluate, search, policy, others, _fresh(args, options))
    print(f"\n{report.contest(verdict, heading, options.confirm)}")
    found = _summary(args, options, setting, search, verdict)
    if args.plot:
        report.draw(search, knobs, heading, args.plot)
    if args.json:
        results.write(args.json, [found])
    best = report.config(verdict.proposed.policy if verdict.proposed else policy, knobs)
    if args.out:
        report.write_config(args.out, best)
    if args.router_out:
        report.write_config(args.router_out, report.router_config(best))
    return 0


def _rivals(args: argparse.Namespace, options: TuneOptions, policy: Policy) -> list[Policy]:
    """Return the policies that a proposal has to beat."""
    names = args.rivals
    if names is None:
        names = [] if options.grid is not None else [*rivals.others(policy)]
    elif names == ["none"]:
        names = []
    return [rivals.rival(policy, name, live=args.live) for name in names]


def _fresh(args: argparse.Namespace, options: TuneOptions) -> list[int]:
    """Return seeds that the search does not see."""
    return [max(args.seeds) + 1 + index for index in range(options.confirm)]


def _verdict(
    evaluate: Evaluator, search: Search, policy: Policy, others: list[Policy], fresh: list[int]
) -> Verdict:
    """Play what was found on fresh seeds, beside what is in force and the rivals."""
    found = search.best()
    contenders = [Entrant(PRESENT, policy)]
    if found is not search.present:
        contenders.append(Entrant(f"{policy.name}{TUNED}", tuned(policy, found.values)))
    contenders.extend(Entrant(other.name, other) for other in others)
    race(contenders, fresh, evaluate.play)
    return judge(contenders, fresh)


def _dispatch(pairs: list[str]) -> DispatchOptions:
    """Return placement options; those that are whole numbers come as such."""
    values = _numbers(pairs, "--dispatch")
    return from_mapping(DispatchOptions, values, where="placement option")


def _knobs(policy: Policy, options: TuneOptions, *, live: bool) -> list[Knob]:
    knobs = knobs_for(policy, options.knobs, live=live)
    if options.grid is None:
        return knobs
    if not options.knobs and policy.name == "paper":
        return knobs[:1]  # the paper's grid is over alpha
    if len(knobs) != 1:
        raise ConfigError("grid takes exactly one knob; name it with --knobs.")
    return knobs


def _search(search: Search, knobs: list[Knob], options: TuneOptions) -> None:
    if options.grid is not None:
        search.grid(knobs[0], options.grid)
    else:
        search.halving(knobs, options.budget, random.Random(0))


def _setting(args: argparse.Namespace, options: TuneOptions) -> Setting:
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ConfigError("--seed must be different whole numbers, 0 or more.")
    fleet = load_fleet(args.fleet)
    recent: Recent = read(args.trace) if args.trace else Generated()
    bounds = limits(fleet, recent.draw(options.workflows, args.seeds[0]))
    rate = options.rate or (
        options.load * capacity_of(fleet, bounds) if options.load else recent.rate_per_s
    )
    if rate is None:
        raise ConfigError("the workload has no times; give --rate or --load.")
    base_s = options.base_s or bounds.base_s
    own = options.deadline_by == "own"
    deadline_s = options.deadline_s or recent.deadline_s or options.deadline_scale * base_s
    return Setting(
        fleet,
        recent,
        options.workflows,
        options.warmup,
        rate,
        options.deadline_scale if own else deadline_s,
        1.0 if own else base_s,
        load_simulation(args.fleet),
        own,
    )


def _numbers(pairs: list[str], flag: str) -> dict[str, float]:
    """Read pairs like ``name=0.5``."""
    values = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"{flag} must be NAME=NUMBER, not {pair!r}.") from None
    return values


def _workload(setting: Setting) -> str:
    bounds = setting.bounds
    best = capacity_of(setting.fleet, bounds)
    if setting.own:
        return (
            f"{setting.workflows} workflows at {setting.rate_per_s:.3f}/s "
            f"({setting.rate_per_s / best:.2f} of λ* {best:.3f}/s), deadlines "
            f"{setting.deadline_s:g} x each workflow's own time alone; losses are such multiples\n"
        )
    return (
        f"{setting.workflows} workflows at {setting.rate_per_s:.3f}/s "
        f"({setting.rate_per_s / best:.2f} of λ* {best:.3f}/s), base SLO {setting.base_s:.1f} s, "
        f"deadline {setting.deadline_s:.1f} s\n"
    )


def _summary(
    args: argparse.Namespace,
    options: TuneOptions,
    setting: Setting,
    search: Search,
    verdict: Verdict,
) -> dict[str, Any]:
    """Print the proposal and what it is compared with; return everything as a JSON object."""
    values: dict[str, float] = dict(search.present.values)
    if verdict.proposed is None:
        print(f"\nkeep what you have: {verdict.why}")
    else:
        policy = verdict.proposed.policy
        values = values_of(policy, search.present.values)
        if verdict.proposed is not verdict.found:
            values = changed(policy) | values
        words = ", ".join(f"{name} {value:g}" for name, value in values.items())
        print(f"\nproposed: {verdict.proposed.name}{f' ({words})' if words else ''}; {verdict.why}")
    found: dict[str, Any] = {
        "policy": options.policy,
        "objective": options.objective,
        "rate": setting.rate_per_s,
        "deadline_s": setting.deadline_s,
        "base_s": setting.base_s,
        "seeds": args.seeds,
        "proposed": values,
        "simulations": search.runs,
        "trials": [plain(asdict(trial), 6) for trial in search.trials],
        "verdict": verdict.told(),
    }
    if args.baseline:
        found["baseline"] = _baseline(args, setting, verdict)
        print("\n".join(f"{key}: {value}" for key, value in found["baseline"].items()))
    return found


def _baseline(args: argparse.Namespace, setting: Setting, verdict: Verdict) -> dict[str, Any]:
    """Return how the proposal, or else the best that the search found, does beside a baseline."""
    ours = verdict.proposed or verdict.found
    policy = ours.policy
    rival = against_baseline(setting, named(args.baseline), policy, args.seeds)
    if args.sustained:
        rival |= compare_rates(setting, named(args.baseline), policy, args.seeds)
    return rival
