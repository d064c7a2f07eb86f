"""``hexgen-vllm bench scheduler``: what our order costs in each ``schedule()``.

It needs vLLM but no model and no device. The figure to look at is ``ratio_to_priority``: the
median time of ``schedule()`` over that of stock vLLM with ``--scheduling-policy priority``, which
also keeps an order. Both do the same work on the same calls, in turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files

_SIZES: Final = (100, 1_000, 10_000)
_STOCK: Final = ("priority", "fcfs")
_QUIET: Final = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--waiting", nargs="+", type=int, default=list(_SIZES), help="queue lengths to measure"
    )
    parser.add_argument("--running", type=int, default=256, help="calls in the batch")
    parser.add_argument("--steps", type=int, default=300, help="steps measured per queue length")
    parser.add_argument("--seed", type=int, default=0, help="seed of deadlines and lengths")
    parser.add_argument("--json", type=Path, help="file to write the figures to")


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON file.

    Raises:
        ConfigError: a number is below 1.
        UnsupportedVLLM: vLLM is missing or not supported.
    """
    for name, numbers in (
        ("waiting", args.waiting),
        ("running", [args.running]),
        ("steps", [args.steps]),
    ):
        if min(numbers) < 1:
            raise ConfigError(f"{name} must be at least 1, not {min(numbers)}.")
    results = _measure(args)
    print(table(results))
    if args.json is not None:
        files.write(args.json, report(results))
    return 0


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import_module("hexgen_vllm.engine.compat")  # one sentence if vLLM is not there
    bench = import_module("benchmarks.engine.bench_scheduler")
    with tempfile.TemporaryDirectory() as folder:
        cases = [bench.Case(n, args.running, args.steps, args.seed) for n in args.waiting]
        return [bench.run_case(case, Path(folder)) for case in cases]


def ratio(result: dict[str, Any], stock: str, what: str = "schedule_us") -> float:
    """Return our median time over that of ``stock``."""
    times = result[what]
    return round(float(times["urgency"]["median"] / times[stock]["median"]), 3)


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures by queue length, and the measurements they come from."""
    found: dict[str, Any] = {
        f"ratio_to_{stock}": {str(r["waiting"]): ratio(r, stock) for r in results}
        for stock in _STOCK
    }
    memory = {str(r["waiting"]): r["bytes_per_waiting_call"] for r in results}
    return {**found, "bytes_per_waiting_call": memory, "cases": results}


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as text."""
    lines = [
        "median schedule() in µs                ratio to           update ratio  bytes per waiting",
        "waiting  urgency  priority     fcfs    priority    fcfs   to priority   urgency    stock",
    ]
    for result in results:
        times, memory = result["schedule_us"], result["bytes_per_waiting_call"]
        lines.append(
            f"{result['waiting']:7,d} {times['urgency']['median']:8,.0f} "
            f"{times['priority']['median']:9,.0f} {times['fcfs']['median']:8,.0f} "
            f"{ratio(result, 'priority'):11.3f} {ratio(result, 'fcfs'):7.3f} "
            f"{ratio(result, 'priority', 'update_us'):13.3f} "
            f"{memory['urgency']:9,d} {memory['priority']:8,d}"
        )
    return "\n".join(lines)
