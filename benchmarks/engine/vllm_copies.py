"""vLLM's own kernels for copying KV blocks, to be timed beside ours by ``bench kv``.

vLLM has two: ``swap_blocks``, one call per layer, and ``swap_blocks_batch``, one call with a list
of addresses. For small pages on their way to the GPU its offloading worker takes a Triton kernel
in place of the latter, and so does this. Addresses are made once, before anything is timed, so
that the figures are the best that vLLM can do. Its build for CPUs has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.kv.subjects import (
    CopyBed,
    Plug,
    Way,
)

_NAMES: Final = ("swap_blocks", "swap_blocks_batch")


def plugs() -> tuple[list[Plug], str | None]:
    """Return makers of vLLM's ways to copy, and why some of them are absent."""
    try:
        from vllm import _custom_ops as ops  # loads the library that brings them
    except (ImportError, OSError) as error:
        return [], f"vLLM's operators cannot be imported ({error})"
    missing = [name for name in _NAMES if not hasattr(torch.ops._C_cache_ops, name)]
    why = f"this vLLM is built without {' and '.join(missing)}" if missing else None
    makers = {"swap_blocks": _per_layer, "swap_blocks_batch": _batch}
    return [_plug(makers[name], ops) for name in _NAMES if name not in missing], why


def _plug(make: Callable[[CopyBed, Any], Way], ops: Any) -> Plug:
    return lambda bed: make(bed, ops) if bed.device.type == "cuda" else None


def _per_layer(bed: CopyBed, ops: Any) -> Way:
    case = bed.case
    host = bed.host.view(case.layers, case.num_blocks, case.page_bytes)
    places = list(enumerate(bed.block_ids))
    out = torch.tensor([(block, place) for place, block in places], dtype=torch.int64)
    back = out.flip(1).contiguous()

    def save() -> None:
        for layer, tensor in enumerate(bed.tensors):
            ops.swap_blocks(tensor, host[layer], case.page_bytes, out)

    def restore() -> None:
        for layer, tensor in enumerate(bed.tensors):
            ops.swap_blocks(host[layer], tensor, case.page_bytes, back)

    return Way("vllm swap_blocks", save, restore)


def _batch(bed: CopyBed, ops: Any) -> Way:
    size = bed.case.page_bytes
    on_device = [t.data_ptr() + block * size for t in bed.tensors for block in bed.block_ids]
    first = bed.host.data_ptr()
    device = torch.tensor(on_device, dtype=torch.int64)
    host = torch.arange(first, first + bed.case.total_bytes, size, dtype=torch.int64)
    sizes = torch.full_like(host, size)
    load = _small_pages(size) or ops.swap_blocks_batch
    return Way(
        "vllm swap_blocks_batch",
        lambda: ops.swap_blocks_batch(device, host, sizes),
        lambda: load(host, device, sizes),
    )


def _small_pages(page_bytes: int) -> Callable[..., None] | None:
    """Return what vLLM loads pages of this size with, ``None`` where it is the usual operator."""
    try:
        from vllm.v1.kv_offload.cpu import swap_blocks_triton as small
    except ImportError:
        return None
    if page_bytes >= small.THRESHOLD_BYTES or page_bytes % 8:
        return None
    chunk = min(1 << (page_bytes - 1).bit_length(), 8192)
    return lambda *where: small.swap_blocks_batch(*where, bytes_per_chunk=chunk)
