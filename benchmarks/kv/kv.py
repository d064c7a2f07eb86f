"""``hexgen-vllm bench kv``: how fast KV blocks are saved to host memory and restored.

Three parts. ``sweep``: every way copies the same bytes; figures are GB/s (10^9 bytes per second
of wall time, the Python call included), the median of several samples. ``contiguous`` is one copy
of as many bytes in one piece, the limit; ``per block`` is one copy call per block and layer. The
other ways are named after their kernel; ``staged`` ones go through device memory and the copy
engine; vLLM's own are timed where its build has them. Each way that copies blocks is checked bit
for bit before it is timed. ``beside``: how much longer a decode step takes beside such copies.
``break-even``: context lengths and sizes of models for which copying beats computing again.

``python -m benchmarks.kv.kv`` does the same and needs torch and numpy only, and on a GPU
triton or nvcc.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.kv import (
    kv_beside,
    kv_break_even,
    kv_sweep,
)
from hexgen_vllm.errors import ConfigError, HexgenError

if TYPE_CHECKING:  # this loads torch
    from benchmarks.kv.subjects import Plug

PARTS: Final = ("sweep", "beside", "break-even")
PAGE_KIB: Final = (4, 16, 64, 256, 1024, 2048)
BLOCKS: Final = (1, 4, 16, 64, 256, 1024, 4096)
LAYERS: Final = (1, 32)
MAX_MIB_CPU: Final = 64
MAX_MIB_CUDA: Final = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench kv``."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    for name, default, meaning in (
        ("--page-kib", PAGE_KIB, "KiB of one block in one layer"),
        ("--blocks", BLOCKS, "blocks per copy"),
        ("--layers", LAYERS, "layers per block"),
    ):
        parser.add_argument(
            name,
            type=_numbers,
            default=default,
            metavar="N,N",
            help=f"{meaning} (default: {','.join(map(str, default))})",
        )
    parser.add_argument(
        "--max-mib",
        type=int,
        help="leave out copies larger than this (default: "
        f"{MAX_MIB_CPU} on the host, {MAX_MIB_CUDA} on a GPU)",
    )
    parser.add_argument(
        "--against",
        metavar="MODULE:NAME",
        help="a function that makes a further way of copying, to be timed beside ours",
    )


def _numbers(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(numbers) <= text.count(",") or 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers")
    return tuple(numbers)


def main(args: argparse.Namespace) -> int:
    """Measure, print tables, write the JSON file; the exit code is 0.

    Raises:
        ConfigError: there is no torch or no such device, the file cannot be written, an option
            is wrong.
        HexgenError: a way does not give back what it saved.
    """
    if find_spec("torch") is None:
        raise ConfigError("bench kv needs torch, which comes with vLLM.")
    from benchmarks.kv.subjects import environment

    facts: dict[str, Any] = {**environment(args.device)}
    plugs, facts["vllm_kernels"] = _vllm_ways()
    plugs += _asked_for(args.against)
    if args.json is not None:
        _write(args.json, "")  # better refused now than after the measurement
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    found = {"environment": facts, "command": shlex.join(sys.argv), **_measure(args, plugs)}
    if args.json is not None:
        _write(args.json, json.dumps(found, indent=1) + "\n")
    return 0


def _measure(args: argparse.Namespace, plugs: Sequence[Plug]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "sweep" in args.parts:
        found["rows"] = [asdict(row) for row in kv_sweep.sweep(_cases(args), args.device, plugs)]
    if "beside" in args.parts:
        found["beside"] = [asdict(row) for row in kv_beside.measure(args.device)]
    if "break-even" in args.parts:
        lines = [asdict(line) for line in kv_break_even.measure(args.device)]
        found["break_even"] = {"contexts": kv_break_even.CONTEXTS, "models": lines}
    return found


def _cases(args: argparse.Namespace) -> list[Any]:
    on_gpu = args.device.startswith("cuda")
    default_mib = MAX_MIB_CUDA if on_gpu else MAX_MIB_CPU
    max_mib = default_mib if args.max_mib is None else args.max_mib
    cases = kv_sweep.make_cases(args.page_kib, args.blocks, args.layers, max_mib)
    if not cases:
        raise ConfigError(f"--max-mib: no case copies as little as {max_mib} MiB.")
    return cases


def _vllm_ways() -> tuple[list[Plug], str]:
    """Return vLLM's ways to copy, and a word on those that are absent."""
    try:
        copies = import_module("benchmarks.engine.vllm_copies")
    except (ImportError, HexgenError) as error:
        return [], f"absent: {error}"
    plugs, missing = copies.plugs()
    return plugs, f"absent: {missing}" if missing else "there"


def _asked_for(name: str | None) -> list[Plug]:
    if name is None:
        return []
    module, _, function = name.partition(":")
    try:
        return [getattr(import_module(module), function)]
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--against: {name!r} cannot be loaded ({error}).") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written ({error.strerror}).") from error


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv.kv", description=__doc__)
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except HexgenError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_command_line())
