"""Pinned host memory of the size that was asked for, near the GPU that copies to it.

torch's own allocator rounds pinned memory up to a power of two, which for a pool of 70 GiB wastes
58. So ordinary memory of the exact size is taken and registered with CUDA, through torch's runtime,
in pieces that drivers take at once.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from typing import Any, Final

import torch

MOST_PIECE_BYTES: Final = 64 << 30
_PORTABLE: Final = 1
_SYSFS: Final = Path("/sys")


def piece_bytes(unit_bytes: int) -> int:
    """Return how much is registered at a time, in whole pages and whole units where that fits.

    No copy may reach over the border of two pieces.
    """
    whole = lcm(mmap.PAGESIZE, unit_bytes)
    return MOST_PIECE_BYTES // whole * whole or MOST_PIECE_BYTES


def pinned_buffer(
    num_bytes: int, device: torch.device | None = None, unit_bytes: int = 1
) -> torch.Tensor:
    """Return a flat uint8 tensor in pinned host memory that every GPU of this process can address.

    The memory is given back when the last tensor on it is gone.

    Args:
        num_bytes: its size.
        device: the GPU to be near to; the current one if not given.
        unit_bytes: what is copied as a whole, see :func:`piece_bytes`.

    Raises:
        ValueError: ``num_bytes`` is not positive.
        RuntimeError: there is no GPU, or CUDA cannot pin that much.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes: {num_bytes} bytes cannot be allocated.")
    if not torch.cuda.is_available():
        raise RuntimeError("pinned memory needs a GPU.")
    torch.cuda.init()
    with on_cpus(near_cpus(torch.cuda.get_device_properties(device))):
        return register(num_bytes, torch.cuda.cudart(), piece_bytes(unit_bytes))


def register(num_bytes: int, runtime: Any, piece: int) -> torch.Tensor:
    """Return memory of exactly ``num_bytes``, registered with a CUDA ``runtime`` piece by piece.

    Raises:
        RuntimeError: the runtime refuses; what was registered is given back.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    first = buffer.data_ptr()
    done: list[int] = []
    for start in range(0, num_bytes, piece):
        size = min(piece, num_bytes - start)
        status = int(runtime.cudaHostRegister(first + start, size, _PORTABLE))
        if status:
            _unregister(runtime, done)
            raise RuntimeError(
                f"CUDA cannot pin {num_bytes} bytes of host memory: error {status}. "
                "Is there so much, and does `ulimit -l` allow it?"
            )
        done.append(first + start)
    # At exit the driver frees it; freeing before that could race with a copy in flight.
    weakref.finalize(memory, _unregister, runtime, done).atexit = False
    return buffer


def _unregister(runtime: Any, addresses: list[int]) -> None:
    for address in addresses:
        runtime.cudaHostUnregister(address)


def near_cpus(properties: Any, sysfs: Path = _SYSFS) -> set[int]:
    """Return the CPUs of the NUMA node that a GPU hangs on; none where that is not known.

    Args:
        properties: of the device, as torch gives them.
        sysfs: where the kernel tells.
    """
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    domain, bus, slot = (getattr(properties, name, 0) for name in names)
    device = sysfs / f"bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0"
    try:
        node = int((device / "numa_node").read_text())
        cpus = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return set()
    found: set[int] = set()
    for part in cpus.strip().split(","):
        least, _, most = part.partition("-")
        found.update(range(int(least), int(most or least) + 1) if least else ())
    return found


@contextmanager
def on_cpus(cpus: set[int]) -> Iterator[None]:
    """Run on ``cpus``, where the system lets us: memory comes from the node that first asks."""
    before = os.sched_getaffinity(0)
    wanted = cpus & before
    if not wanted:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
