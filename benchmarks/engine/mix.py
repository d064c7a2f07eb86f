"""``hexgen-vllm bench mix``: one engine without a router, with and without deadlines.

Simulated, on an 8B-class engine. Interactive calls beside a backlog of long generations: in bursts
(A), with few places in the batch (B), and all the time (``steady``); and more work with deadlines
than the engine can do (C). Beside ours stand stock vLLM first come first served, its priority
scheduling with the best ``max_num_seqs`` out of those tried, least attained service and shortest
remaining work as its priorities, and ours with true lengths as what better estimates could bring.

What is interactive counts as on time; batch is what calls without deadline wrote, in per cent of
what the engine writes with nothing else to do. A row of priority scheduling is chosen for it, not
by us: the number of places with which most interactive workflows are on time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.engine.mix_scenarios import (
    BATCH,
    COPY_TOKENS_PER_S,
    LONG,
    SHORT,
    Mix,
    mixed,
    overload,
)
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.outlook import Outlook
from hexgen_vllm.sim.alone import Alone, Flow, Rank, rate
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec

_PLACES: Final = {256: (256, 128, 64, 32), 32: (32, 16, 8)}
_SCENARIOS: Final = ("A", "B", "C", "steady", "plain")
_SECONDS: Final = 240.0
_OVERLOAD_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one mix.

    Attributes:
        on_time: share of workflows on time by type, in per cent.
        interactive: the same of all with a deadline.
        batch: tokens per second of those without.
        preemptions: preemptions.
        given_up: tokens that calls without deadline did not write for the others.
    """

    on_time: Mapping[str, float]
    interactive: float
    batch: float
    preemptions: int
    given_up: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--scenarios", nargs="+", choices=_SCENARIOS, default=list(_SCENARIOS), help="what to play"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of loads")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="virtual seconds of each mix, at least 120"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")


def main(args: argparse.Namespace) -> int:
    """Play, print a table, write the JSON file.

    Raises:
        ConfigError: it is too short to measure anything.
    """
    if not 120 <= args.seconds < math.inf:
        raise ConfigError(f"seconds must be at least 120, not {args.seconds:g}.")
    results: dict[str, Any] = {}
    for name in args.scenarios:
        found = _SCENARIO[name](args.seeds, args.seconds)
        results[name] = found["plain_over_stock"] if name == "plain" else found
    if "plain" in results:
        results["plain_over_stock"] = results.pop("plain")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def play(
    mix: Mix,
    specs: Sequence[WorkflowSpec],
    options: EngineOptions | None = None,
    *,
    rank: Rank | None = None,
    estimates: str = "learned",
    slots: int | None = None,
    copies: bool = False,
) -> Outcome:
    """Return what an engine makes of ``specs``.

    Args:
        mix: the engine, deadlines and what is measured.
        specs: the workflows.
        options: ours; ``None`` is stock vLLM.
        rank: stock vLLM's priorities.
        estimates: see :class:`hexgen_vllm.sim.alone.Alone`.
        slots: calls in a full batch, if not the engine's.
        copies: KV of preempted calls goes to host memory where that pays.
    """
    model = replace(
        mix.engine,
        max_num_seqs=slots or mix.engine.max_num_seqs,
        kv_copy_tokens_per_s=COPY_TOKENS_PER_S if copies else None,
    )
    alone = Alone(model, options, mix.deadlines_s, rank=rank, estimates=estimates)
    alone.run(specs, mix.to_s + 1e-3, (mix.from_s, mix.to_s))
    counted: dict[str, list[bool]] = {}
    for flow in alone.flows:
        if mix.from_s <= flow.started_s and flow.deadline_s <= mix.to_s:
            counted.setdefault(flow.spec.type, []).append(flow.on_time)
    batch = alone.engine.batch
    return Outcome(
        {kind: 100 * fmean(on) for kind, on in sorted(counted.items())},
        100 * fmean([one for on in counted.values() for one in on]) if counted else 0.0,
        rate(alone.marks, BATCH, mix.from_s, mix.to_s),
        batch.preemptions,
        0 if batch.pacer is None else batch.pacer.control.given_up,
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
    for seed in seeds:
        mix = mixed(seed, slots=slots, bursts=bursts, seconds=seconds)
        alone = play(mix, mix.interactive).interactive
        most = play(mix, mix.batch).batch
        for policy, how in _policies(mix):
            found = play(mix, mix.all, **how)
            point = (100 * found.interactive / alone, 100 * found.batch / most)
            rows.setdefault(policy, []).append(point)
    means = {
        policy: (fmean(on for on, _ in points), fmean(batch for _, batch in points))
        for policy, points in rows.items()
    }
    least = {policy: min(on for on, _ in points) for policy, points in rows.items()}
    print(f"\n{name}: on time in % of interactive alone (worst seed), batch in % of batch alone")
    for policy, (on, batch) in means.items():
        print(f"  {policy:22s} {on:6.1f} ({least[policy]:5.1f})   {batch:6.1f}")
    best = max((p for p in means if p.startswith("priority")), key=lambda p: means[p])
    return {
        "interactive_pct_of_alone": means["ours"][0],
        "interactive_pct_of_alone_swap": means["ours, KV to host"][0],
        "batch_pct": means["ours"][1],
        "batch_pct_swap": means["ours, KV to host"][1],
        "priority_interactive_pct": means[best][0],
        "priority_batch_pct": means[best][1],
        "policies": {p: {"interactive_pct": on, "batch_pct": b} for p, (on, b) in means.items()},
    }


def _overload(seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """Play the overload; return its part of the JSON file."""
    ways: dict[str, dict[str, Any]] = {
        "fcfs": {},
        "edf": {"rank": lambda flow, call, outlook: flow.deadline_s},
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
        print(f"  {policy:30s} {means[policy][SHORT]:6.1f} {means[policy][LONG]:6.1f}")
    ours = means["ours"]
    return {"short_pct": ours[SHORT], "long_pct": ours[LONG], "policies": means}


def _plain(seeds: Sequence[int], seconds: float) -> dict[str, float]:
    """Play calls that say nothing on ours and on stock vLLM; return ours over stock."""
    ratios = []
    for seed in seeds:
        mix = mixed(seed, slots=256, bursts=True, seconds=seconds)
        plain = replace(mix, deadlines_s=lambda _: math.inf)
        stock = play(plain, mix.batch).batch
        ratios.append(play(plain, mix.batch, EngineOptions()).batch / stock)
    print(f"\nplain: batch alone, ours over stock: {fmean(ratios):.4f}")
    return {"plain_over_stock": fmean(ratios)}


_SCENARIO: Final = {
    "A": lambda seeds, s: _beside_backlog("A", seeds, slots=256, bursts=True, seconds=s),
    "B": lambda seeds, s: _beside_backlog("B", seeds, slots=32, bursts=True, seconds=s),
    "C": _overload,
    "steady": lambda seeds, s: _beside_backlog("steady", seeds, slots=256, bursts=False, seconds=s),
    "plain": _plain,
}
