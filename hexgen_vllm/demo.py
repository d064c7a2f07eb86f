"""``make demo``: the same workflows under four policies, on real vLLM engines and a real router.

Two engines of clearly different speed serve a tiny model on the CPU. Their speed is paced: a
scheduler class for demos (:mod:`hexgen_vllm.testing.pace`) sleeps at the end of each step until
the step took as long as on the emulated device. Everything else is what production runs: vLLM's
scheduler and model runner, ``hexgen_vllm.serve``, the router, HTTP and streaming in between.

| policy | placement | order in the engines |
|---|---|---|
| ``round_robin+fcfs`` | in turn | stock vLLM |
| ``least_outstanding+fcfs`` | fewest calls in flight | stock vLLM |
| ``paper`` | the paper's score | the paper's urgency |
| ``slack`` | least marginal cost | latest start, displacement |
| ``least_outstanding+edf``, ``sticky+edf``, ``wlcaff+edf`` | that rule | stock vLLM by priority |
| ``vllm_router`` | vllm-router, where it is installed | stock vLLM |
| ``vllm_router_program`` | the same with its program scheduling | stock vLLM |

Writes ``results.json`` (one object per run) and ``attainment.png`` into the output folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from hexgen_vllm.bench import peer
from hexgen_vllm.bench.live import run
from hexgen_vllm.bench.scenario import LiveConfig, LiveResult
from hexgen_vllm.cluster import Cluster, ClusterSpec, EngineEntry, ProcessFailed, RouterEntry
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.option import RENAMED, add_arguments, check, given, option
from hexgen_vllm.report import results
from hexgen_vllm.report.plot import draw_attainment
from hexgen_vllm.report.table import render


class DemoFleet(NamedTuple):
    """Engines that differ only in what orders their calls.

    Attributes:
        scheduler: kind of the engine in the cluster.
        scheduler_cls: scheduler class.
        order: of ours, ``None`` for stock vLLM.
        args: more arguments of the engines.
    """

    scheduler: str
    scheduler_cls: str
    order: str | None
    args: tuple[str, ...] = ()


class Contender(NamedTuple):
    """A policy: its fleet and the router's placement."""

    fleet: str
    placement: str = ""  # nothing of ours: vllm-router places


_PACE: Final = "hexgen_vllm.testing.pace"
FLEETS: Final = {
    "stock": DemoFleet("fcfs", f"{_PACE}.PacedScheduler", None),
    "stock by priority": DemoFleet("priority", f"{_PACE}.PacedScheduler", None),
    "paper": DemoFleet("hexgen", f"{_PACE}.PacedUrgencyScheduler", "paper"),
    "slack": DemoFleet("hexgen", f"{_PACE}.PacedUrgencyScheduler", "slack"),
    # Without the middleware vLLM refuses what vllm-router's clients have to send.
    "behind vllm-router": DemoFleet(
        "fcfs",
        f"{_PACE}.PacedScheduler",
        None,
        ("--middleware=hexgen_vllm.engine.server.middleware.HexgenMiddleware",),
    ),
}
CONTENDERS: Final = {
    "round_robin+fcfs": Contender("stock", "round_robin"),
    "least_outstanding+fcfs": Contender("stock", "least_outstanding"),
    "paper": Contender("paper", "paper"),
    "slack": Contender("slack", "slack"),
    **{
        f"{rule}+edf": Contender("stock by priority", rule)
        for rule in ("least_outstanding", "sticky", "wlcaff")
    },
    **{mode: Contender("behind vllm-router") for mode in peer.MODES},
}
SHOWN: Final = ("round_robin+fcfs", "least_outstanding+fcfs", "paper", "slack")
DEVICES: Final[dict[str, dict[str, float]]] = {
    "fast": {"prefill_tokens_per_s": 6000, "step_ms": 12, "per_sequence_ms": 0.3},
    "slow": {"prefill_tokens_per_s": 2000, "step_ms": 36, "per_sequence_ms": 0.9},
}
"""Emulated devices, 3 to 1 in every rate."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo plays; lengths are scaled so that a run takes about a minute."""

    model: str = option("out/tiny-model", "folder of the model that both engines serve")
    out: str = option("out/demo", "folder for results and logs")
    workflows: int = option(120, "workflows of each run", least=1)
    warmup: int = option(15, "workflows before those that count", least=0)
    rate: float = option(3.0, "arrivals, workflows/s", least=1e-3)
    length_scale: float = option(0.05, "factor on the lengths of the workload", least=1e-3)
    deadline_s: float = option(4.0, "deadline of a workflow, seconds", least=0.1)
    slots: int = option(8, "sequences that an engine runs at once", least=1)
    kv_blocks: int = option(512, "KV blocks of 32 tokens of an engine", least=64)
    alpha: float = option(
        0.4,
        "the paper's weight of speed against load; best for these devices in the simulator "
        "(hexgen-vllm sim examples/scenarios/demo.yaml)",
        least=0.0,
        most=1.0,
    )
    seeds: tuple[str, ...] = option(("0",), "one run of every policy for each seed")
    policies: tuple[str, ...] = option(
        SHOWN,
        f"what to compare: {', '.join(CONTENDERS)}",
        renamed=RENAMED,
    )
    vllm_router: str = option("vllm-router", "the program behind policies vllm_router*")

    def __post_init__(self) -> None:
        check(self)
        for policy in self.policies:
            if policy not in CONTENDERS:
                known = ", ".join(CONTENDERS)
                raise ConfigError(f"policies must be of {known}, not {policy!r}.")
        if not all(seed.isdecimal() for seed in self.seeds):
            raise ConfigError("seeds must be whole numbers.")
        if not peer.MODES.keys().isdisjoint(self.policies):
            peer.find(self.vllm_router)


