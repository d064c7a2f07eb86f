"""Tables of pieces that native kernels walk: the layout's runs, cut and laid out as int64 rows."""

from __future__ import annotations

import weakref

import torch

from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.runs import alignment_of, split_runs

_tables: weakref.WeakKeyDictionary[BlockLayout, dict[int, torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


def piece_table(layout: BlockLayout, piece_bytes: int) -> torch.Tensor:
    """The runs of ``layout`` in pieces of at most ``piece_bytes``, kept on its device.

    ``piece_bytes`` is a multiple of 16, so that cutting keeps the layout's alignment. The table
    is made once per layout and lives as long as the layout does.

    Returns:
        int64 tensor ``(pieces, 4)``; a row is address, block stride, bytes, record offset, all
        in bytes. ``csrc/kv_copy.h`` has the same row as a struct.
    """
    tables = _tables.setdefault(layout, {})
    if piece_bytes not in tables:
        rows = [
            (piece.address, piece.block_stride_bytes, piece.num_bytes, piece.record_offset)
            for piece in split_runs(layout.runs, piece_bytes)
        ]
        tables[piece_bytes] = torch.tensor(rows, dtype=torch.int64, device=layout.device)
    return tables[piece_bytes]


def forget_tables(layout: BlockLayout) -> None:
    """Have the tables of ``layout`` made again: their memory may have lost what was in it."""
    _tables.pop(layout, None)


def word_bytes(layout: BlockLayout, buffer: torch.Tensor) -> int:
    """Widest load, 1 to 16 bytes, that fits the cache's and the buffer's alignment."""
    return alignment_of((layout.alignment, buffer.data_ptr()))
