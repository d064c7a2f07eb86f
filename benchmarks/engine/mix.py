"""``hexgen-vllm bench mix``: one engine without a router, with and without deadlines.

Simulated, on an 8B-class engine: interactive calls beside a backlog of long generations, in bursts
(A), with few places in the batch (B), and all the time (``steady``); more work with deadlines than
the engine can do (C); agents with long contexts (D). And bursts beside a backlog on a real engine
(``A_live``, :mod:`benchmarks.engine.live_mix`). Beside ours stand stock vLLM first come first
served, its priority scheduling with several ``max_num_seqs``, least attained service and shortest
remaining work as its priorities, and ours with true lengths as what better estimates could bring.

What is interactive counts as on time; batch is what calls without deadline wrote, in per cent of
what the engine writes with nothing else to do. A row of priority scheduling is chosen for it, not
by us: the number of places with which most interactive workflows are on time.

The bound: of the time of an engine, the interactive calls need at least their prefills and what
they add to steps that run anyway; batch cannot get more than the rest of its best rate.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.engine.alone import Alone, Flow, Rank, rate
from benchmarks.engine.mix_plot import draw
from benchmarks.engine.mix_scenarios import (
    BATCH,
    COPY_TOKENS_PER_S,
    LONG,
    SHORT,
    Mix,
    agents,
    mixed,
    overload,
)
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.outlook import Outlook
from hexgen_vllm.report import results as files
from hexgen_vllm.report.plot import check_plot
from hexgen_vllm.report.summary import percentile
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec

_PLACES: Final = {256: (256, 128, 64, 32), 32: (32, 16, 8)}
_LIVE_PLACES: Final = (48, 24, 12)
_SECONDS: Final = 240.0
_OVERLOAD_SECONDS: Final = 600.0
_AGENT_SECONDS: Final = 1200.0
_AGENT_DEADLINE: Final = 4.0
_QUIET: Final = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

Points = dict[str, tuple[float, float]]
"""By policy: on time, and batch, in per cent."""


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one mix.

    Attributes:
        on_time: share of workflows on time by type, in per cent.
        interactive: the same of all with a deadline.
        batch: tokens per second of those without.
        preemptions: preemptions.
        given_up: tokens that calls without deadline did not write for the others.
        flows: the workflows.
    """

    on_time: Mapping[str, float]
    interactive: float
    batch: float
    preemptions: int
    given_up: int
    flows: Sequence[Flow]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="what to play"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of loads")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="virtual seconds of each mix, at least 120"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--plot", type=Path, help="image of on time against batch to draw")


def main(args: argparse.Namespace) -> int:
    """Play, print tables, write the JSON file and the plot.

    Raises:
        ConfigError: it is too short to measure anything, or no plot can be drawn.
        UnsupportedVLLM: ``A_live`` is asked for, and vLLM is missing or not supported.
    """
    if not 120 <= args.seconds < math.inf:
        raise ConfigError(f"seconds must be at least 120, not {args.seconds:g}.")
    if args.plot is not None:
        check_plot(args.plot)
    if "A_live" in args.scenarios:
        import_module("hexgen_vllm.engine.compat")  # before minutes of other things are played
    results: dict[str, Any] = {}
    for name in args.scenarios:
        results |= SCENARIOS[name](args.seeds, args.seconds)
    if args.plot is not None:
        draw({name: found for name, found in results.items() if _has_points(found)}, args.plot)
    if args.json is not None:
        files.write(args.json, results)
    return 0


def _has_points(found: object) -> bool:
    return isinstance(found, dict) and "bound_pct" in found


