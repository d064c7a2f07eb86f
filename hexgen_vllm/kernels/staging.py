"""Copies between a GPU's KV cache and pinned host memory by way of device memory.

A kernel packs blocks at memory speed on the caller's stream; the copy engine moves the packed
bytes over the bus on a stream of its own, beside the forward pass and without taking
multiprocessors from it. The direct way (a pinned ``out`` of ``gather_blocks``) has less latency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hexgen_vllm import kernels
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.checks import check_gather, check_reachable, check_scatter
from hexgen_vllm.kernels.layout import BlockLayout


@dataclass
class _Slot:
    """One half of the staging memory and the event after its last use."""

    memory: torch.Tensor
    free: torch.cuda.Event


class StagedCopier:
    """Saves and restores blocks of one cache through two staging buffers in turn.

    Calls belong to one thread. Saves and restores reach the bus in the order of the calls, so a
    restore may follow the save of the same host bytes at once. Keep the copier and the host
    memory until the GPU is done with both.

    Args:
        layout: a cache on a GPU.
        staging_bytes: device memory to use, both buffers together. A copy that fits holds up the
            caller's stream for the packing only; a longer one also waits for the bus.
        kernel: see :func:`hexgen_vllm.kernels.gather_blocks`.

    Raises:
        ConfigError: the cache is not on a GPU or ``staging_bytes`` is less than two records.
    """

    def __init__(
        self, layout: BlockLayout, staging_bytes: int = 128 << 20, kernel: str | None = None
    ) -> None:
        self._blocks_per_slot = staging_bytes // 2 // layout.record_bytes
        if layout.device.type != "cuda":
            raise ConfigError(f"staging: the KV cache lies on {layout.device}, not on a GPU.")
        if self._blocks_per_slot < 1:
            raise ConfigError(
                f"staging_bytes: {staging_bytes} bytes cannot hold two blocks of "
                f"{layout.record_bytes} bytes."
            )
        self._layout = layout
        self._kernel = kernel
        self._bus = torch.cuda.Stream(device=layout.device)
        self._slots = tuple(self._new_slot() for _ in range(2))
        self._turn = 0

    def save(self, block_ids: Sequence[int] | torch.Tensor, host: torch.Tensor) -> torch.cuda.Event:
        """Enqueue a copy of blocks to pinned memory.

        Work put on the current stream afterwards may overwrite the blocks.

        Returns:
            The event after which ``host`` holds the records.

        Raises:
            ValueError: see :func:`~hexgen_vllm.kernels.checks.check_gather`.
        """
        ids = check_gather(self._layout, block_ids, host)
        check_reachable(self._layout, host)
        stream = torch.cuda.current_stream(self._layout.device)
        for part, records in self._parts(ids, host):
            slot = self._next_slot()
            packed = slot.memory[: records.numel()]
            stream.wait_event(slot.free)
            kernels.gather_blocks(self._layout, part, packed, kernel=self._kernel)
            self._bus.wait_stream(stream)
            with torch.cuda.stream(self._bus):
                records.copy_(packed, non_blocking=True)
                slot.free.record()
        return self._bus.record_event()

    def restore(self, block_ids: Sequence[int] | torch.Tensor, host: torch.Tensor) -> None:
        """Enqueue a copy of records in pinned memory to blocks.

        Work put on the current stream afterwards sees the restored blocks.

        Raises:
            ValueError: see :func:`~hexgen_vllm.kernels.checks.check_scatter`.
        """
        ids = check_scatter(self._layout, block_ids, host)
        check_reachable(self._layout, host)
        stream = torch.cuda.current_stream(self._layout.device)
        for part, records in self._parts(ids, host):
            slot = self._next_slot()
            packed = slot.memory[: records.numel()]
            self._bus.wait_event(slot.free)
            with torch.cuda.stream(self._bus):
                packed.copy_(records, non_blocking=True)
            stream.wait_stream(self._bus)
            kernels.scatter_blocks(self._layout, part, packed, kernel=self._kernel)
            slot.free.record(stream)

    def _new_slot(self) -> _Slot:
        num_bytes = self._layout.packed_bytes(self._blocks_per_slot)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._layout.device)
        return _Slot(memory, torch.cuda.Event())

    def _next_slot(self) -> _Slot:
        self._turn = 1 - self._turn
        return self._slots[self._turn]

    def _parts(
        self, ids: torch.Tensor, host: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and their records, as many at a time as a slot holds."""
        flat = host.view(-1)
        for first in range(0, ids.numel(), self._blocks_per_slot):
            last = min(first + self._blocks_per_slot, ids.numel())
            yield ids[first:last], flat[self._layout.record_span(first, last)]
