"""A worker's half of keeping KV in host memory: it copies where the scheduler says.

The memory is one flat buffer of records. Which record belongs to whom is the scheduler's business,
so nothing has to be told when a copy is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Final

import torch

from hexgen_vllm.engine.host_pool import Extent
from hexgen_vllm.engine.kv_copier import Copier
from hexgen_vllm.engine.swap_messages import Load, Save, SwapReport
from hexgen_vllm.kernels import BlockLayout

_CALIBRATION_BYTES: Final = 64 << 20
_CALIBRATION_ROUNDS: Final = 2


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