def play(
    mix: Mix,
    specs: Sequence[WorkflowSpec],
    options: EngineOptions | None = None,
    *,
    rank: Rank | None = None,
    estimates: str = "learned",
    slots: int | None = None,
    copies: bool = False,
    keep_turns: bool = False,
) -> Outcome:
    """Return what an engine makes of ``specs``.

    Args:
        mix: the engine, deadlines and what is measured.
        specs: the workflows.
        options: ours; ``None`` is stock vLLM.
        rank: stock vLLM's priorities.
        estimates: see :class:`benchmarks.engine.alone.Alone`.
        slots: calls in a full batch, if not the engine's.
        copies: KV of preempted calls goes to host memory where that pays.
        keep_turns: see :class:`benchmarks.engine.alone.Alone`.
    """
    model = replace(
        mix.engine,
        max_num_seqs=slots or mix.engine.max_num_seqs,
        kv_copy_tokens_per_s=COPY_TOKENS_PER_S if copies or keep_turns else None,
    )
    alone = Alone(
        model,
        options,
        mix.deadlines_s,
        rank=rank,
        estimates=estimates,
        think=mix.think,
        keep_turns=keep_turns,
    )
    alone.run(specs, mix.to_s + 1e-3, (mix.from_s, mix.to_s))
    counted: dict[str, list[bool]] = {}
    for flow in alone.flows:
        if mix.from_s <= flow.started_s and flow.deadline_s <= mix.to_s:
            counted.setdefault(flow.spec.type, []).append(flow.on_time)
    pacer = alone.engine.scheduler.pacer
    return Outcome(
        {kind: 100 * fmean(on) for kind, on in sorted(counted.items())},
        100 * fmean([one for on in counted.values() for one in on]) if counted else 0.0,
        rate(alone.marks, BATCH, mix.from_s, mix.to_s),
        alone.engine.batch.preemptions,
        0 if pacer is None else pacer.control.given_up,
        alone.flows,
    )


def by_class(flow: Flow, call: CallSpec, outlook: Outlook) -> float:
    """Return what a user of ``--scheduling-policy priority`` would send: batch comes second."""
    return 0.0 if flow.asked_s < math.inf else 1.0


def attained(flow: Flow, call: CallSpec, outlook: Outlook) -> float:
    """Return least attained service (PLAS): the workflow that got the fewest tokens first."""
    return float(flow.served)


def remaining(flow: Flow, call: CallSpec, outlook: Outlook) -> float:
    """Return shortest remaining work: the call expected to write least first."""
    return float(outlook.usual_tokens)


def by_deadline(flow: Flow, call: CallSpec, outlook: Outlook) -> float:
    """Return earliest deadline first."""
    return flow.deadline_s


def _policies(mix: Mix) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "fcfs", {}
    for slots in _PLACES.get(mix.engine.max_num_seqs, (mix.engine.max_num_seqs,)):
        yield f"priority, {slots} places", {"rank": by_class, "slots": slots}
    yield "plas", {"rank": attained}
    yield "srpt", {"rank": remaining}
    yield "ours", {"options": EngineOptions()}
    if mix.batch:
        yield "ours, KV to host", {"options": EngineOptions(), "copies": True}
        yield "ours, pace off", {"options": EngineOptions(pace=False)}
    yield "ours, true lengths", {"options": EngineOptions(), "estimates": "true"}


def _beside_backlog(
    name: str, seeds: Sequence[int], *, slots: int, bursts: bool, seconds: float
) -> dict[str, Any]:
    """Play one of the mixes with a backlog; return its part of the JSON file."""
    rows: dict[str, list[tuple[float, float]]] = {}
    bounds = []
    for seed in seeds:
        mix = mixed(seed, slots=slots, bursts=bursts, seconds=seconds)
        alone = play(mix, mix.interactive).interactive
        most = play(mix, mix.batch).batch
        best = max(most, *_other_rates(mix))
        bounds.append(100 * best / most * (1.0 - _least_share(mix)))
        for policy, how in _policies(mix):
            found = play(mix, mix.all, **how)
            point = (100 * found.interactive / alone, 100 * found.batch / most)
            rows.setdefault(policy, []).append(point)
    print(f"\n{name}: on time in % of interactive alone (worst seed), batch in % of batch alone")
    means, stock = _tabulate(rows, fmean(bounds))
    return {
        name: {
            "interactive_pct_of_alone": means["ours"][0],
            "interactive_pct_of_alone_swap": means["ours, KV to host"][0],
            "batch_pct": means["ours"][1],
            "batch_pct_swap": means["ours, KV to host"][1],
            "priority_interactive_pct": stock[0],
            "priority_batch_pct": stock[1],
            **_points(means, fmean(bounds)),
        }
    }


