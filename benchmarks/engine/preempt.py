"""``hexgen-vllm bench preempt``: a real engine under KV pressure, computing again against copying.

The KV cache holds a fifth of the load. Three modes run the same workflows: ``recompute`` (as
vLLM does), ``swap`` (the KV of every victim is kept in host memory) and ``auto`` (where the
measured rates say so). What each writes is compared, token by token, with a run that had room for
everything. ``resume_ms`` is the time from the end of an urgent call, which took the whole KV
cache, to the next token of the call that gave way for it.

Times are wall time on a GPU: leave the machine alone while they are taken. On a CPU the engine
computes in one thread, and its own time is what counts, for deadlines as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files

_QUIET: Final = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_QUIET_CPU: Final = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CUDA: Final = {"VLLM_BATCH_INVARIANT": "1"}  # or tokens depend on who shares a step
_PER_MODE: Final = (
    "restored_fraction",
    "tokens_identical",
    "leaked_blocks",
    "resume_ms",
    "recomputed_tokens",
    "step_ms",
    "on_time_fraction",
)
SMALLEST_MIB: Final = 16
_HEADLINE: Final = (
    "five_calls_over_best_in_tree",
    "recomputed_over_best_in_tree_16mib",
    "resume_ms_2048",
)
_SIZES: Final = ("in_flight", "workflows", "stages", "repeats")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what engine it is, and where figures go."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--model", help="path or name (default: a tiny one, made here)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--host-kv-gib", type=float, default=1.0, help="host memory for KV, GiB")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")


def add_lengths(
    parser: argparse.ArgumentParser, *, prompt: tuple[int, int], output: tuple[int, int]
) -> None:
    """Declare the lengths of a call, with these defaults."""
    for name, default, text in (
        ("--prompt", prompt, "new prompt tokens of a call"),
        ("--output", output, "output tokens of a call"),
    ):
        bounds = ("LEAST", "MOST")
        parser.add_argument(name, type=int, nargs=2, default=default, metavar=bounds, help=text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_engine_arguments(parser)
    parser.add_argument("--in-flight", type=int, default=14, help="workflows at once")
    parser.add_argument("--workflows", type=int, default=28, help="workflows in all")
    parser.add_argument("--stages", type=int, default=2, help="calls of a workflow")
    add_lengths(parser, prompt=(60, 240), output=(100, 240))
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=(256, 1024, 2048),
        help="tokens of the calls whose resume is timed",
    )
    parser.add_argument(
        "--urgent",
        type=float,
        default=2.5,
        help="deadline of every third workflow in multiples of a lone one; others have 10 x that",
    )
    parser.add_argument("--repeats", type=int, default=3, help="resumes timed per context")
    parser.add_argument(
        "--against-vllm",
        action="store_true",
        help="compare with vLLM's own connectors for host memory instead: 1 and 5 calls of a "
        "workflow, three sizes of host memory; half an hour on a CPU",
    )


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write the JSON file.

    Returns:
        1 when a mode wrote other tokens or leaked blocks, else 0.

    Raises:
        ConfigError: an argument cannot work, or there is no such device.
        UnsupportedVLLM: vLLM is missing or not supported.
    """
    check(args)
    found = _compare(args) if args.against_vllm else _measure(args)
    print(comparison(found) if args.against_vllm else table(found))
    if args.json is not None:
        files.write(args.json, found)
    modes = found["rows"] if args.against_vllm else list(found["modes"].values())
    return 0 if all(m["tokens_identical"] and not m["leaked_blocks"] for m in modes) else 1


