"""What every kernel asks before it touches memory: a wrong argument raises, nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hexgen_vllm.kernels.layout import BlockLayout


def check_gather(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Validate a save.

    Args:
        layout: the cache to read.
        block_ids: blocks in the order of their records, on the host; repeats are allowed.
        out: contiguous uint8 tensor of exactly one record per id, on the host or on the
            cache's device.

    Returns:
        The ids as a contiguous int64 tensor on the host.

    Raises:
        ValueError: an id is out of bounds or no integer, or the buffer does not fit.
    """
    return _check(layout, block_ids, out, "out")


def check_scatter(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, src: torch.Tensor
) -> torch.Tensor:
    """Validate a restore: as :func:`check_gather`, and no block may be written twice.

    Raises:
        ValueError: also when a block id repeats.
    """
    ids = _check(layout, block_ids, src, "src")
    if torch.unique(ids).numel() != ids.numel():
        raise ValueError("block_ids: a block id repeats, so a block would be written twice.")
    return ids


def check_reachable(layout: BlockLayout, buffer: torch.Tensor) -> None:
    """Refuse host memory that the cache's GPU cannot address.

    Raises:
        ValueError: the buffer is pageable host memory and the cache lies on a GPU.
    """
    if layout.device.type != "cpu" and buffer.device.type == "cpu" and not buffer.is_pinned():
        raise ValueError("buffer: host memory must be pinned, or be copied through the device.")


def _check(
    layout: BlockLayout,
    block_ids: Sequence[int] | torch.Tensor,
    buffer: torch.Tensor,
    name: str,
) -> torch.Tensor:
    ids = _host_ids(block_ids)
    _check_bounds(ids, layout.num_blocks)
    _check_buffer(layout, ids.numel(), buffer, name)
    return ids


def _host_ids(block_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    if not isinstance(block_ids, torch.Tensor):
        ids = torch.tensor(block_ids) if len(block_ids) else torch.empty(0, dtype=torch.int64)
    else:
        ids = block_ids
    if ids.device.type != "cpu" or ids.ndim != 1:
        raise ValueError("block_ids: one flat list of ids on the host is needed.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"block_ids: integers are needed, not {ids.dtype}.")
    return ids.to(torch.int64).contiguous()


def _check_bounds(ids: torch.Tensor, num_blocks: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= num_blocks:
        wrong = low if low < 0 else high
        raise ValueError(f"block_ids: block {wrong} is outside 0..{num_blocks - 1}.")


def _check_buffer(layout: BlockLayout, num_ids: int, buffer: torch.Tensor, name: str) -> None:
    if buffer.dtype != torch.uint8 or not buffer.is_contiguous():
        raise ValueError(f"{name}: a contiguous uint8 tensor is needed, not {buffer.dtype}.")
    if buffer.numel() != layout.packed_bytes(num_ids):
        raise ValueError(
            f"{name}: {num_ids} blocks of {layout.record_bytes} bytes need "
            f"{layout.packed_bytes(num_ids)} bytes, not {buffer.numel()}."
        )
    if buffer.device.type != "cpu" and buffer.device != layout.device:
        raise ValueError(f"{name}: lies on {buffer.device}, the KV cache on {layout.device}.")