def _other_rates(mix: Mix) -> Iterator[float]:
    """Yield what batch alone writes with KV to host, and with fewer places."""
    yield play(mix, mix.batch, copies=True).batch
    for slots in _PLACES.get(mix.engine.max_num_seqs, ())[1:]:
        yield play(mix, mix.batch, slots=slots).batch


def _least_share(mix: Mix) -> float:
    """Return the share of the engine's time that interactive calls need at the very least."""
    cost, needed_s = mix.engine.cost, 0.0
    for spec in mix.interactive:
        if mix.from_s <= spec.arrival_s < mix.to_s:
            for call in (call for group in spec.stages for call in group):
                needed_s += cost.p1 * call.own_tokens
                context = call.prompt_tokens + call.output_tokens / 2
                needed_s += call.output_tokens * (cost.c1 + cost.c2 * context)
    return needed_s / (mix.to_s - mix.from_s)


def _tabulate(
    rows: Mapping[str, Sequence[tuple[float, float]]], bound: float
) -> tuple[Points, tuple[float, float]]:
    """Print a table; return the means by policy, and those of priority with its best places."""
    means = {
        policy: (fmean(on for on, _ in points), fmean(batch for _, batch in points))
        for policy, points in rows.items()
    }
    for policy, (on, batch) in means.items():
        least = min(on for on, _ in rows[policy])
        print(f"  {policy:22s} {on:6.1f} ({least:5.1f})   {batch:6.1f}")
    print(f"  {'bound':22s} {100:6.1f}           {bound:6.1f}", flush=True)
    return means, max(point for policy, point in means.items() if policy.startswith("priority"))


def _points(means: Points, bound: float) -> dict[str, Any]:
    points = {p: {"interactive_pct": on, "batch_pct": batch} for p, (on, batch) in means.items()}
    return {"bound_pct": bound, "policies": points}


