"""KV caches in every physical order that vLLM uses, as views of one flat buffer of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


@dataclass(frozen=True)
class Shape:
    """A cache: layers, blocks, heads, tokens per block, elements per token and head.

    ``pad`` elements follow each innermost row, so that pages have gaps; ``shift`` bytes precede
    the first page, so that addresses are not aligned.
    """

    layers: int = 2
    blocks: int = 6
    heads: int = 2
    tokens: int = 16
    content: int = 16
    order: str = "LBHNC"
    dtype: torch.dtype = torch.float16
    pad: int = 0
    shift: int = 0


class Cache:
    """Random bytes seen as a KV cache: ``view`` is (layer, block, head, token, content)."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cpu") -> None:
        self.shape = shape
        size = torch.empty(0, dtype=shape.dtype).element_size()
        logical = (shape.layers, shape.blocks, shape.heads, shape.tokens, shape.content)
        order = LAYOUTS[shape.order]
        physical = [logical[dim] for dim in order]
        physical[-1] += shape.pad
        start = shape.shift * size
        used = math.prod(physical) * size
        self.generator = torch.Generator().manual_seed(seed)
        self.bytes = self.random_bytes(start + used + 64).to(device)
        elements = self.bytes[start : start + used].view(shape.dtype).view(physical)
        rows = elements.narrow(-1, 0, shape.content)
        self.view = rows.permute([order.index(dim) for dim in range(5)])
        self.tensors = list(self.view.unbind(0))

    def random_bytes(self, count: int) -> torch.Tensor:
        """New random bytes, on the host."""
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=self.generator)

    def scramble(self) -> None:
        """Replace all bytes, those between the pages included."""
        self.bytes.copy_(self.random_bytes(self.bytes.numel()))

    def copy(self) -> Cache:
        """The same cache in memory of its own."""
        twin = Cache(self.shape, device=str(self.bytes.device))
        twin.bytes.copy_(self.bytes)
        return twin

    def put(self, source: Cache, block_ids: list[int]) -> None:
        """Take over blocks by plain indexing: what a restore must do, computed another way."""
        for block in block_ids:
            integers = self.view[:, block].view(_INTEGER[self.view.element_size()])
            integers.copy_(source.view[:, block].view(integers.dtype))


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
