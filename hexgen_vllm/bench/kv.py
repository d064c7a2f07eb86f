"""``hexgen-vllm bench kv``: how fast KV blocks are saved to host memory and restored.

Every way copies the same bytes; figures are GB/s (10^9 bytes per second of wall time, the
Python call included), the median of several samples. ``contiguous`` is one copy of as many
bytes in one piece, the limit; ``per block`` is one copy call per block and layer. The other ways
are named after their kernel; ``staged`` ones go through device memory and the copy engine. Each
way that copies blocks is checked bit for bit before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hexgen_vllm.errors import ConfigError, HexgenError

if TYPE_CHECKING:  # these load torch
    from hexgen_vllm.kernels.subjects import CopyBed, CopyCase, Plug, Way

KIB, MIB = 1 << 10, 1 << 20
PAGE_KIB = (4, 16, 64, 256, 1024, 2048)
BLOCKS = (1, 4, 16, 64, 256, 1024, 4096)
LAYERS = (1, 32)
MAX_MIB_CPU = 64
MAX_MIB_CUDA = 1024

# A sample lasts at least this long, so that neither the clock nor one slow call matters.
MIN_SAMPLE_S = 0.004
SAMPLES = 5


@dataclass(frozen=True)
class Row:
    """One way in one case; the fractions are of the ``contiguous`` way in that direction."""

    page_bytes: int
    num_blocks: int
    layers: int
    total_bytes: int
    way: str
    save_gb_per_s: float
    restore_gb_per_s: float
    save_fraction: float
    restore_fraction: float


def run(
    device: str,
    json_path: Path | None = None,
    *,
    cases: Sequence[CopyCase] | None = None,
    plugs: Sequence[Plug] = (),
) -> list[Row]:
    """Time all ways in all cases, print a table, and write JSON when a path is given.

    Args:
        device: where the cache lies: ``cpu``, ``cuda`` or ``cuda:N``.
        json_path: file to write: ``environment``, ``command`` and ``rows``, the keys of
            :class:`Row`.
        cases: what to copy; by default all that :func:`make_cases` makes of the default sizes.
        plugs: makers of further ways, such as another library's copy kernels.

    Raises:
        ConfigError: the device is not there, or the file cannot be written.
        HexgenError: a way does not give back what it saved.
    """
    from hexgen_vllm.kernels.subjects import environment

    facts = environment(device)
    if json_path is not None:
        _write(json_path, "")  # better refused now than after the measurement
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if cases is None:
        cases = make_cases(PAGE_KIB, BLOCKS, LAYERS, default_max_mib(device))
    rows: list[Row] = []
    heading = ""
    for case in cases:
        measured = measure(case, device, plugs)
        if _heading(measured) != heading:
            heading = _heading(measured)
            print(heading)
        print(_line(measured), flush=True)
        rows += measured
    if json_path is not None:
        figures = [asdict(row) for row in rows]
        command = shlex.join(sys.argv)
        document = {"environment": facts, "command": command, "rows": figures}
        _write(json_path, json.dumps(document, indent=1) + "\n")
    return rows


def default_max_mib(device: str) -> int:
    """Largest copy that is timed by default, MiB."""
    return MAX_MIB_CUDA if device.startswith("cuda") else MAX_MIB_CPU


def make_cases(
    page_kib: Iterable[int], blocks: Iterable[int], layers: Iterable[int], max_mib: int
) -> list[CopyCase]:
    """All combinations that copy no more than ``max_mib`` MiB."""
    from hexgen_vllm.kernels.subjects import CopyCase

    cases = (
        CopyCase(page * KIB, count, depth)
        for depth, page, count in itertools.product(layers, page_kib, blocks)
    )
    return [case for case in cases if case.total_bytes <= max_mib * MIB]


def measure(case: CopyCase, device: str, plugs: Sequence[Plug] = ()) -> list[Row]:
    """Time every way in one case, ``contiguous`` first.

    Raises:
        HexgenError: a way does not give back what it saved.
    """
    from hexgen_vllm.kernels.subjects import CopyBed

    bed = CopyBed(case, device)
    speeds = {way.name: _speeds(bed, way) for way in bed.ways(plugs)}
    limit_save, limit_restore = speeds["contiguous"]
    return [
        Row(
            case.page_bytes,
            case.num_blocks,
            case.layers,
            case.total_bytes,
            way,
            save,
            restore,
            save / limit_save,
            restore / limit_restore,
        )
        for way, (save, restore) in speeds.items()
    ]


def _speeds(bed: CopyBed, way: Way) -> tuple[float, float]:
    """GB/s of saves and of restores."""
    if way.exact and not bed.gives_back(way):
        raise HexgenError(f"{way.name}: blocks differ after save and restore of {bed.case}.")
    gigabytes = bed.case.total_bytes / 1e9
    save, restore = (_seconds(call, bed.synchronize) for call in (way.save, way.restore))
    return gigabytes / save, gigabytes / restore


def _seconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Median time of one call, seconds, when as many run in a row as fill a sample."""
    _sample(call, synchronize, 1)
    rounds = 1 + int(MIN_SAMPLE_S / _sample(call, synchronize, 1))
    return statistics.median(_sample(call, synchronize, rounds) for _ in range(SAMPLES))


def _sample(call: Callable[[], object], synchronize: Callable[[], None], rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    synchronize()
    return (time.perf_counter() - start) / rounds


def _heading(rows: Sequence[Row]) -> str:
    ways = "".join(f"{row.way:>17}" for row in rows)
    return f"{'page KiB':>8} {'blocks':>6} {'layers':>6} {'MiB':>8}{ways}   (GB/s save/restore)"


def _line(rows: Sequence[Row]) -> str:
    case = rows[0]
    speeds = "".join(f"{row.save_gb_per_s:>9.2f}/{row.restore_gb_per_s:<7.2f}" for row in rows)
    size = f"{case.page_bytes // KIB:>8} {case.num_blocks:>6} {case.layers:>6}"
    return f"{size} {case.total_bytes / MIB:>8.2f}{speeds}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written ({error.strerror}).") from error


def _numbers(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(numbers) <= text.count(",") or 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers")
    return tuple(numbers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm bench kv``."""

    def sizes(values: Sequence[int]) -> str:
        return ",".join(str(value) for value in values)

    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
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
            help=f"{meaning} (default: {sizes(default)})",
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


def main(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; the exit code is 0."""
    max_mib = default_max_mib(args.device) if args.max_mib is None else args.max_mib
    cases = make_cases(args.page_kib, args.blocks, args.layers, max_mib)
    if not cases:
        raise ConfigError(f"--max-mib: no case copies as little as {max_mib} MiB.")
    run(args.device, args.json, cases=cases, plugs=_plugs(args.against))
    return 0


def _plugs(name: str | None) -> list[Plug]:
    if name is None:
        return []
    module, _, function = name.partition(":")
    try:
        return [getattr(import_module(module), function)]
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--against: {name!r} cannot be loaded ({error}).") from error


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="python -m hexgen_vllm.bench.kv", description=__doc__)
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except HexgenError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_command_line())
