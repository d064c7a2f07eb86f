"""How a KV cache lies in memory, and the packed format that copies of its blocks take.

**Packed format.** A copy of ``n`` blocks is ``n`` *records* of ``record_bytes`` bytes, one per
block in the order of the given ids: ``[block][layer][page bytes]``. Layers come in the order
given to :meth:`BlockLayout.from_tensors`, a page's bytes in the order they have in memory
(largest stride first), without padding between them. Blocks are outermost so that one block is
one contiguous record: any part ``first:last`` of a saved copy can be restored on its own (the
prefix cache may still hold the rest), a pool can hand out space in whole records, and saving
more blocks appends. The format depends on the layout, never on the kernel that copied.

**What fits.** Per-layer tensors or one cross-layer tensor, any dtype of 1, 2, 4 or 8 bytes, any
order of the dimensions after the first: LBHNC, LBNHC, LHBNC, BLHNC, BLNHC and BHLNC of vLLM,
MLA's ``(B, 1, N, C)``, padded pages. Where a page is not one piece it becomes several runs;
where the pages of all layers are neighbours (BLHNC, BLNHC) a block is a single run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.runs import (
    BlockRun,
    Dim,
    alignment_of,
    check_disjoint,
    merge_runs,
    page_runs,
)

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Where the blocks of a KV cache lie; compared by identity.

    Attributes:
        pages: one integer view per layer, ``(num_blocks, ...)`` in memory order. They keep the
            cache alive.
        device: where the cache lives.
        num_blocks: valid block ids are ``0 .. num_blocks - 1``.
        runs: the stretches of bytes that make up a block, in record order.
        record_bytes: packed bytes per block.
        alignment: largest power of two, up to 16 bytes, that divides every address and size.
    """

    pages: tuple[torch.Tensor, ...] = field(repr=False)
    device: torch.device
    num_blocks: int
    runs: tuple[BlockRun, ...] = field(repr=False)
    record_bytes: int
    alignment: int

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[torch.Tensor], num_blocks: int | None = None
    ) -> BlockLayout:
        """Describe a cache by its tensors.

        Args:
            tensors: one per layer, or a single one for all layers; dimension 0 is the block. A
                cross-layer tensor with layers first is given as ``tensor.unbind(0)``. A tensor
                listed twice (layers that share their KV) is stored once.
            num_blocks: how many blocks the block ids count. Defaults to dimension 0 of the first
                tensor; a divisor of it where kernels see smaller blocks than the scheduler.

        Raises:
            ConfigError: the tensors cannot be described, or share bytes with one another.
        """
        distinct = list({_identity(tensor): tensor for tensor in tensors}.values())
        if not distinct:
            raise ConfigError("KV layout: no tensors were given.")
        count = next(iter(distinct[0].shape), 1) if num_blocks is None else num_blocks
        pages = tuple(_memory_order(_blocks_first(tensor, count)) for tensor in distinct)
        _check_one_device(pages)
        runs, record_bytes = _runs_of(pages)
        check_disjoint(runs, count)
        sizes = (n for run in runs for n in (run.address, run.block_stride_bytes, run.num_bytes))
        return cls(
            pages=pages,
            device=pages[0].device,
            num_blocks=count,
            runs=tuple(runs),
            record_bytes=record_bytes,
            alignment=alignment_of((record_bytes, *sizes)),
        )

    @property
    def runs_per_block(self) -> int:
        """Separate stretches of memory that one block consists of."""
        return len(self.runs)

    def packed_bytes(self, num_blocks: int) -> int:
        """Bytes of a copy of ``num_blocks`` blocks."""
        return num_blocks * self.record_bytes

    def record_span(self, first: int, last: int) -> slice:
        """Bytes of records ``first:last`` in a packed copy, for a partial restore."""
        return slice(self.packed_bytes(first), self.packed_bytes(last))


def _identity(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _blocks_first(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The tensor as integers with ``num_blocks`` scheduler blocks in dimension 0."""
    if tensor.layout != torch.strided or tensor.ndim == 0 or tensor.numel() == 0:
        raise ConfigError(
            f"KV layout: a tensor of shape {tuple(tensor.shape)} and layout {tensor.layout} "
            "holds no blocks."
        )
    if num_blocks < 1 or tensor.shape[0] % num_blocks:
        raise ConfigError(
            f"KV layout: dimension 0 of a tensor of shape {tuple(tensor.shape)} does not divide "
            f"into {num_blocks} blocks."
        )
    integer = _INTEGER_OF_SIZE.get(tensor.element_size())
    if integer is None or tensor.is_complex():
        raise ConfigError(f"KV layout: elements of {tensor.dtype} cannot be copied as integers.")
    integers = tensor.detach().view(integer)
    if tensor.shape[0] == num_blocks:
        return integers
    return integers.unflatten(0, (num_blocks, -1))


def _memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Dimensions after the first by falling stride: reading the view reads memory forwards."""
    order = sorted(range(1, tensor.ndim), key=lambda dim: -tensor.stride(dim))
    return tensor.permute(0, *order)


def _check_one_device(pages: Sequence[torch.Tensor]) -> None:
    devices = sorted({str(page.device) for page in pages})
    if len(devices) > 1:
        raise ConfigError(f"KV layout: layers lie on several devices ({', '.join(devices)}).")


def _runs_of(pages: Sequence[torch.Tensor]) -> tuple[list[BlockRun], int]:
    """All runs of a block in record order, and the record's bytes."""
    runs: list[BlockRun] = []
    record_bytes = 0
    for page in pages:
        item = page.element_size()
        dims = [
            Dim(size, stride * item)
            for size, stride in zip(page.shape[1:], page.stride()[1:], strict=True)
            if size > 1
        ]
        block_stride = page.stride(0) * item
        runs += page_runs(dims, item, page.data_ptr(), block_stride, record_bytes)
        record_bytes += page[0].numel() * item
    return merge_runs(runs), record_bytes