def check(args: argparse.Namespace) -> None:
    """Check the sizes of a load.

    Raises:
        ConfigError: one cannot work; the sentence names it.
    """
    numbers = {name: getattr(args, name) for name in _SIZES} | {
        "prompt": min(args.prompt),
        "output": min(args.output),
        "contexts": min(args.contexts, default=16) - 15,
    }
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is too small.")
    for name in ("prompt", "output"):
        least, most = getattr(args, name)
        if least > most:
            raise ConfigError(f"--{name}: {least} is more than {most}.")
    for name in ("host_kv_gib", "urgent"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0.")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = prepared(args)
    with tempfile.TemporaryDirectory() as folder:
        case = case_of(args, bench, Path(folder))
        lone_s, want = bench.undisturbed(case)
        modes = {mode: bench.run_mode(case, mode, lone_s, want) for mode in bench.MODES}
    return {
        **{key: {mode: figures[key] for mode, figures in modes.items()} for key in _PER_MODE},
        "modes": modes,
        "kv_blocks": case.tight_blocks,
        "lone_workflow_s": round(lone_s, 4),
        **circumstances(args, bench),
    }


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure ours and vLLM's own with one and five calls of a workflow and less host memory."""
    bench = prepared(args)
    in_tree = import_module("benchmarks.engine.in_tree").MODES
    largest = args.host_kv_gib
    sizes = [largest, largest / 8, SMALLEST_MIB / 1024]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = case_of(args, bench, Path(folder))
        for stages in (1, 5):
            workflows = max(whole.workflows * whole.stages // stages // 2, whole.in_flight)
            case = replace(whole, stages=stages, workflows=workflows)
            lone_s, want = bench.undisturbed(case)
            for gib in sizes:
                for mode in ("recompute", "auto", *in_tree):
                    if mode == "recompute" and gib < largest:
                        continue  # it has no host memory
                    resume = stages == 1 and gib == largest
                    sized = replace(case, host_kv_gib=gib)
                    row = bench.run_mode(sized, mode, lone_s, want, resume=resume)
                    rows.append({"stages": stages, "host_mib": 1024 * gib, "mode": mode, **row})
                    print(_line(rows[-1]), flush=True)
    return {**_headline(rows, in_tree), "rows": rows, **circumstances(args, bench)}


def _headline(rows: Sequence[Mapping[str, Any]], in_tree: Sequence[str]) -> dict[str, Any]:
    """Return what the comparison comes to; a ratio is ours over the best of vLLM's."""

    def value(key: str, stages: int, mib: float, mode: str) -> float:
        found = {(r["stages"], r["host_mib"], r["mode"]): r[key] for r in rows}
        return float(found[stages, mib, mode])

    def ratio(key: str, stages: int, mib: float) -> float:
        best = min(value(key, stages, mib, mode) for mode in in_tree)
        return round(value(key, stages, mib, "auto") / max(best, 1.0), 4)

    most, least = max(r["host_mib"] for r in rows), min(r["host_mib"] for r in rows)
    resume = next(r for r in rows if r["mode"] == "auto" and r["resume_ms"] is not None)
    return {
        "five_calls_over_best_in_tree": ratio("computed_tokens", 5, most),
        "recomputed_over_best_in_tree_16mib": ratio("recomputed_tokens", 1, least),
        "resume_ms_2048": resume["resume_ms_by_context"].get("2048"),
    }


def _line(row: Mapping[str, Any]) -> str:
    resume = f"{row['resume_ms']:8.1f} ms" if row["resume_ms"] is not None else ""
    cells = (
        f"{row['stages']:>5}",
        f"{row['host_mib']:>8.0f} ",
        f"{row['mode']:<15}",
        f"{row['computed_tokens']:9,d}",
        f"{row['recomputed_tokens']:11,d}",
        f"{row['step_ms']:8.2f}",
        f"{row['on_time_fraction']:8.0%}",
        f"{'yes' if row['tokens_identical'] else 'NO':>10}",
        f"{row['leaked_blocks']:7d} ",
        resume,
    )
    return " ".join(cells).rstrip()


def comparison(found: Mapping[str, Any]) -> str:
    """Return the comparison as text."""
    title = (
        "calls host MiB  mode             computed  recomputed  step ms  on time  identical"
        "  leaked  resume"
    )
    ends = (f"{key} {found[key]}" for key in _HEADLINE)
    return "\n".join([title, *map(_line, found["rows"]), *ends])


def prepared(args: argparse.Namespace) -> Any:
    """Set the environment, and return the module that runs engines."""
    for name, value in (_QUIET | (_QUIET_CPU if args.device == "cpu" else _CUDA)).items():
        os.environ.setdefault(name, value)
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # CPU time of several threads would be no time
    import_module("hexgen_vllm.engine.compat")  # one sentence if vLLM is not there
    bench = import_module("benchmarks.engine.bench_preempt")
    bench.check_device(args.device)
    return bench


def case_of(args: argparse.Namespace, bench: Any, folder: Path, *, think: bool = False) -> Any:
    """Return the load that the command line asks for."""
    return bench.Case(
        model=args.model or _tiny_model(folder),
        dtype=args.dtype,
        prompt=tuple(args.prompt),
        output=tuple(args.output),
        contexts=tuple(args.contexts),
        host_kv_gib=args.host_kv_gib,
        urgent=args.urgent,
        seed=args.seed,
        think=think,
        **{name: getattr(args, name) for name in _SIZES},
    )


def circumstances(args: argparse.Namespace, bench: Any) -> dict[str, Any]:
    """Return what figures depend on."""
    compat = import_module("hexgen_vllm.engine.compat")
    return {
        "environment": {
            "device": bench.device_name(args.device),
            "vllm": compat.found_version(),
            "python": platform.python_version(),
        },
        "arguments": {name: _plain(value) for name, value in vars(args).items()},
    }


def _tiny_model(folder: Path) -> str:
    return str(import_module("hexgen_vllm.testing.tiny_model").build(folder / "tiny"))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def table(found: dict[str, Any]) -> str:
    """Return the figures as text."""
    contexts = list(next(iter(found["modes"].values()))["resume_ms_by_context"])
    title = (
        "mode        restored  recomputed  preempted  step ms   p99 ms  on time  urgent  identical"
    )
    resume = "".join(f"  {f'resume {c}':>11}" for c in contexts)
    lines = [f"{title}  leaked{resume}"]
    for mode, row in found["modes"].items():
        times = "".join(f"  {ms:8.1f} ms" for ms in row["resume_ms_by_context"].values())
        lines.append(
            f"{mode:<10} {row['restored_fraction']:9.1%} {row['recomputed_tokens']:11,d}"
            f" {sum(row['preemptions'].values()):10,d} {row['step_ms']:8.2f}"
            f" {row['step_ms_p99']:8.1f} {row['on_time_fraction']:8.0%}"
            f" {row['urgent_on_time_fraction']:7.0%}"
            f" {'yes' if row['tokens_identical'] else 'NO':>10} {row['leaked_blocks']:7d}{times}"
        )
    return "\n".join(lines)
