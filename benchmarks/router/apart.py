r"""Routers that hear of each other late, against one that knows everything, in the simulator.

    python -m benchmarks.router.apart --copies 4 --routers 3 --lags 0.025 0.1 --loads 0.8
    python -m benchmarks.router.apart --copies 250 --lags 0.1 --loads 0.8 --workflows 4000 \
        --seeds 1 --brief
    python -m benchmarks.router.apart --copies 2 --lags 0.1 --loads 0.8 --workflows 300 --seeds 1 \
        --prefixes --kv 0.1
    python -m benchmarks.router.apart --copies 2 --lags 0.1 --loads 0.95 --workflows 400 --seeds 1 \
        --prefixes --kv 0.05

Workflows come to one of several coordinators, as a balancer would send them. Each has seen of the
others what ``docs/replicas.md`` says, as it was one to two lags ago; ``alone`` is without a store.
``spray`` sends every call of a workflow to any coordinator. With ``--prefixes`` engines tell by KV
events what they have cached, or do not; beside each share on time stands that of prompt tokens that
came out of caches. It needs plain Python, as the simulator is subclassed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, Final
from zlib import crc32

from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad
from hexgen_vllm.policy.exchange import WorkflowPart
from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.limits import Limits
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.scenario import ArrivalOptions, Scenario, WorkloadOptions
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.simulator import TICK, SimCall, SimOptions, Simulation
from hexgen_vllm.sim.workloads.prompts import links
from hexgen_vllm.sim.workloads.workload import WorkflowSpec
from hexgen_vllm.types import Call, CallResult, Decision, EngineReport, EngineSpec

_REFERENCE: Final = Path("examples/scenarios/reference.yaml")
_ALL: Final = 10**9
_LIMITS_WORKFLOWS: Final = 400  # that tell the capacity
_TOLD: Final = ", KV events"
_LONGEST: Final = 16_000  # tokens of a call; vLLM does not start where that does not fit


class Several:
    """Coordinators that take turns at being the one that the simulator knows.

    Attributes:
        index: makes what each knows of an engine's prefix cache, ``None`` for what it infers.

    Args:
        made: the coordinators.
        spray: send each call anywhere.
        lag_s: between two exchanges; ``None`` is without any.
    """

    def __init__(self, made: list[Coordinator], spray: bool, lag_s: float | None) -> None:
        self.made, self._shared = made, lag_s is not None
        self.index: Callable[[EngineLoad], PrefixIndex] | None = None
        self._rng = Random(0) if spray else None
        self._of: dict[str, Coordinator] = {}  # by call
        self._told: list[tuple[dict[str, Elsewhere], list[WorkflowPart]]] = [({}, []) for _ in made]
        if self._shared:
            for one in made:
                one.workflows.share()

    def exchange(self, now: float) -> list[Decision]:
        """Let each hear what the others had to tell a lag ago, and tell what there is now."""
        found: list[Decision] = []
        if not self._shared:
            return found
        for i, one in enumerate(self.made):
            others = [told for j, told in enumerate(self._told) if j != i]
            for _, parts in others:
                for part in parts:
                    calls = {name: seen.copied() for name, seen in part.calls.items()}
                    one.seen_elsewhere(part._replace(calls=calls), now)
            total = {
                name: Elsewhere.total(loads[name] for loads, _ in others if name in loads)
                for name in one.engines
            }
            found += one.placed_elsewhere("replicas", total, now)
        self._told = [
            ({name: e.own() for name, e in one.engines.items()}, one.workflows.changes(_ALL))
            for one in self.made
        ]
        return found

    def call_arrived(self, call: Call, now: float) -> list[Decision]:
        """As of :class:`Coordinator`; the balancer chooses which."""
        number = (
            crc32(call.workflow_id.encode()) if self._rng is None else self._rng.getrandbits(32)
        )
        one = self._of[call.call_id] = self.made[number % len(self.made)]
        return one.call_arrived(call, now)

    def call_started(self, call_id: str, now: float) -> None:
        """As of :class:`Coordinator`."""
        self._of[call_id].call_started(call_id, now)

    def call_progressed(self, call_id: str, tokens: int, now: float) -> None:
        """As of :class:`Coordinator`."""
        self._of[call_id].call_progressed(call_id, tokens, now)

    def call_finished(self, call_id: str, result: CallResult, now: float) -> list[Decision]:
        """As of :class:`Coordinator`."""
        return self._of.pop(call_id).call_finished(call_id, result, now)

    def workflow_finished(self, workflow_id: str) -> None:
        """End a workflow where it is open."""
        for one in self.made:
            if one.workflows.get(workflow_id) is not None:
                one.workflow_finished(workflow_id)
                return

    def engine_joined(self, spec: EngineSpec, now: float) -> list[Decision]:
        """As of :class:`Coordinator`, at all."""
        found = [d for one in self.made for d in one.engine_joined(spec, now)]
        if self.index is not None:
            for one in self.made:
                seen = one.engines[spec.engine_id]
                seen.prefixes = self.index(seen)
        return found

    def engine_reported(self, name: str, report: EngineReport) -> None:
        """As of :class:`Coordinator`, at all."""
        for one in self.made:
            one.engine_reported(name, report)

    def tick(self, now: float) -> list[Decision]:
        """As of :class:`Coordinator`, at all."""
        return [d for one in self.made for d in one.tick(now)]


class Told(PrefixIndex):
    """What KV events say: what the engine has cached, and prompts that it is to compute.

    Args:
        load: the engine as a coordinator sees it.
        engine: the engine.
        calls: by id.
    """

    def __init__(self, load: EngineLoad, engine: SimEngine, calls: Mapping[str, SimCall]) -> None:
        super().__init__(None)
        self.changes = -1  # it is the engine that changes
        self._load, self._engine, self._calls = load, engine, calls

    def match(self, call: Call) -> int:
        """As of :class:`PrefixIndex`."""
        size, chunk = self._engine.model.block_size, call.prefix_chunk_tokens
        chain = links(self._calls[call.call_id].spec.layers, size)
        blocks = self._engine.batch.pool.lookup(chain, call.prompt_tokens // size).blocks
        chunks = blocks * size // chunk
        for flight in self._load.in_flight.values():
            if not flight.started:
                both = zip(flight.call.prefix, call.prefix, strict=False)
                chunks = max(chunks, len(list(takewhile(lambda pair: pair[0] == pair[1], both))))
        return min(chunks * chunk, max(call.prompt_tokens - 1, 0))

    def put(self, prefix: tuple[int, ...], chunk_tokens: int) -> None:
        """Say nothing: the engine does."""


class Apart(Simulation):
    """A simulation with several coordinators that exchange what they know every ``lag_s``."""

    def play(
        self, several: Several, lag_s: float, specs: Iterable[WorkflowSpec], *, told: bool = False
    ) -> None:
        """Run; ``told`` is with KV events."""
        self.coordinator: Any = several
        if told:
            several.index = lambda seen: Told(seen, self.engines[seen.engine_id], self._pending)
        self._lag_s = lag_s
        self._loop.at(lag_s, TICK, self._exchange)
        self.run(specs)

    def _exchange(self, now: float, _: None) -> None:
        self._carry_out(self.coordinator.exchange(now), now)
        if self._open or self._more:
            self._loop.at(now + self._lag_s, TICK, self._exchange)


def played(
    scenario: Scenario,
    bounds: Limits,
    routers: int,
    lag_s: float | None,
    spray: bool = False,
    told: bool = False,
) -> tuple[float, float]:
    """Return the share of workflows on time, and of prompt tokens out of prefix caches, percent.

    No ``lag_s`` is no exchange.
    """
    policy = named("slack")
    shares, cached = [], []
    for run in scenario.runs(bounds.rate_per_s):
        deadline_s = scenario.deadline.of(scenario.base_s(bounds), scenario.fleet)
        sim = Apart(scenario.fleet, policy, deadline_s, scenario.simulation, seed=run.seed)
        several = Several([Coordinator(policy.dispatch) for _ in range(routers)], spray, lag_s)
        specs = scenario.specs(run)
        sim.play(several, lag_s or 1.0, specs, told=told)
        begin_s = specs[scenario.workload.warmup].arrival_s
        kept = [w for w in sim.workflows if w.arrived_s >= begin_s]
        late = (w.latency_s is None or w.latency_s > w.deadline_s for w in kept)
        shares.append(100.0 * (1.0 - mean(late)))
        cached.append(100.0 * sim.records.cached_tokens / sim.records.prompt_tokens)
    return mean(shares), mean(cached)


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=4, help="of the reference fleet of four")
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--lags", type=float, nargs="+", default=[0.025, 0.1, 0.5])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.8, 0.95])
    parser.add_argument("--workflows", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefixes", action="store_true", help="with KV events and without")
    parser.add_argument("--kv", type=float, default=1.0, help="times the KV cache of engines")
    parser.add_argument("--brief", action="store_true", help="neither sprayed nor without a store")
    args = parser.parse_args()
    fleet = load(_REFERENCE).fleet
    engines = tuple(
        replace(
            model,
            engine_id=f"{model.engine_id}-{k}",
            kv_tokens=max(round(model.kv_tokens * args.kv), _LONGEST),
        )
        for k in range(args.copies)
        for model in fleet
    )
    cases: list[tuple[str, int, float | None, bool]] = [("one", 1, None, False)]
    cases += [(f"{args.routers}, {lag:g} s", args.routers, lag, False) for lag in args.lags]
    if args.prefixes:
        cases = [(one[0] + how, one[1], one[2], one[3]) for one in cases for how in ("", _TOLD)]
    elif not args.brief:
        cases += [("spray", args.routers, args.lags[0], True), ("alone", args.routers, None, False)]
    print("load", *(name for name, *_ in cases), sep=" | ")
    for share in args.loads:
        scenario = Scenario(
            engines,
            ArrivalOptions(loads=(share,)),
            WorkloadOptions(workflows=args.workflows, warmup=args.workflows // 5, retries="skewed"),
            seeds=tuple(args.seeds),
            simulation=SimOptions(record_calls=False),
        )
        few = replace(scenario.workload, workflows=_LIMITS_WORKFLOWS, warmup=0)
        bounds, cells = replace(scenario, workload=few).limits(), list[str]()
        for name, routers, lag, spray in cases:
            found = played(scenario, bounds, routers, lag, spray, name.endswith(_TOLD))
            cells.append(" ".join(f"{part:.1f}" for part in found[: 1 + args.prefixes]))
            print(cells[-1], end=" ", file=sys.stderr, flush=True)
        print(share, *cells, sep=" | ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
