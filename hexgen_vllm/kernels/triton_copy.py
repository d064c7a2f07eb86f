"""Block copies in Triton: for GPUs without the CUDA library, and for CPU tensors in Triton's
interpreter (``TRITON_INTERPRET=1``). Buffers and streams as in :mod:`hexgen_vllm.kernels.cuda`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.tables import piece_table, word_bytes

MOST_PIECE_BYTES = 16 * 1024
LEAST_PIECE_BYTES = 1024
HOST_GRID = 32
DEVICE_GRID = 512
_NUM_WARPS = 8

_WORD_OF_BYTES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot serve a cache on ``device``; ``None`` when it can."""
    if device.type == "cuda" and not _interpreting():
        return None
    if device.type == "cpu" and _interpreting():
        return None
    return f"the triton kernel needs a GPU, or TRITON_INTERPRET=1 and host tensors, not {device}"


def copy_blocks(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
    """Enqueue a copy on the current stream; see :mod:`hexgen_vllm.kernels`.

    Raises:
        ConfigError: neither a GPU nor the interpreter is there.
    """
    reason = unavailable(layout.device)
    if reason is not None:
        raise ConfigError(f"kernel triton: {reason}.")
    size = piece_bytes(layout)
    table = piece_table(layout, size)
    items = ids.numel() * table.shape[0]
    if items == 0:
        return
    constants = _constants(size, word_bytes(layout, buffer), to_records)
    with torch.cuda.device_of(table):
        _kernel(_interpreting())[(_grid(items, layout, buffer),)](
            table,
            ids.to(layout.device, non_blocking=True),
            buffer.data_ptr(),
            table.shape[0],
            items,
            layout.record_bytes,
            **constants,
            num_warps=_NUM_WARPS,
        )


def piece_bytes(layout: BlockLayout) -> int:
    """Return what a program copies at a time: as much as the longest run, or its lanes idle."""
    longest = max(run.num_bytes for run in layout.runs)
    fitting = 1 << (longest - 1).bit_length()
    return min(max(fitting, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)


def _constants(size: int, alignment: int, to_records: bool) -> dict[str, Any]:
    """Compile-time arguments for pieces of ``size`` bytes in memory aligned to ``alignment``."""
    word_size = min(alignment, 8)
    return {
        "WORD": _WORD_OF_BYTES[word_size],
        "WORD_BYTES": word_size,
        "PIECE_WORDS": size // word_size,
        "ALIGNMENT": alignment,
        "TO_RECORDS": to_records,
    }


def _grid(items: int, layout: BlockLayout, buffer: torch.Tensor) -> int:
    if layout.device.type == "cpu":
        return 1  # the interpreter runs programs one after the other, each at a cost
    return min(items, HOST_GRID if buffer.device.type == "cpu" else DEVICE_GRID)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "y", "yes"}


@functools.cache
def _kernel(interpreting: bool) -> Any:
    """Compiled or interpreted, as the environment says when the kernel is first needed."""
    del interpreting  # only distinguishes the two; triton reads the environment itself
    volatile = ["records", "num_pieces", "num_items", "record_bytes"]
    return triton.jit(_copy_pieces, do_not_specialize=volatile)


def _copy_pieces(  # noqa: PLR0913, PLR0917 - a kernel takes plain numbers
    pieces: tl.tensor,
    ids: tl.tensor,
    records: tl.tensor,
    num_pieces: tl.tensor,
    num_items: tl.tensor,
    record_bytes: tl.tensor,
    WORD: tl.constexpr,  # noqa: N803 - Triton's convention for compile-time arguments
    WORD_BYTES: tl.constexpr,  # noqa: N803
    PIECE_WORDS: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
    TO_RECORDS: tl.constexpr,  # noqa: N803
) -> None:
    """One program copies one (block, piece) pair at a time; pieces run fastest."""
    lane = tl.arange(0, PIECE_WORDS)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        record = (item // num_pieces).to(tl.int64)
        row = pieces + (item % num_pieces) * 4
        block = tl.load(ids + record)
        paged_at = tl.load(row) + block * tl.load(row + 1)
        packed_at = records + record * record_bytes + tl.load(row + 3)
        paged = tl.multiple_of(paged_at.to(tl.pointer_type(WORD)), ALIGNMENT)
        packed = tl.multiple_of(packed_at.to(tl.pointer_type(WORD)), ALIGNMENT)
        words = tl.multiple_of(tl.load(row + 2) // WORD_BYTES, ALIGNMENT // WORD_BYTES)
        mask = lane < words
        if TO_RECORDS:
            tl.store(packed + lane, tl.load(paged + lane, mask=mask), mask=mask)
        else:
            tl.store(paged + lane, tl.load(packed + lane, mask=mask), mask=mask)
