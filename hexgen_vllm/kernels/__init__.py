"""Copies of KV-cache blocks to and from one contiguous buffer, by the fastest kernel there is.

Five twins share one signature and give the same bytes: ``cuda``, ``triton``, ``batch`` (the GPU's
copy engines, no kernel), ``cpu`` and ``reference``, the definition of right. The packed format is
described in :mod:`hexgen_vllm.kernels.layout`. ``$HEXGEN_KERNELS`` or the ``kernel`` argument names
one. Arguments are checked here, once; a twin that was found here has copied a few bytes on the
device and got them right.
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
from hexgen_vllm.kernels.checks import check_gather, check_reachable, check_scatter
from hexgen_vllm.kernels.layout import BlockLayout

__all__ = [
    "KERNELS",
    "BlockLayout",
    "available_kernels",
    "copy_blocks",
    "describe",
    "gather_blocks",
    "pick_kernel",
    "scatter_blocks",
]

logger = logging.getLogger(__name__)

KERNELS = ("cuda", "triton", "batch", "cpu", "reference")
"""Names of the twins, fastest first."""

# Triton on the host is its interpreter: right, and thousands of times slower.
_AUTOMATIC = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
_MODULES = {"triton": "triton_copy"}
_TRIAL_BYTES = 64


class Kernel(Protocol):
    """What each twin's module offers."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why the twin cannot serve a cache on ``device``; ``None`` when it can."""

    def copy_blocks(
        self, layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
    ) -> None:
        """Copy blocks to records, or records to blocks; arguments were checked."""


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
    ids = check_gather(layout, block_ids, out)
    check_reachable(layout, out)
    copy_blocks(layout, ids, out, to_records=True, kernel=kernel)


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
    ids = check_scatter(layout, block_ids, src)
    check_reachable(layout, src)
    copy_blocks(layout, ids, src, to_records=False, kernel=kernel)


def copy_blocks(
    layout: BlockLayout,
    ids: torch.Tensor,
    buffer: torch.Tensor,
    *,
    to_records: bool,
    kernel: str | None = None,
) -> None:
    """Do what the two functions above do, for arguments that were checked already.

    Args:
        layout: where the blocks lie.
        ids: int64 ids on the host, contiguous and within bounds; no repeats unless ``to_records``.
        buffer: as many records.
        to_records: save, else restore.
        kernel: one of ``KERNELS``.
    """
    pick_kernel(layout.device, kernel).copy_blocks(layout, ids, buffer, to_records=to_records)


def pick_kernel(device: torch.device, kernel: str | None = None) -> Kernel:
    """The twin that serves ``device``. The first call may compile it, and logs the choice.

    Raises:
        ConfigError: the named kernel is unknown or cannot run here.
    """
    return _pick(device.type, kernel or configured())


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """Names of the twins that can serve ``device``, fastest first."""
    return tuple(name for name in KERNELS if _unavailable(name, device) is None)


def describe() -> str:
    """One line: which twin serves the host and, where there is one, the GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return ", ".join(f"{device}: {_choose(device, configured())}" for device in devices)


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


def configured() -> str | None:
    """Return the kernel that the user has named, if any."""
    return os.environ.get("HEXGEN_KERNELS") or None


def _require(name: str, device: torch.device) -> None:
    if name not in KERNELS:
        raise ConfigError(f"kernel: {name!r} is none of {', '.join(KERNELS)}.")
    reason = _unavailable(name, device)
    if reason is not None:
        raise ConfigError(f"kernel {name}: {reason}.")


def _unavailable(name: str, device: torch.device) -> str | None:
    try:
        reason = _module(name).unavailable(device)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return reason or _failing(name, device.type)


@functools.cache
def _failing(name: str, device_type: str) -> str | None:
    """Return why a copy of a few bytes fails: a library that loads need not run on this GPU."""
    if name == "reference":
        return None
    device = torch.device(device_type)
    cache = torch.arange(4 * _TRIAL_BYTES, device=device).to(torch.uint8).view(4, _TRIAL_BYTES)
    layout = BlockLayout.from_tensors([cache])
    ids, want = torch.tensor([2, 0]), cache[[2, 0]].clone()
    packed = torch.zeros(2 * _TRIAL_BYTES, dtype=torch.uint8, device=device)
    try:
        _module(name).copy_blocks(layout, ids, packed, to_records=True)
        saved = torch.equal(packed.view(2, -1), want)
        _module(name).copy_blocks(layout, ids.flip(0), packed, to_records=False)
        if saved and torch.equal(cache[[0, 2]], want):
            return None
    except Exception as error:  # whatever a compiler or a driver may raise: there are other twins
        return f"it cannot run here ({str(error).strip().splitlines()[0][:200] or error!r})"
    return "it copies wrong bytes here"


def _module(name: str) -> Kernel:
    path = f"{__name__}.{_MODULES.get(name, name)}"
    return cast(Kernel, importlib.import_module(path))
