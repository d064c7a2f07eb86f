"""A worker's half of keeping KV in host memory: it copies where the scheduler says.

The memory is one flat buffer of records. Which record belongs to whom is the scheduler's business,
so nothing has to be told when a copy is dropped.

Copies are made on the host at once, on a GPU in streams
(:class:`hexgen_vllm.kernels.staging.DeviceCopier`). This is all that depends on the device. Both
copiers see the same calls in the same order: in a step all saves together, then all loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final, Protocol

import torch

from hexgen_vllm.engine.swap.messages import (
    Load,
    Save,
    SwapReport,
)
from hexgen_vllm.engine.swap.pool import Extent
from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from hexgen_vllm.kernels.staging import DeviceCopier
from hexgen_vllm.kernels.tables import forget_tables

_CALIBRATION_BYTES: Final = 64 << 20
_CALIBRATION_ROUNDS: Final = 2


class Copier(Protocol):
    """Copies blocks of one KV cache to host memory and back.

    Attributes:
        at_once: a copy is done when its call returns.
        memory: the host records, flat uint8.
        staging_bytes: device memory that a save passes through; one that fits holds nobody up.
        pack_bytes_per_s: how fast it gets there, ``None`` where there is none.
    """

    at_once: bool
    memory: torch.Tensor
    staging_bytes: int
    pack_bytes_per_s: float | None

    def save(self, block_ids: Sequence[int], spans: Sequence[Extent]) -> object:
        """Copy blocks to records; work submitted later may overwrite the blocks."""

    def load(
        self, block_ids: Sequence[int], spans: Sequence[Extent], *, beside: bool
    ) -> Callable[[], bool]:
        """Copy records to blocks, and return what tells whether that is done.

        Unless ``beside``, work submitted later sees the blocks. Otherwise only work submitted
        after the answer was true does, and until then nothing else may use the blocks.
        """

    def fence(self) -> None:
        """Have work submitted later wait for all loads ``beside``."""

    def wait(self) -> None:
        """Return when all copies are done."""

    def close(self) -> None:
        """Wait, and let go of the host memory."""

    def seconds(self) -> float:
        """Return the time that copies are measured by."""

    def calibrate(self, blocks: int) -> None:
        """Choose how to copy by copying the first blocks of the cache; none of them changes."""


def make_copier(layout: BlockLayout, records: int) -> Copier:
    """Return the copier for the device that the cache lies on, with memory for so many blocks."""
    if layout.device.type == "cpu":
        return HostCopier(layout, records)
    return DeviceCopier(layout, records)


class HostCopier:
    """Copies of a cache in host memory; the system provides memory when it is first written."""

    at_once = True
    staging_bytes = 0
    pack_bytes_per_s: float | None = None

    def __init__(self, layout: BlockLayout, records: int) -> None:
        self._layout = layout
        self.memory = torch.empty(layout.packed_bytes(records), dtype=torch.uint8)

    def save(self, block_ids: Sequence[int], spans: Sequence[Extent]) -> None:
        """See :class:`Copier`."""
        start = 0
        for first, size in spans:
            records = self.memory[self._layout.record_span(first, first + size)]
            gather_blocks(self._layout, block_ids[start : start + size], records)
            start += size

    def load(
        self, block_ids: Sequence[int], spans: Sequence[Extent], *, beside: bool
    ) -> Callable[[], bool]:
        """See :class:`Copier`; nothing runs beside anything here."""
        del beside
        start = 0
        for first, size in spans:
            records = self.memory[self._layout.record_span(first, first + size)]
            scatter_blocks(self._layout, block_ids[start : start + size], records)
            start += size
        return lambda: True

    def fence(self) -> None:
        """See :class:`Copier`."""

    def wait(self) -> None:
        """See :class:`Copier`."""

    def close(self) -> None:
        """See :class:`Copier`."""
        self.memory = torch.empty(0, dtype=torch.uint8)

    def seconds(self) -> float:
        """See :class:`Copier`."""
        return perf_counter()

    def calibrate(self, blocks: int) -> None:
        """See :class:`Copier`; there is one way only."""


class SwapWorker:
    """Saves and loads blocks of one worker's KV cache.

    Args:
        layout: the cache.
        records: how many records the host memory has.
        copier: how this device copies.
    """

    def __init__(self, layout: BlockLayout, records: int, copier: Copier) -> None:
        self._layout, self._copier = layout, copier
        self._report = SwapReport()
        self._pending: dict[str, Callable[[], bool]] = {}
        self._calibrate(min(records, layout.num_blocks))

    @property
    def memory(self) -> torch.Tensor:
        """The records, flat uint8."""
        return self._copier.memory

    def save(self, saves: Sequence[Save]) -> None:
        """Start all saves of a step."""
        start = self._copier.seconds()
        ids = [block for save in saves for block in save.block_ids]
        self._copier.save(ids, [extent for save in saves for extent in save.extents])
        if ids and self._copier.at_once:
            self._report.out_bytes += self._layout.packed_bytes(len(ids))
            self._report.out_s += self._copier.seconds() - start

    def load(self, loads: Sequence[Load]) -> None:
        """Start all loads of a step, those first that its forward pass waits for."""
        start, copied = self._copier.seconds(), 0
        for load in sorted(loads, key=lambda load: load.beside):
            done = self._copier.load(load.block_ids, load.extents, beside=load.beside)
            copied += self._layout.packed_bytes(len(load.block_ids))
            if load.beside:
                self._pending[load.request_id] = done
        if copied and self._copier.at_once:
            self._report.in_bytes += copied
            self._report.in_s += self._copier.seconds() - start

    def fence(self) -> None:
        """Have everything submitted later wait for the loads beside earlier forward passes."""
        self._copier.fence()

    def renew(self) -> None:
        """Make again what was kept in device memory: a sleep of the engine may have wiped it."""
        forget_tables(self._layout)

    def finished(self) -> set[str]:
        """Return the requests whose loads beside the forward pass are done since the last call."""
        done = {name for name, is_done in self._pending.items() if is_done()}
        for name in done:
            del self._pending[name]
        return done

    def report(self) -> SwapReport | None:
        """Return what was measured since the last report, ``None`` if nothing was."""
        report = self._report
        if not (report.out_bytes or report.in_bytes):
            return None
        self._report = SwapReport()
        return report

    def close(self) -> None:
        """Wait for copies under way, and let go of the memory."""
        self._copier.close()
        self._pending.clear()

    def _calibrate(self, blocks: int) -> None:
        """Measure both bandwidths with the cache's first blocks; nothing changes in them."""
        blocks = max(min(blocks, _CALIBRATION_BYTES // self._layout.record_bytes), 1)
        copier, ids, extents = self._copier, range(blocks), [Extent(0, blocks)]
        copier.calibrate(blocks)
        for _ in range(_CALIBRATION_ROUNDS):
            out_s = self._timed(lambda: copier.save(ids, extents))
            in_s = self._timed(lambda: copier.load(ids, extents, beside=False))
        copied = self._layout.packed_bytes(blocks)
        self._report = SwapReport(
            copied, out_s, copied, in_s, copier.staging_bytes, copier.pack_bytes_per_s or 0.0
        )

    def _timed(self, copy: Callable[[], object]) -> float:
        self._copier.wait()
        start = self._copier.seconds()
        copy()
        self._copier.wait()
        return self._copier.seconds() - start