def _overload(seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """Play the overload; return its part of the JSON file."""
    ways: dict[str, dict[str, Any]] = {
        "fcfs": {},
        "edf": {"rank": by_deadline},
        "srpt": {"rank": remaining},
        "ours, late calls not demoted": {"options": EngineOptions(demote_late=False)},
        "ours, one mean length": {"options": EngineOptions(), "estimates": "mean"},
        "ours": {"options": EngineOptions()},
        "ours, true lengths": {"options": EngineOptions(), "estimates": "true"},
    }
    length_s = max(seconds, _OVERLOAD_SECONDS)
    mixes = [overload(seed, seconds=length_s) for seed in seeds]
    means: dict[str, dict[str, float]] = {}
    print("\nC: on time in %, short and long calls")
    for policy, how in ways.items():
        found = [play(mix, mix.all, **how).on_time for mix in mixes]
        means[policy] = {kind: fmean(one[kind] for one in found) for kind in (SHORT, LONG)}
        print(f"  {policy:30s} {means[policy][SHORT]:6.1f} {means[policy][LONG]:6.1f}", flush=True)
    ours = means["ours"]
    return {"C": {"short_pct": ours[SHORT], "long_pct": ours[LONG], "policies": means}}


def _agents(seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """Play agents with long contexts; return their part of the JSON file."""
    ways: dict[str, dict[str, Any]] = {
        "fcfs": {},
        "edf": {"rank": by_deadline},
        "plas": {"rank": attained},
        "ours": {"options": EngineOptions()},
        "fcfs, KV of turns to host": {"keep_turns": True},
        "ours, KV of turns to host": {"options": EngineOptions(), "keep_turns": True},
        "the same, late calls not demoted": {
            "options": EngineOptions(demote_late=False),
            "keep_turns": True,
        },
    }
    ratios: dict[str, list[float]] = {}
    for seed in seeds:
        mix = agents(seed, seconds=max(seconds, _AGENT_SECONDS))
        alone_s = _alone_s(mix)
        due = replace(mix, deadlines_s=_multiples(alone_s))
        for policy, how in ways.items():
            ratios.setdefault(policy, []).extend(
                ((due.to_s if f.ended_s is None else f.ended_s) - f.started_s)
                / alone_s[f.spec.workflow_id]
                for f in play(due, due.all, **how).flows
            )
    print("\nD: time of an agent over its time alone: P50, P95; within 4 times, in %")
    found = {}
    for policy, values in ratios.items():
        p50, p95 = percentile(values, 0.5), percentile(values, 0.95)
        on = 100 * fmean(value <= _AGENT_DEADLINE for value in values)
        found[policy] = {"p50_over_alone": p50, "p95_over_alone": p95, "on_time_pct": on}
        print(f"  {policy:32s} {p50:6.2f} {p95:6.2f}   {on:6.1f}", flush=True)
    return {
        "D": {
            "p95_over_alone": found["ours, KV of turns to host"]["p95_over_alone"],
            "p95_over_alone_device_only": found["ours"]["p95_over_alone"],
            "fcfs_p95_over_alone": found["fcfs"]["p95_over_alone"],
            "policies": found,
        }
    }


def _multiples(alone_s: Mapping[str, float]) -> Callable[[WorkflowSpec], float]:
    return lambda spec: _AGENT_DEADLINE * alone_s[spec.workflow_id]


def _alone_s(mix: Mix) -> dict[str, float]:
    """Return the seconds that each workflow takes on an idle engine."""
    apart = [replace(spec, arrival_s=1e4 * i) for i, spec in enumerate(mix.interactive)]
    flows = play(replace(mix, to_s=1e4 * len(apart)), apart).flows
    return {f.spec.workflow_id: f.ended_s - f.started_s for f in flows if f.ended_s is not None}


def _plain(seeds: Sequence[int], seconds: float) -> dict[str, float]:
    """Play calls that say nothing on ours and on stock vLLM; return ours over stock."""
    ratios = []
    for seed in seeds:
        mix = mixed(seed, slots=256, bursts=True, seconds=seconds)
        plain = replace(mix, deadlines_s=lambda _: math.inf)
        stock = play(plain, mix.batch).batch
        ratios.append(play(plain, mix.batch, EngineOptions()).batch / stock)
    print(f"\nplain: batch alone, ours over stock: {fmean(ratios):.4f}", flush=True)
    return {"plain_over_stock": fmean(ratios)}


def _live(seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """Play bursts beside a backlog on a real engine; return their part of the JSON file."""
    del seconds
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = "1"  # CPU time of several threads would be no time
    live = import_module("benchmarks.engine.live_mix")
    tiny = import_module("hexgen_vllm.testing.tiny_model")
    ways = {
        "fcfs": ("fcfs", live.SLOTS),
        **{f"priority, {places} places": ("priority", places) for places in _LIVE_PLACES},
        "ours": ("ours", live.SLOTS),
    }
    rows: dict[str, list[tuple[float, float]]] = {}
    loads = [live.LiveLoad(seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny.build(Path(folder), tiny.TinySpec(hidden=128, layers=2)))
        with live.engine(model, "fcfs") as engine:
            most = fmean(engine.play(replace(load, chats=False)).batch for load in loads)
        for policy, how in ways.items():
            for load in loads:
                with live.engine(model, *how) as engine:
                    found = engine.play(load)
                rows.setdefault(policy, []).append((found.interactive, 100 * found.batch / most))
    print("\nA_live: a real engine: on time in % (worst seed), batch in % of batch alone")
    bound = 100 * (1.0 - fmean(load.least_share() for load in loads))
    means, stock = _tabulate(rows, bound)
    return {
        "A_live": {
            "interactive_pct": means["ours"][0],
            "batch_pct": means["ours"][1],
            "priority_interactive_pct": stock[0],
            "priority_batch_pct": stock[1],
            **_points(means, bound),
        }
    }


SCENARIOS: Final[Mapping[str, Callable[[Sequence[int], float], dict[str, Any]]]] = {
    "A": lambda seeds, s: _beside_backlog("A", seeds, slots=256, bursts=True, seconds=s),
    "A_live": _live,
    "B": lambda seeds, s: _beside_backlog("B", seeds, slots=32, bursts=True, seconds=s),
    "C": _overload,
    "D": _agents,
    "steady": lambda seeds, s: _beside_backlog("steady", seeds, slots=256, bursts=False, seconds=s),
    "plain": _plain,
}
