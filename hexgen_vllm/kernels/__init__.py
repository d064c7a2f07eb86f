"""Copies of KV-cache blocks to and from one contiguous buffer, by the fastest kernel there is.

Four twins share one signature and give the same bytes: ``cuda``, ``triton``, ``cpu`` and
``reference``, the definition of right. The packed format is described in
:mod:`hexgen_vllm.kernels.layout`. ``$HEXGEN_KERNELS`` or the ``kernel`` argument names one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout

__all__ = [
    "KERNELS",
    "BlockLayout",
    "available_kernels",
    "describe",
    "gather_blocks",
    "pick_kernel",
    "scatter_blocks",
]

logger = logging.getLogger(__name__)

KERNELS = ("cuda", "triton", "cpu", "reference")
"""Names of the twins, fastest first."""

# Triton on the host is its interpreter: right, and thousands of times slower.
_AUTOMATIC = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
_MODULES = {"triton": "triton_copy"}


class Kernel(Protocol):
    """What each twin's module offers."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why the twin cannot serve a cache on ``device``; ``None`` when it can."""

    def gather_blocks(
        self, layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, out: torch.Tensor
    ) -> None:
        """Pack blocks into ``out``."""

    def scatter_blocks(
        self, layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, src: torch.Tensor
    ) -> None:
        """Unpack ``src`` into the cache."""


def gather_blocks(
    layout: BlockLayout,
    block_ids: Sequence[int] | torch.Tensor,
    out: torch.Tensor,
    *,
    kernel: str | None = None,
) -> None:
    """Save: record ``i`` of ``out`` becomes a copy of block ``block_ids[i]``.

    On a GPU the copy is enqueued on the current stream; ``out`` is device memory or pinned host
    memory there, and must stay alive until the stream has passed the copy.

    Args:
        layout: where the blocks lie.
        block_ids: ids on the host, in any order.
        out: contiguous uint8 tensor of ``layout.packed_bytes(len(block_ids))`` bytes.
        kernel: one of ``KERNELS``; by default ``$HEXGEN_KERNELS``, else the fastest.

    Raises:
        ValueError: an argument is wrong; nothing was written.
        ConfigError: the named kernel is unknown or cannot run here.
    """
    pick_kernel(layout.device, kernel).gather_blocks(layout, block_ids, out)


def scatter_blocks(
    layout: BlockLayout,
    block_ids: Sequence[int] | torch.Tensor,
    src: torch.Tensor,
    *,
    kernel: str | None = None,
) -> None:
    """Restore: block ``block_ids[i]`` becomes record ``i`` of ``src``.

    Arguments and errors as :func:`gather_blocks`; a block id may not repeat.
    """
    pick_kernel(layout.device, kernel).scatter_blocks(layout, block_ids, src)


def pick_kernel(device: torch.device, kernel: str | None = None) -> Kernel:
    """The twin that serves ``device``. The first call may compile it, and logs the choice.

    Raises:
        ConfigError: the named kernel is unknown or cannot run here.
    """
    return _pick(device.type, kernel or _configured())


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """Names of the twins that can serve ``device``, fastest first."""
    return tuple(name for name in KERNELS if _unavailable(name, device) is None)


def describe() -> str:
    """One line: which twin serves the host and, where there is one, the GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return ", ".join(f"{device}: {_choose(device, _configured())}" for device in devices)


class _Choice(NamedTuple):
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} kernel ({self.why})" if self.why else f"{self.name} kernel"


@functools.cache
def _pick(device_type: str, name: str | None) -> Kernel:
    choice = _choose(device_type, name)
    logger.info("KV block copies on %s: %s", device_type, choice)
    return _module(choice.name)


def _choose(device_type: str, name: str | None) -> _Choice:
    device = torch.device(device_type)
    if name is not None:
        _require(name, device)
        return _Choice(name, "as configured")
    passed_over: list[str] = []
    for candidate in _AUTOMATIC.get(device_type, ()):
        reason = _unavailable(candidate, device)
        if reason is None:
            return _Choice(candidate, "; ".join(passed_over))
        passed_over.append(f"{candidate}: {reason}")
    return _Choice("reference", "; ".join(passed_over))


def _configured() -> str | None:
    return os.environ.get("HEXGEN_KERNELS") or None


def _require(name: str, device: torch.device) -> None:
    if name not in KERNELS:
        raise ConfigError(f"kernel: {name!r} is none of {', '.join(KERNELS)}.")
    reason = _unavailable(name, device)
    if reason is not None:
        raise ConfigError(f"kernel {name}: {reason}.")


def _unavailable(name: str, device: torch.device) -> str | None:
    try:
        return _module(name).unavailable(device)
    except ImportError as error:
        return f"it cannot be imported ({error})"


def _module(name: str) -> Kernel:
    path = f"{__name__}.{_MODULES.get(name, name)}"
    return cast(Kernel, importlib.import_module(path))
