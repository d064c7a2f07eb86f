"""Block copies by the GPU's copy engines: one call with a list of addresses, no kernel.

They take nothing from the multiprocessors that the forward pass computes on, which makes them
right for loads beside it; a packing kernel is faster within the device. vLLM's operator submits
the list where its build has one, else our library does, both with ``cudaMemcpyBatchAsync`` where
toolkit and driver know it.
"""

from __future__ import annotations

from typing import Any

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.libraries import cuda_library


def unavailable(device: torch.device) -> str | None:
    """Why this twin cannot serve a cache on ``device``; ``None`` when it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"copy engines cannot reach memory on {device}"
    if _operator() is not None:
        return None
    loaded = cuda_library()
    return None if loaded.handle is not None else loaded.reason


def copy_blocks(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
    """Enqueue a copy on the current stream; see :mod:`hexgen_vllm.kernels`.

    Raises:
        ConfigError: the cache is not on an NVIDIA GPU, or neither vLLM nor our library is there.
        RuntimeError: CUDA refuses the copies.
    """
    reason = unavailable(layout.device)
    if reason is not None:
        raise ConfigError(f"kernel batch: {reason}.")
    paged, packed, sizes = ranges(layout, ids, buffer)
    if not sizes.numel():
        return
    source, target = (paged, packed) if to_records else (packed, paged)
    operator = _operator()
    if operator is not None:
        operator(source, target, sizes, False)
        return
    library: Any = cuda_library().handle
    stream = torch.cuda.current_stream(layout.device).cuda_stream
    status = library.hx_cuda_copy_batch(
        layout.device.index or 0,
        target.data_ptr(),
        source.data_ptr(),
        sizes.data_ptr(),
        sizes.numel(),
        stream,
    )
    if status:
        text = library.hx_cuda_error_text(status).decode()
        raise RuntimeError(f"CUDA refused {sizes.numel()} copies: {text}.")


def ranges(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is copied: addresses in the cache, in the buffer, and bytes, int64 on the host.

    Neighbours in both are one range: where a block is one run, blocks that follow one another are.
    """
    rows = torch.tensor(
        [(r.address, r.block_stride_bytes, r.num_bytes, r.record_offset) for r in layout.runs],
        dtype=torch.int64,
    )
    count = ids.numel()
    starts = buffer.data_ptr() + torch.arange(count, dtype=torch.int64) * layout.record_bytes
    paged = (rows[:, 0] + ids[:, None] * rows[:, 1]).flatten()
    packed = (starts[:, None] + rows[:, 3]).flatten()
    sizes = rows[:, 2].repeat(count)
    if not sizes.numel():
        return paged, packed, sizes
    joined = (paged[1:] == paged[:-1] + sizes[:-1]) & (packed[1:] == packed[:-1] + sizes[:-1])
    first = torch.cat((torch.ones(1, dtype=torch.bool), ~joined))
    group = torch.cumsum(first, 0) - 1
    total = torch.zeros(int(group[-1]) + 1, dtype=torch.int64).index_add_(0, group, sizes)
    return paged[first].contiguous(), packed[first].contiguous(), total


def _operator() -> Any:
    """Return vLLM's operator if vLLM is loaded and has it."""
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None)
