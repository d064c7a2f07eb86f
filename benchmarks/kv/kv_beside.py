"""``bench kv``, second part: what decode steps suffer from copies that run beside them.

The copies never pause, which is more than an engine under pressure asks for. On a GPU they have
a stream of their own; on a CPU a thread, although there an engine copies between its steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # these load torch
    from benchmarks.kv.subjects import CopyBed, Way

STEPS = 60
_PAGE_BYTES: Final = 64 << 10
_LAYERS: Final = 32
COPIED_BYTES: Final = {"cpu": 64 << 20, "cuda": 256 << 20}

ENGINE_WAYS: Final = ("cuda staged", "triton staged", "cpu", "reference")
"""What an engine copies with, the first one that there is."""


@dataclass(frozen=True)
class Slowdown:
    """A decode step alone and beside copies; ``slowdown`` is the share by which it is longer."""

    way: str
    alone_ms: float
    beside_ms: float
    slowdown: float
    copied_gb_per_s: float


def measure(device: str) -> list[Slowdown]:
    """Time decode steps beside each way of copying that an engine has; prints a line for each."""
    from benchmarks.kv.subjects import CopyBed, CopyCase

    blocks = COPIED_BYTES[device.partition(":")[0]] // (_PAGE_BYTES * _LAYERS)
    bed = CopyBed(CopyCase(_PAGE_BYTES, blocks, _LAYERS), device)
    found = []
    print("decode step beside copies")
    for way in _ways(bed):
        row = _slowdown(bed, way, device)
        print(
            f"  {row.way:<16} {row.alone_ms:.2f} ms alone, {row.beside_ms:.2f} ms beside"
            f" {row.copied_gb_per_s:.2f} GB/s ({row.slowdown:+.1%})",
            flush=True,
        )
        found.append(row)
    return found


def _ways(bed: CopyBed) -> Iterator[Way]:
    """Yield the kernels, direct and staged, without the slow definition of right."""
    return (way for way in bed.ways() if way.name.split()[0] in {"cuda", "triton", "cpu"})


def _slowdown(bed: CopyBed, way: Way, device: str) -> Slowdown:
    from benchmarks.kv import probes

    step = probes.decode(device).step
    alone_s = median_s(step, STEPS)
    with probes.copying(bed, way) as copied:
        start, before = time.perf_counter(), copied()
        beside_s = median_s(step, STEPS)
        rate = (copied() - before) / (time.perf_counter() - start)
    return Slowdown(way.name, 1e3 * alone_s, 1e3 * beside_s, beside_s / alone_s - 1, rate / 1e9)


def median_s(step: Callable[[], object], times: int) -> float:
    """Return the median time of ``step``, seconds; the first one warms up."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
