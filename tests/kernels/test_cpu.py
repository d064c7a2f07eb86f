"""Copies large enough for several threads and for stores that go round the caches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from tests.kernels.caches import Cache, Shape


@pytest.fixture(params=[1, 3, 64], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(layers=3, blocks=120, tokens=64, content=64, heads=3, order="LHBNC"),
        Shape(layers=1, blocks=4, tokens=128, content=1024, heads=8, order="BLHNC"),
        Shape(layers=2, blocks=90, tokens=128, content=301, dtype=torch.uint8, pad=3, shift=1),
    ],
    ids=str,
)
def test_large_copies(shape: Shape) -> None:
    cache = Cache(shape)
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    ids = list(range(1, shape.blocks))[::-1]
    saved, right = (cache.random_bytes(layout.packed_bytes(len(ids)) + 1)[1:] for _ in range(2))
    assert saved.numel() > 4 << 20

    gather_blocks(layout, ids, saved, kernel="cpu")
    gather_blocks(layout, ids, right, kernel="reference")
    assert torch.equal(saved, right)

    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids)
    scatter_blocks(layout, ids, saved, kernel="cpu")
    assert torch.equal(cache.bytes, expected.bytes)
