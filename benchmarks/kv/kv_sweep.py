"""``bench kv``, first part: GB/s of every way to copy KV blocks, over sizes and counts."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hexgen_vllm.errors import HexgenError

if TYPE_CHECKING:  # these load torch
    from benchmarks.kv.subjects import (
        CopyBed,
        CopyCase,
        Plug,
        Way,
    )

KIB, MIB = 1 << 10, 1 << 20

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


def make_cases(
    page_kib: Iterable[int], blocks: Iterable[int], layers: Iterable[int], max_mib: int
) -> list[CopyCase]:
    """All combinations that copy no more than ``max_mib`` MiB."""
    from benchmarks.kv.subjects import CopyCase

    cases = (
        CopyCase(page * KIB, count, depth)
        for depth, page, count in itertools.product(layers, page_kib, blocks)
    )
    return [case for case in cases if case.total_bytes <= max_mib * MIB]


def sweep(cases: Sequence[CopyCase], device: str, plugs: Sequence[Plug] = ()) -> list[Row]:
    """Time all ways in all cases, and print a line for each case as it is done.

    Raises:
        HexgenError: a way does not give back what it saved.
    """
    rows: list[Row] = []
    heading = ""
    for case in cases:
        measured = measure(case, device, plugs)
        if _heading(measured) != heading:
            heading = _heading(measured)
            print(heading)
        print(_line(measured), flush=True)
        rows += measured
    return rows


def measure(case: CopyCase, device: str, plugs: Sequence[Plug] = ()) -> list[Row]:
    """Time every way in one case, ``contiguous`` first.

    Raises:
        HexgenError: a way does not give back what it saved.
    """
    from benchmarks.kv.subjects import CopyBed

    bed = CopyBed(case, device)
    found = {way.name: speeds(bed, way) for way in bed.ways(plugs)}
    limit_save, limit_restore = found["contiguous"]
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
        for way, (save, restore) in found.items()
    ]


def speeds(bed: CopyBed, way: Way) -> tuple[float, float]:
    """Return GB/s of saves and of restores.

    Raises:
        HexgenError: the way does not give back what it saved.
    """
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
    figures = "".join(f"{row.save_gb_per_s:>9.2f}/{row.restore_gb_per_s:<7.2f}" for row in rows)
    size = f"{case.page_bytes // KIB:>8} {case.num_blocks:>6} {case.layers:>6}"
    return f"{size} {case.total_bytes / MIB:>8.2f}{figures}"