def engine_entry(
    options: DemoOptions, fleet: DemoFleet, device: str, slower: float = 1.0
) -> EngineEntry:
    """Return the engine of ``fleet`` that emulates ``device``, so many times slower."""
    pace = {
        name: value / slower if name.endswith("_per_s") else value * slower
        for name, value in DEVICES[device].items()
    }
    additional: dict[str, Any] = {"hexgen_pace": pace}
    if fleet.order is not None:
        additional["hexgen"] = {"order": fleet.order, "default_deadline_s": options.deadline_s}
    return EngineEntry(
        name=device,
        model=options.model,
        scheduler=fleet.scheduler,
        env={
            "OMP_NUM_THREADS": "1",  # two engines with more would fight for the cores
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start
            "VLLM_SERVER_DEV_MODE": "1",  # lets the demo empty the prefix cache between runs
        },
        args=(
            "--served-model-name=tiny",
            "--dtype=float32",
            "--max-model-len=4096",
            "--enforce-eager",
            "--gpu-memory-utilization=0.2",  # of the host's memory, on the CPU
            "--block-size=32",
            f"--num-gpu-blocks-override={options.kv_blocks}",
            f"--max-num-seqs={options.slots}",
            "--max-num-batched-tokens=512",
            "--distributed-executor-backend=uni",
            f"--scheduler-cls={fleet.scheduler_cls}",
            f"--additional-config={json.dumps(additional)}",
            *fleet.args,
        ),
    )


def router_entry(options: DemoOptions, placement: str) -> RouterEntry:
    """Return a router that places by ``placement``."""
    own = {"alpha": options.alpha} if placement == "paper" else {}
    return RouterEntry(policy=placement, options={"default-deadline-s": options.deadline_s, **own})


def live_config(options: DemoOptions, policy: str, seed: int, url: str) -> LiveConfig:
    """Return the run of ``policy``; only the endpoint and the name differ between policies."""
    return LiveConfig(
        url=url,
        policy=policy,
        seed=seed,
        workflows=options.workflows,
        warmup=options.warmup,
        rate=options.rate,
        deadline_s=options.deadline_s,
        length_scale=options.length_scale,
        model="tiny",
        agentic_context=policy in peer.MODES,
    )


async def play_demo(options: DemoOptions) -> list[results.Row]:
    """Play every policy and seed; returns one row for each run, in the order of the options."""
    rows: dict[tuple[str, int], results.Row] = {}
    for name, fleet in FLEETS.items():
        policies = [p for p in options.policies if CONTENDERS[p].fleet == name]
        if policies:
            async for result in _fleet_runs(options, name, fleet, policies):
                rows[result.config.policy, result.config.seed] = result.row()
    return [rows[p, int(seed)] for p in options.policies for seed in options.seeds]


async def _fleet_runs(
    options: DemoOptions, name: str, fleet: DemoFleet, policies: Sequence[str]
) -> AsyncIterator[LiveResult]:
    spec = ClusterSpec(
        engines=tuple(engine_entry(options, fleet, device) for device in DEVICES),
        router=None,
        log_dir=str(Path(options.out) / "logs" / name),
        start_timeout_s=300.0,
    )
    _say(f"{name}: starting {len(spec.engines)} engines, logs in {spec.log_dir}")
    async with Cluster(spec) as cluster:
        for seed in options.seeds:
            for policy in policies:
                _say(f"{policy}: seed {seed}, {options.workflows} workflows")
                await _empty_caches(cluster.engine_urls)
                async with _router(options, policy, cluster) as url:
                    yield await run(live_config(options, policy, int(seed), url))


@asynccontextmanager
async def _router(options: DemoOptions, policy: str, cluster: Cluster) -> AsyncIterator[str]:
    """Run the router of ``policy`` before the engines of ``cluster``; gives its URL."""
    if policy not in peer.MODES:
        await cluster.replace_router(router_entry(options, CONTENDERS[policy].placement))
        yield cluster.router_url
        return
    log = cluster.log_dir / f"{policy}.log"
    async with peer.vllm_router(options.vllm_router, policy, cluster.engine_urls, log) as url:
        yield url


async def _empty_caches(urls: Sequence[str]) -> None:
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        for url in urls:
            async with session.post(f"{url}/reset_prefix_cache"):
                pass


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 1 when a workflow failed or was lost, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m hexgen_vllm.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser, DemoOptions)
    try:
        options = replace(DemoOptions(), **given(parser.parse_args(argv), DemoOptions))
        rows = asyncio.run(play_demo(options))
    except (HexgenError, ProcessFailed) as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    out = Path(options.out)
    results.write(out / "results.json", rows)
    draw_attainment(rows, out / "attainment.png")
    print(render(rows))
    print(f"\nwrote {out / 'results.json'} and {out / 'attainment.png'}")
    return int(any(row["errors"] or row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
