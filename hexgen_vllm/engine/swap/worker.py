"""A worker's half of keeping KV in host memory: it copies where the scheduler says.

The memory is one flat buffer of records. Which record belongs to whom is the scheduler's business,
so nothing has to be told when a copy is dropped.

Copies are made on the host at once, on a GPU in streams. This is all that depends on the device.
Both copiers see the same calls in the same order: in a
step all saves, then :meth:`Copier.saved`, then all loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from hexgen_vllm.kernels.pinned import pinned_buffer
from hexgen_vllm.kernels.staging import StagedCopier

_STAGING_BYTES: Final = 64 << 20
_CALIBRATION_BYTES: Final = 64 << 20
_CALIBRATION_ROUNDS: Final = 2


class Copier(Protocol):
    """Copies blocks of one KV cache.

    Attributes:
        at_once: a copy is done when its call returns.
    """

    at_once: bool

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Return host memory that this copier can reach, flat uint8."""

    def save(self, block_ids: Sequence[int], records: torch.Tensor) -> None:
        """Copy blocks to ``records``; work submitted later may overwrite the blocks."""

    def saved(self) -> None:
        """Note that the saves of this step were all submitted."""

    def load(
        self, block_ids: Sequence[int], records: torch.Tensor, *, beside: bool
    ) -> Callable[[], bool]:
        """Copy ``records`` to blocks, and return what tells whether that is done.

        Unless ``beside``, work submitted later sees the blocks. Otherwise only work submitted
        after the answer was true does, and until then nothing else may use the blocks.
        """

    def fence(self) -> None:
        """Have work submitted later wait for all loads ``beside``."""

    def wait(self) -> None:
        """Return when all copies are done."""


def make_copier(layout: BlockLayout) -> Copier:
    """Return the copier for the device that the cache lies on."""
    return HostCopier(layout) if layout.device.type == "cpu" else DeviceCopier(layout)


class HostCopier:
    """Copies of a cache in host memory."""

    at_once = True

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Return ordinary memory; the system provides it when it is first written."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def save(self, block_ids: Sequence[int], records: torch.Tensor) -> None:
        """See :class:`Copier`."""
        gather_blocks(self._layout, block_ids, records)

    def saved(self) -> None:
        """See :class:`Copier`."""

    def load(
        self, block_ids: Sequence[int], records: torch.Tensor, *, beside: bool
    ) -> Callable[[], bool]:
        """See :class:`Copier`; nothing runs beside anything here."""
        del beside
        scatter_blocks(self._layout, block_ids, records)
        return lambda: True

    def fence(self) -> None:
        """See :class:`Copier`."""

    def wait(self) -> None:
        """See :class:`Copier`."""


class DeviceCopier:
    """Copies of a cache on a GPU, over one bus stream, so that they never overtake each other.

    A save packs its blocks on the compute stream: after the step in flight, which may still write
    the victim's last token, and before the step that the blocks are given away in. A load beside
    the forward pass starts after the saves of its step, whose blocks it may have been given, and
    with that after the step before, which may still have written them.
    """

    at_once = False

    def __init__(self, layout: BlockLayout) -> None:
        self._device = layout.device
        self._staged = StagedCopier(layout, max(_STAGING_BYTES, 2 * layout.record_bytes))
        self._side = torch.cuda.Stream(device=self._device)
        self._saved = torch.cuda.Event()

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Return pinned memory."""
        return pinned_buffer(num_bytes)

    def save(self, block_ids: Sequence[int], records: torch.Tensor) -> None:
        """See :class:`Copier`."""
        self._staged.save(block_ids, records)

    def saved(self) -> None:
        """See :class:`Copier`."""
        self._saved.record(torch.cuda.current_stream(self._device))

    def load(
        self, block_ids: Sequence[int], records: torch.Tensor, *, beside: bool
    ) -> Callable[[], bool]:
        """See :class:`Copier`."""
        stream = self._side if beside else torch.cuda.current_stream(self._device)
        if beside:
            stream.wait_event(self._saved)
        with torch.cuda.stream(stream):
            self._staged.restore(block_ids, records)
        done: Callable[[], bool] = stream.record_event().query
        return done

    def fence(self) -> None:
        """See :class:`Copier`."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def wait(self) -> None:
        """See :class:`Copier`."""
        torch.cuda.synchronize(self._device)


class SwapWorker:
    """Saves and loads blocks of one worker's KV cache.

    Args:
        layout: the cache.
        records: how many records the host memory has.
        copier: how this device copies.

    Attributes:
        memory: the records, flat uint8.
    """

    def __init__(self, layout: BlockLayout, records: int, copier: Copier) -> None:
        self._layout, self._copier = layout, copier
        self.memory = copier.memory(layout.packed_bytes(records))
        self._report = SwapReport()
        self._pending: dict[str, list[Callable[[], bool]]] = {}
        self._calibrate(min(records, layout.num_blocks))

    def save(self, saves: Sequence[Save]) -> None:
        """Start all saves of a step."""
        start = perf_counter()
        copied = 0
        for save in saves:
            for ids, records in self._pieces(save.block_ids, save.extents):
                self._copier.save(ids, records)
                copied += records.numel()
        self._copier.saved()
        if copied and self._copier.at_once:
            self._report.out_bytes += copied
            self._report.out_s += perf_counter() - start

    def load(self, loads: Sequence[Load]) -> None:
        """Start all loads of a step."""
        start = perf_counter()
        copied = 0
        for load in loads:
            done = []
            for ids, records in self._pieces(load.block_ids, load.extents):
                done.append(self._copier.load(ids, records, beside=load.beside))
                copied += records.numel()
            if load.beside:
                self._pending[load.request_id] = done
        if copied and self._copier.at_once:
            self._report.in_bytes += copied
            self._report.in_s += perf_counter() - start

    def fence(self) -> None:
        """Have everything submitted later wait for the loads beside earlier forward passes."""
        self._copier.fence()

    def finished(self) -> set[str]:
        """Return the requests whose loads beside the forward pass are done since the last call."""
        done = {name for name, parts in self._pending.items() if all(part() for part in parts)}
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
        self._copier.wait()
        self._pending.clear()
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _pieces(
        self, block_ids: Sequence[int], extents: Sequence[Extent]
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Split a copy at the borders of its extents."""
        start = 0
        for first, size in extents:
            span = self._layout.record_span(first, first + size)
            yield block_ids[start : start + size], self.memory[span]
            start += size

    def _calibrate(self, blocks: int) -> None:
        """Measure both bandwidths with the cache's first blocks; nothing changes in them."""
        blocks = max(min(blocks, _CALIBRATION_BYTES // self._layout.record_bytes), 1)
        ids, records = range(blocks), self.memory[self._layout.record_span(0, blocks)]
        for _ in range(_CALIBRATION_ROUNDS):
            out_s = self._timed(lambda: self._copier.save(ids, records))
            self._copier.saved()
            in_s = self._timed(lambda: self._copier.load(ids, records, beside=False))
        self._report = SwapReport(records.numel(), out_s, records.numel(), in_s)

    def _timed(self, copy: Callable[[], object]) -> float:
        self._copier.wait()
        start = perf_counter()
        copy()
        self._copier.wait()
        return perf_counter() - start
