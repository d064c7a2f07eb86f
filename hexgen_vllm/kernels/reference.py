"""The definition of right: block copies in plain torch, for any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hexgen_vllm.kernels.checks import check_gather, check_scatter
from hexgen_vllm.kernels.layout import BlockLayout


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot serve a cache on ``device``: it always can."""
    del device
    return None


def gather_blocks(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, out: torch.Tensor
) -> None:
    """Pack blocks into ``out``: record ``i`` is block ``block_ids[i]``.

    Raises:
        ValueError: see :func:`~hexgen_vllm.kernels.checks.check_gather`.
    """
    ids = check_gather(layout, block_ids, out).to(layout.device)
    records = out.view(ids.numel(), layout.record_bytes)
    for page, columns in _page_columns(layout):
        picked = page.index_select(0, ids).contiguous()
        records[:, columns].copy_(picked.view(ids.numel(), page[0].numel()).view(torch.uint8))


def scatter_blocks(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, src: torch.Tensor
) -> None:
    """Unpack ``src`` into the cache: block ``block_ids[i]`` becomes record ``i``.

    Raises:
        ValueError: see :func:`~hexgen_vllm.kernels.checks.check_scatter`.
    """
    ids = check_scatter(layout, block_ids, src).to(layout.device)
    records = src.view(ids.numel(), layout.record_bytes)
    for page, columns in _page_columns(layout):
        # A fresh copy: a slice of the records may start where the integers may not.
        picked = records[:, columns].to(layout.device).clone(memory_format=torch.contiguous_format)
        page.index_copy_(0, ids, picked.view(page.dtype).view(ids.numel(), *page.shape[1:]))


def _page_columns(layout: BlockLayout) -> Iterator[tuple[torch.Tensor, slice]]:
    """Each layer's page and the bytes it takes in a record."""
    start = 0
    for page in layout.pages:
        end = start + page[0].numel() * page.element_size()
        yield page, slice(start, end)
        start = end
