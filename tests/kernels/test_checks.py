"""A wrong argument raises in every twin, before a byte is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from tests.kernels.caches import Cache, Shape

KERNELS = ("reference", "cpu", "triton")
pytestmark = pytest.mark.usefixtures("interpreter")


def buffer(layout: BlockLayout, blocks: int) -> torch.Tensor:
    return torch.full((layout.packed_bytes(blocks),), 7, dtype=torch.uint8)


WRONG_IDS: list[tuple[Any, str]] = [
    ([0, 6], "block 6 is outside 0..5"),
    ([-1, 2], "block -1 is outside 0..5"),
    ([2**40, 2], "outside 0..5"),
    ([0.0, 1.0], "integers are needed"),
    ([True, False], "integers are needed"),
    ([[0, 1]], "flat list"),
    (torch.tensor([0, 1], device="meta"), "on the host"),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("ids", "says"), WRONG_IDS)
def test_wrong_ids(kernel: str, ids: Any, says: str) -> None:
    cache = Cache(Shape())
    layout = BlockLayout.from_tensors(cache.tensors)
    packed, before = buffer(layout, 2), cache.copy()
    with pytest.raises(ValueError, match=says):
        gather_blocks(layout, ids, packed, kernel=kernel)
    with pytest.raises(ValueError, match=says):
        scatter_blocks(layout, ids, packed, kernel=kernel)
    assert torch.equal(packed, buffer(layout, 2))
    assert torch.equal(cache.bytes, before.bytes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_is_never_written_twice(kernel: str) -> None:
    cache = Cache(Shape())
    layout = BlockLayout.from_tensors(cache.tensors)
    packed, before = buffer(layout, 3), cache.copy()
    with pytest.raises(ValueError, match="repeats"):
        scatter_blocks(layout, [1, 2, 1], packed, kernel=kernel)
    assert torch.equal(cache.bytes, before.bytes)

    gather_blocks(layout, [1, 2, 1], packed, kernel=kernel)
    first, _, third = packed.view(3, -1)
    assert torch.equal(first, third), "reading a block twice is no error"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda packed: packed[:-1], "need 4096 bytes, not 4095"),
        (lambda packed: torch.cat([packed, packed]), "not 8192"),
        (lambda packed: packed.view(torch.int8), "uint8"),
        (lambda packed: packed.repeat_interleave(2)[::2], "contiguous"),
        (lambda packed: packed.to("meta"), "lies on meta"),
    ],
)
def test_wrong_buffers(kernel: str, wrong: Any, says: str) -> None:
    cache = Cache(Shape())
    layout = BlockLayout.from_tensors(cache.tensors)
    packed, before = wrong(buffer(layout, 2)), cache.copy()
    with pytest.raises(ValueError, match=says):
        gather_blocks(layout, [0, 1], packed, kernel=kernel)
    with pytest.raises(ValueError, match=says):
        scatter_blocks(layout, [0, 1], packed, kernel=kernel)
    assert torch.equal(cache.bytes, before.bytes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_blocks_is_nothing_to_do(kernel: str) -> None:
    cache = Cache(Shape())
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    gather_blocks(layout, [], buffer(layout, 0), kernel=kernel)
    scatter_blocks(layout, [], buffer(layout, 0), kernel=kernel)
    assert torch.equal(cache.bytes, before.bytes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_may_be_a_tensor(kernel: str, dtype: torch.dtype) -> None:
    layout = BlockLayout.from_tensors(Cache(Shape()).tensors)
    from_list, from_tensor = buffer(layout, 2), buffer(layout, 2)
    gather_blocks(layout, [3, 1], from_list, kernel=kernel)
    strided = torch.tensor([3, 0, 1, 0], dtype=dtype)[::2]
    gather_blocks(layout, strided, from_tensor, kernel=kernel)
    assert torch.equal(from_list, from_tensor)
