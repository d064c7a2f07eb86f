"""Any blocks of any cache come back bit for bit, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from tests.kernels.caches import LAYOUTS, Cache, Shape

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)

# heads, elements per token and head: GQA of several widths, MLA's single latent head.
HEADS = ((1, 32), (2, 128), (3, 40), (8, 64), (1, 576))

shapes = st.builds(
    lambda heads, **rest: Shape(heads=heads[0], content=heads[1], **rest),
    heads=st.sampled_from(HEADS),
    layers=st.integers(1, 3),
    blocks=st.integers(1, 7),
    tokens=st.sampled_from((16, 32, 48, 64, 128)),
    order=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    pad=st.sampled_from((0, 0, 1, 8)),
    shift=st.sampled_from((0, 0, 1, 3, 4)),
)

tiny_shapes = st.builds(
    Shape,
    heads=st.integers(1, 2),
    content=st.sampled_from((6, 8)),
    layers=st.integers(1, 2),
    blocks=st.integers(1, 4),
    tokens=st.sampled_from((2, 4)),
    order=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    shift=st.sampled_from((0, 1)),
)


def block_ids(data: st.DataObject, blocks: int) -> list[int]:
    order = data.draw(st.permutations(range(blocks)))
    return order[: data.draw(st.integers(0, blocks))]


def assert_round_trip(shape: Shape, ids: list[int], kernel: str, seed: int) -> None:
    cache = Cache(shape, seed)
    layout = BlockLayout.from_tensors(cache.tensors)
    skew = seed % 2  # every other buffer starts at an odd address
    saved, right = (
        cache.random_bytes(layout.packed_bytes(len(ids)) + skew)[skew:] for _ in range(2)
    )
    before = cache.copy()

    gather_blocks(layout, ids, saved, kernel=kernel)
    gather_blocks(layout, ids, right, kernel="reference")
    assert torch.equal(saved, right)
    assert torch.equal(cache.bytes, before.bytes), "a save wrote into the cache"

    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids)
    scatter_blocks(layout, ids, saved, kernel=kernel)
    assert torch.equal(cache.bytes, expected.bytes)
    assert torch.equal(saved, right), "a restore wrote into the buffer"


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=shapes, seed=st.integers(0, 2**31))
def test_host_kernels(kernel: str, data: st.DataObject, shape: Shape, seed: int) -> None:
    assert_round_trip(shape, block_ids(data, shape.blocks), kernel, seed)


@pytest.mark.usefixtures("interpreter")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), shape=tiny_shapes, seed=st.integers(0, 2**31))
def test_triton_in_its_interpreter(data: st.DataObject, shape: Shape, seed: int) -> None:
    assert_round_trip(shape, block_ids(data, shape.blocks), "triton", seed)


@given(data=st.data(), shape=tiny_shapes, cut=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_any_part_of_a_copy_restores_alone(data: st.DataObject, shape: Shape, cut: int) -> None:
    cache = Cache(shape)
    ids = block_ids(data, shape.blocks)
    first, last = sorted((min(cut, len(ids)), len(ids)))
    layout = BlockLayout.from_tensors(cache.tensors)
    saved = torch.empty(layout.packed_bytes(len(ids)), dtype=torch.uint8)
    gather_blocks(layout, ids, saved)
    before = cache.copy()
    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids[first:last])

    scatter_blocks(layout, ids[first:last], saved[layout.record_span(first, last)])

    assert torch.equal(cache.bytes, expected.bytes)
