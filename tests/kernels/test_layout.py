"""What a layout says of a cache, and which caches it refuses."""

from __future__ import annotations

import pytest
import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels import BlockLayout, gather_blocks, scatter_blocks
from tests.kernels.caches import Cache, Shape

PAGE_BYTES = 2 * 16 * 16 * 2  # heads x tokens x elements x bytes of the default shape


@pytest.mark.parametrize(
    ("order", "runs"),
    [
        ("LBHNC", 2),  # one per layer
        ("LBNHC", 2),
        ("LHBNC", 4),  # one per layer and head
        ("BLHNC", 1),  # all layers are one piece
        ("BLNHC", 1),
        ("BHLNC", 4),
    ],
)
def test_runs_per_block(order: str, runs: int) -> None:
    layout = BlockLayout.from_tensors(Cache(Shape(order=order)).tensors)

    assert layout.runs_per_block == runs
    assert layout.record_bytes == 2 * PAGE_BYTES
    assert layout.packed_bytes(3) == 6 * PAGE_BYTES
    assert sum(run.num_bytes for run in layout.runs) == layout.record_bytes
    assert layout.alignment == 16


def test_record_is_the_pages_in_layer_order() -> None:
    cache = Cache(Shape(order="LBNHC"))
    layout = BlockLayout.from_tensors(cache.tensors)
    out = torch.empty(layout.packed_bytes(1), dtype=torch.uint8)

    gather_blocks(layout, [4], out, kernel="reference")

    pages = [tensor[4].transpose(0, 1).contiguous() for tensor in cache.tensors]
    assert torch.equal(out, torch.cat([page.view(torch.uint8).flatten() for page in pages]))


def test_layers_in_other_than_memory_order_still_round_trip() -> None:
    cache = Cache(Shape(order="BLHNC", layers=3))
    layout = BlockLayout.from_tensors([cache.tensors[i] for i in (2, 0, 1)])
    assert layout.runs_per_block == 2
    saved = torch.empty(layout.packed_bytes(2), dtype=torch.uint8)
    gather_blocks(layout, [5, 0], saved)
    before = cache.copy()
    cache.scramble()
    scatter_blocks(layout, [5, 0], saved)
    for block in (5, 0):
        assert torch.equal(
            cache.view[:, block].view(torch.int16), before.view[:, block].view(torch.int16)
        )


def test_one_cross_layer_tensor() -> None:
    cache = Cache(Shape(order="BLHNC"))
    whole = cache.view.transpose(0, 1)
    layout = BlockLayout.from_tensors([whole])
    assert (layout.num_blocks, layout.runs_per_block) == (6, 1)
    assert layout.record_bytes == 2 * PAGE_BYTES


def test_kernels_may_see_smaller_blocks_than_the_scheduler() -> None:
    cache = Cache(Shape(blocks=6))
    layout = BlockLayout.from_tensors(cache.tensors, num_blocks=3)
    assert (layout.num_blocks, layout.record_bytes) == (3, 4 * PAGE_BYTES)
    out = torch.empty(layout.packed_bytes(1), dtype=torch.uint8)
    gather_blocks(layout, [1], out)
    first_layer = cache.tensors[0][2:4].contiguous().view(torch.uint8).flatten()
    assert torch.equal(out[: 2 * PAGE_BYTES], first_layer)


def test_a_tensor_listed_twice_is_stored_once() -> None:
    tensor = Cache(Shape()).tensors[0]
    layout = BlockLayout.from_tensors([tensor, tensor])
    assert layout.record_bytes == PAGE_BYTES


def test_odd_addresses_lower_the_alignment() -> None:
    shape = Shape(dtype=torch.uint8, shift=1)
    assert BlockLayout.from_tensors(Cache(shape).tensors).alignment == 1


def test_layers_of_different_sizes_share_a_record() -> None:
    small, large = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 24, dtype=torch.float32)
    layout = BlockLayout.from_tensors([small, large])
    assert layout.record_bytes == 8 + 96


def pages(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensors", "num_blocks", "says"),
    [
        ([], None, "no tensors"),
        ([pages(4, 2, 0)], None, "holds no blocks"),
        ([torch.tensor(1.0)], None, "holds no blocks"),
        ([pages(4, 8), pages(6, 8)], None, "into 4 blocks"),
        ([pages(4, 8)], 3, "into 3 blocks"),
        ([pages(4, 8)], 0, "into 0 blocks"),
        ([torch.zeros(4, 8, dtype=torch.complex64)], None, "cannot be copied"),
        ([pages(4, 8), torch.zeros(4, 8, device="meta")], None, "several devices"),
        ([pages(1, 8).expand(4, 8)], None, "share bytes"),
        ([pages(4, 1).expand(4, 8)], None, "share bytes"),
        ([pages(64).as_strided((4, 8), (4, 1))], None, "share bytes"),
        ([pages(2, 70_000, 2)[..., 0]], None, "too scattered"),
    ],
)
def test_refused(tensors: list[torch.Tensor], num_blocks: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        BlockLayout.from_tensors(tensors, num_blocks)
    assert str(refusal.value).endswith(".")


def test_layers_that_overlap_are_refused() -> None:
    flat = torch.zeros(4 * 64, dtype=torch.uint8)
    first, second = flat.as_strided((4, 32), (64, 1)), flat.as_strided((4, 32), (64, 1), 16)
    beside = flat.as_strided((4, 32), (64, 1), 32)
    assert BlockLayout.from_tensors([first, beside]).runs_per_block == 1
    with pytest.raises(ConfigError, match="share bytes"):
        BlockLayout.from_tensors([first, second])
    other_stride = flat.as_strided((4, 16), (48, 1), 32)
    with pytest.raises(ConfigError, match="share bytes"):
        BlockLayout.from_tensors([first, other_stride])
