"""The GPU twins, against the reference. Needs torch, triton and, for ``cuda``, nvcc."""

from __future__ import annotations

import random

import pytest
import torch

from hexgen_vllm import kernels
from hexgen_vllm.kernels import BlockLayout, cuda, gather_blocks, scatter_blocks
from hexgen_vllm.kernels.pinned import pinned_buffer
from hexgen_vllm.kernels.staging import DeviceCopier
from tests.kernels.caches import LAYOUTS, Cache, Shape

pytestmark = pytest.mark.gpu

KERNELS = ("reference", "triton", "cuda", "batch")
SHAPES = [Shape(order=order, blocks=40, layers=3) for order in sorted(LAYOUTS)] + [
    Shape(dtype=torch.uint8, shift=1, content=40, heads=3),
    Shape(dtype=torch.float32, pad=1, content=33),
    Shape(dtype=torch.bfloat16, heads=8, content=256, tokens=64, layers=2, blocks=20),
    Shape(dtype=torch.float8_e4m3fn, heads=1, content=576, tokens=64, blocks=20),
    Shape(content=8, tokens=16, blocks=2500, layers=1),  # several launches
]


def sample(shape: Shape) -> list[int]:
    return random.Random(7).sample(range(shape.blocks), shape.blocks * 3 // 4)


def host(num_bytes: int) -> torch.Tensor:
    return pinned_buffer(num_bytes).fill_(7)


def assert_restores(cache: Cache, before: Cache, ids: list[int], restore: object) -> None:
    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids)
    assert callable(restore)
    restore()
    torch.cuda.synchronize()
    assert torch.equal(cache.bytes, expected.bytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["pinned", "device"])
def test_round_trip(shape: Shape, kernel: str, where: str) -> None:
    cache, ids = Cache(shape, device="cuda:0"), sample(shape)
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    num_bytes = layout.packed_bytes(len(ids))
    right = torch.empty(num_bytes, dtype=torch.uint8)
    saved = host(num_bytes) if where == "pinned" else right.to("cuda:0")

    gather_blocks(layout, ids, right, kernel="reference")
    gather_blocks(layout, ids, saved, kernel=kernel)
    torch.cuda.synchronize()

    assert torch.equal(saved.cpu(), right)
    assert torch.equal(cache.bytes, before.bytes)
    assert_restores(cache, before, ids, lambda: scatter_blocks(layout, ids, saved, kernel=kernel))


@pytest.mark.parametrize("load_way", ["batch", "staged"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("staging", [2, 7, 100])
def test_staging(kernel: str, staging: int, beside: bool, load_way: str) -> None:
    shape = Shape(blocks=40)
    cache, ids = Cache(shape, device="cuda:0"), sample(shape)
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    copier = DeviceCopier(layout, 50, staging_bytes=layout.packed_bytes(staging))
    copier.save_way = kernel
    copier.load_way = "batch" if load_way == "batch" else kernel
    right = host(layout.packed_bytes(len(ids)))
    gather_blocks(layout, ids, right, kernel="reference")

    arrived = copier.save(ids, [(20, 20), (2, len(ids) - 20)])
    cache.bytes.zero_()  # later work on the stream may overwrite the blocks at once
    assert arrived is not None
    arrived.synchronize()

    saved = copier.memory.view(50, -1)
    assert torch.equal(torch.cat((saved[20:40], saved[2 : len(ids) - 18])).flatten(), right)

    def load() -> None:
        done = copier.load(ids, [(20, 20), (2, len(ids) - 20)], beside=beside)
        while beside and not done():
            pass

    assert_restores(cache, before, ids, load)
    copier.close()


def test_calibration_chooses_and_changes_nothing() -> None:
    cache = Cache(Shape(blocks=40), device="cuda:0")
    before = cache.copy()
    copier = DeviceCopier(BlockLayout.from_tensors(cache.tensors), 50)
    copier.calibrate(30)
    copier.wait()
    assert torch.equal(cache.bytes, before.bytes)
    assert copier.pack_bytes_per_s is not None
    assert copier.pack_bytes_per_s > 1e9
    copier.close()


@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_copies_keep_to_the_current_stream(kernel: str) -> None:
    cache = Cache(Shape(blocks=512, tokens=64, content=128), device="cuda:0")
    layout, ids = BlockLayout.from_tensors(cache.tensors), list(range(512))
    gather_blocks(layout, ids, host(layout.packed_bytes(512)), kernel=kernel)  # compiled now
    saved = host(layout.packed_bytes(512))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        cache.bytes.fill_(3)
        gather_blocks(layout, ids, saved, kernel=kernel)
    # A slice: comparing all of it takes the host longer than the stream sleeps.
    assert bool((saved[: 1 << 16] == 7).all()), "the copy overtook its stream"
    stream.synchronize()
    assert bool((saved == 3).all())


@pytest.mark.parametrize("kernel", ["triton", "cuda", "batch"])
def test_pageable_memory_is_refused(kernel: str) -> None:
    layout = BlockLayout.from_tensors(Cache(Shape(), device="cuda:0").tensors)
    pageable = torch.empty(layout.packed_bytes(1), dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be pinned"):
        gather_blocks(layout, [0], pageable, kernel=kernel)


def test_pinned_buffer_has_the_asked_size() -> None:
    buffer = pinned_buffer(3 * 2**20 + 5)
    assert buffer.is_pinned()
    assert buffer.numel() == 3 * 2**20 + 5
    view = buffer[1:9]
    del buffer
    assert view.fill_(1).sum() == 8


def test_cuda_is_picked_first() -> None:
    assert kernels.pick_kernel(torch.device("cuda:0")) is cuda
