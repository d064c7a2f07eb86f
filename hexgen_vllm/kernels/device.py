"""What copies of KV blocks need of a GPU: streams, events, memory, and the copies themselves.

:class:`CudaDevice` is a GPU through torch. ``tools.fake_cuda`` is none: it does
the same in virtual time, in every order that CUDA allows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch

from hexgen_vllm import kernels
from hexgen_vllm.clock import SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.pinned import pinned_buffer


class Event(Protocol):
    """A point in a stream; as :class:`torch.cuda.Event`."""

    def query(self) -> bool:
        """Return whether the stream has passed it; true before it was recorded."""

    def synchronize(self) -> None:
        """Return when the stream has passed it."""


class Stream(Protocol):
    """Work that is done in order; as :class:`torch.cuda.Stream`."""

    def wait_event(self, event: Event) -> None:
        """Have later work wait for ``event``."""

    def record_event(self) -> Event:
        """Return an event after all work so far."""


class Device(Protocol):
    """A device with a KV cache."""

    def new_stream(self) -> Stream:
        """Return a stream beside all others."""

    def current(self) -> Stream:
        """Return the stream that work goes to now."""

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Have work go to ``stream``."""

    def synchronize(self) -> None:
        """Return when all work is done."""

    def seconds(self) -> float:
        """Return the time on a clock that never goes back."""

    def free_bytes(self) -> int:
        """Return how much device memory is free."""

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Return device memory, flat uint8."""

    def pinned(self, num_bytes: int, unit_bytes: int) -> torch.Tensor:
        """Return pinned host memory, flat uint8."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a plain copy between device and pinned memory."""

    def ways(self) -> tuple[str, ...]:
        """Return the kernels that can copy blocks here, see :data:`hexgen_vllm.kernels.KERNELS`."""

    def copy_blocks(
        self, way: str, layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, save: bool
    ) -> None:
        """Enqueue a copy of blocks to records of ``buffer``, or back."""


class CudaDevice:
    """A GPU.

    Raises:
        ConfigError: ``device`` is none.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"staging: the KV cache lies on {device}, not on a GPU.")
        self._device, self._clock = device, SystemClock()

    def new_stream(self) -> Stream:
        """See :class:`Device`."""
        return cast(Stream, torch.cuda.Stream(device=self._device))

    def current(self) -> Stream:
        """See :class:`Device`."""
        return cast(Stream, torch.cuda.current_stream(self._device))

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """See :class:`Device`."""
        return cast(
            "AbstractContextManager[None]", torch.cuda.stream(cast(torch.cuda.Stream, stream))
        )

    def synchronize(self) -> None:
        """See :class:`Device`."""
        torch.cuda.synchronize(self._device)

    def seconds(self) -> float:
        """See :class:`Device`."""
        return self._clock.now()

    def free_bytes(self) -> int:
        """See :class:`Device`."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def empty(self, num_bytes: int) -> torch.Tensor:
        """See :class:`Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def pinned(self, num_bytes: int, unit_bytes: int) -> torch.Tensor:
        """See :class:`Device`."""
        return pinned_buffer(num_bytes, self._device, unit_bytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See :class:`Device`."""
        target.copy_(source, non_blocking=True)

    def ways(self) -> tuple[str, ...]:
        """See :class:`Device`; one only where ``$HEXGEN_KERNELS`` names it."""
        chosen = kernels.configured()
        return (chosen,) if chosen else kernels.available_kernels(self._device)

    def copy_blocks(
        self, way: str, layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, save: bool
    ) -> None:
        """See :class:`Device`."""
        kernels.copy_blocks(layout, ids, buffer, to_records=save, kernel=way)
