"""The definition of right: block copies in plain torch, for any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hexgen_vllm.kernels.layout import BlockLayout


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot serve a cache on ``device``: it always can."""
    del device
    return None


def copy_blocks(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
    """Copy as :mod:`hexgen_vllm.kernels` says: record ``i`` and block ``ids[i]``."""
    on_device = ids.to(layout.device)
    records = buffer.view(ids.numel(), layout.record_bytes)
    for page, columns in _page_columns(layout):
        if to_records:
            picked = page.index_select(0, on_device).contiguous()
            records[:, columns].copy_(picked.view(ids.numel(), page[0].numel()).view(torch.uint8))
        else:
            # A fresh copy: a slice of the records may start where the integers may not.
            part = (
                records[:, columns].to(layout.device).clone(memory_format=torch.contiguous_format)
            )
            numbers = part.view(page.dtype).view(ids.numel(), *page.shape[1:])
            page.index_copy_(0, on_device, numbers)


def _page_columns(layout: BlockLayout) -> Iterator[tuple[torch.Tensor, slice]]:
    """Each layer's page and the bytes it takes in a record."""
    start = 0
    for page in layout.pages:
        end = start + page[0].numel() * page.element_size()
        yield page, slice(start, end)
        start = end
