"""``hexgen-vllm bench react``: agents of many turns on a real engine, ours against stock vLLM.

Each workflow is an agent that thinks, calls a tool, reads what it says, and thinks again. Every
turn's prompt is all that was said before, so stock vLLM, whose KV cache holds a fifth of the
agents at once, computes much of it anew in each turn. ``LRU`` is ours without host memory and with
stock vLLM's order of eviction, ``no host`` with ours. Between turns the agent waits for its tool:
86 % of these times are below 1 s, 95 % below 10 s, as in public traces of agents. An idle engine
skips them.

Beside it the simulator plays the same agents, on an engine of the step cost that this one had.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engine import preempt
from benchmarks.engine.alone import Alone
from benchmarks.engine.preempt_load import Case, Workflow, make_workflow
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.workloads.workload import CallSpec, Layer, WorkflowSpec, workflow_stream

MODES: Final[Mapping[str, str | None]] = {
    "stock": None,
    "LRU": "recompute, LRU",
    "no host": "recompute",
    "ours": "auto",
}
GOAL: Final = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    preempt.add_engine_arguments(parser)
    parser.add_argument("--in-flight", type=int, default=10, help="agents at once")
    parser.add_argument("--workflows", type=int, default=20, help="agents in all")
    parser.add_argument("--turns", type=int, default=20, dest="stages", help="calls of an agent")
    preempt.add_lengths(parser, prompt=(40, 60), output=(12, 24))
    parser.add_argument(
        "--urgent",
        type=float,
        default=3.0,
        help="deadline of every third agent in multiples of a lone one, tools excepted; "
        "others have 10 x that",
    )


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON file.

    Returns:
        1 when tokens differ or blocks leaked, else 0.

    Raises:
        ConfigError: an argument cannot work, or there is no such device.
        UnsupportedVLLM: vLLM is missing or not supported.
    """
    args.contexts, args.repeats = (), 1  # nothing is resumed here
    preempt.check(args)
    found = _measure(args)
    print(table(found))
    if args.json is not None:
        files.write(args.json, found)
    rows = found["modes"].values()
    return 0 if all(r["tokens_identical"] and not r["leaked_blocks"] for r in rows) else 1


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = preempt.prepared(args)
    with tempfile.TemporaryDirectory() as folder:
        case = preempt.case_of(args, bench, Path(folder), think=True)
        lone_s, want = bench.undisturbed(case)
        modes = {name: bench.run_agents(case, mode, lone_s, want) for name, mode in MODES.items()}
    engine = [row.pop("engine") for row in modes.values()][-1]
    if engine is None:
        raise ConfigError("The load is too small: the engine has not learned what its steps cost.")
    simulated = {
        name: _simulate(case, mode, lone_s, modes[name].pop("started_s"), engine)
        for name, mode in MODES.items()
    }
    ratio = modes["stock"]["prefill_tokens"] / modes["ours"]["prefill_tokens"]
    by_simulator = simulated["stock"]["prefill_tokens"] / simulated["ours"]["prefill_tokens"]
    return {
        "prefill_stock_over_ours": round(ratio, 2),
        "prefill_stock_over_ours_simulated": round(by_simulator, 2),
        "goal": GOAL,
        "on_time_fraction": {name: row["on_time_fraction"] for name, row in modes.items()},
        "modes": modes,
        "simulated": simulated,
        "prompt_tokens": case.prompt_tokens(),
        "kv_blocks": case.tight_blocks,
        "lone_workflow_s": round(lone_s, 4),
        **preempt.circumstances(args, bench),
    }


def _simulate(
    case: Case,
    mode: str | None,
    lone_s: float,
    started_s: Sequence[float],
    engine: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a simulated engine makes of the same agents, each at the moment it came."""
    made = {f"w{n}": make_workflow(case, n, lone_s, 0.0) for n in range(case.workflows)}
    specs = [_spec(one, at) for one, at in zip(made.values(), started_s, strict=True)]
    host = {} if mode == "auto" else {"kv_copy_tokens_per_s": None, "host_kv_tokens": 0}
    alone = Alone(
        EngineModel("engine", **{**engine, **host}),
        None if mode is None else EngineOptions(evict_finished_first=mode != "recompute, LRU"),
        lambda spec: made[spec.workflow_id].deadline_s,
        think=lambda spec, turn: made[spec.workflow_id].thinks[turn],
    )
    alone.run(specs, math.inf, ())
    on_time = sum(flow.on_time for flow in alone.flows)
    return {
        "prefill_tokens": alone.prefill_tokens,
        "on_time_fraction": round(on_time / case.workflows, 4),
    }


def _spec(workflow: Workflow, at_s: float) -> WorkflowSpec:
    """Return a workflow as the simulator knows them: one transcript that grows."""
    stages, context = [], 0
    for prompt, writes in workflow.calls:
        context += len(prompt)
        transcript = (Layer(workflow_stream(workflow.name), context),)
        stages.append((CallSpec("act", context, writes, transcript),))
        context += writes
    return WorkflowSpec(workflow.name, "react", tuple(stages), arrival_s=at_s)


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    lines = ["engine    prefill tokens  on time  urgent   busy s  identical  simulated  on time"]
    for name, row in found["modes"].items():
        beside = found["simulated"][name]
        lines.append(
            f"{name:<8} {row['prefill_tokens']:15,d} {row['on_time_fraction']:8.0%}"
            f" {row['urgent_on_time_fraction']:7.0%} {row['seconds']:8.1f}"
            f" {'yes' if row['tokens_identical'] else 'NO':>10}"
            f" {beside['prefill_tokens']:10,d} {beside['on_time_fraction']:8.0%}"
        )
    lines.append(
        f"prompts have {found['prompt_tokens']:,} tokens; stock computes "
        f"{found['prefill_stock_over_ours']} times as many as ours (goal {GOAL:g}), "
        f"{found['prefill_stock_over_ours_simulated']} times in the simulator"
    )
    return "\n".join(lines)
