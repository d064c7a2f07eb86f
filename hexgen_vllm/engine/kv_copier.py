"""Copies between the KV cache and host memory: on the host at once, on a GPU in streams.

This is all that depends on the device. Both copiers see the same calls in the same order: in a
step all saves, then :meth:`Copier.saved`, then all loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch

from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from hexgen_vllm.kernels.pinned import pinned_buffer
from hexgen_vllm.kernels.staging import StagedCopier

_STAGING_BYTES: Final = 64 << 20


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
