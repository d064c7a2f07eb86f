"""The worker's half: bytes come back as they went, in pieces, in every layout, and are measured."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from hexgen_vllm.engine.swap.messages import (
    Load,
    Save,
    SwapMeta,
    SwapReport,
)
from hexgen_vllm.engine.swap.pool import Extent
from hexgen_vllm.engine.swap.worker import HostCopier, SwapWorker, make_copier
from hexgen_vllm.kernels import BlockLayout
from hexgen_vllm.kernels import tables as kernel_tables

BLOCKS = 12


def per_layer() -> list[torch.Tensor]:
    """Three layers of shape (B, H, N, C) as the CPU has them."""
    return [torch.rand(BLOCKS, 2, 32, 16) for _ in range(3)]


def heads_first() -> list[torch.Tensor]:
    """Blocks that fall into one piece per head."""
    return [torch.rand(2, BLOCKS, 32, 16).transpose(0, 1) for _ in range(2)]


def one_for_all() -> list[torch.Tensor]:
    """The pages of all layers of a block are neighbours."""
    return list(torch.rand(BLOCKS, 3, 32, 2, 16).bfloat16().unbind(1))


def small_kernel_blocks() -> list[torch.Tensor]:
    """The attention kernel sees blocks of a quarter of the scheduler's size."""
    return [torch.rand(BLOCKS * 4, 2, 8, 16) for _ in range(2)]


LAYOUTS = [per_layer, heads_first, one_for_all, small_kernel_blocks]


def worker(tensors: list[torch.Tensor], records: int = 20) -> SwapWorker:
    layout = BlockLayout.from_tensors(tensors, BLOCKS)
    return SwapWorker(layout, records, make_copier(layout, records))


def blocks(tensors: list[torch.Tensor], ids: tuple[int, ...]) -> list[torch.Tensor]:
    split = [t.reshape(BLOCKS, -1) for t in tensors]
    return [t[list(ids)].clone() for t in split]


@pytest.mark.parametrize("make", LAYOUTS)
def test_blocks_come_back_elsewhere(make: Callable[[], list[torch.Tensor]]) -> None:
    tensors = make()
    before = [t.clone() for t in tensors]
    swap = worker(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "calibration"
    saved = (7, 2, 11, 4, 5)
    extents = (Extent(13, 2), Extent(3, 3))
    want = blocks(tensors, saved)
    swap.save([Save(saved, extents)])
    for tensor in tensors:
        tensor.fill_(0.5)
    swap.load([Load("r", (1, 9, 6), (Extent(14, 1), Extent(3, 2)), beside=False)])
    got = blocks(tensors, (1, 9, 6))
    assert all(torch.equal(g, w[1:4]) for g, w in zip(got, want, strict=True))
    rest = tuple(i for i in range(BLOCKS) if i not in (1, 9, 6))
    assert all(bool((b == 0.5).all()) for b in blocks(tensors, rest))


def test_random_saves_and_loads_never_mix_up() -> None:
    rng, tensors = random.Random(1), per_layer()
    swap = worker(tensors, records=30)
    for _ in range(50):
        ids = tuple(rng.sample(range(BLOCKS), 6))
        first = rng.randrange(20)
        extents = (Extent(first, 4), Extent(first + 6, 2))
        want = blocks(tensors, ids)
        swap.save([Save(ids, extents)])
        for tensor in tensors:
            tensor.copy_(torch.rand(tensor.shape))
        target = tuple(rng.sample(range(BLOCKS), 6))
        swap.load([Load("r", target, extents, beside=False)])
        got = blocks(tensors, target)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_bandwidth_is_measured_at_start_and_of_every_copy() -> None:
    tensors = per_layer()
    swap = worker(tensors)
    first = swap.report()
    assert first is not None
    assert first.out_bytes == first.in_bytes == sum(t.nbytes for t in tensors)
    assert first.out_s > 0
    assert first.in_s > 0
    assert swap.report() is None
    swap.save([Save((1, 2), (Extent(0, 2),))])
    report = swap.report()
    assert report is not None
    assert (report.out_bytes, report.in_bytes) == (first.out_bytes // 6, 0)
    swap.save([])
    assert swap.report() is None


def test_what_a_sleep_wipes_is_made_again() -> None:
    """Tables in the device's memory: vLLM's sleep mode gives that up, contents and all."""
    tensors = per_layer()
    swap = worker(tensors)
    want = blocks(tensors, (1, 2))
    for tables in kernel_tables._tables.values():
        for table in tables.values():
            table.zero_()
    swap.renew()
    swap.save([Save((1, 2), (Extent(0, 2),))])
    swap.load([Load("r", (5, 6), (Extent(0, 2),), beside=False)])
    got = blocks(tensors, (5, 6))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


class SlowCopier(HostCopier):
    """Loads beside the forward pass are done when the test says so."""

    ready = False

    def load(self, *args: object, beside: bool) -> Callable[[], bool]:
        return lambda: self.ready


def test_loads_beside_are_reported_once_when_done() -> None:
    layout = BlockLayout.from_tensors(per_layer(), BLOCKS)
    copier = SlowCopier(layout, 20)
    swap = SwapWorker(layout, 20, copier)
    swap.load([Load("at once", (1,), (Extent(0, 1),), beside=False)])
    swap.load([Load("later", (2, 3), (Extent(1, 1), Extent(5, 1)), beside=True)])
    assert swap.finished() == set()
    copier.ready = True
    assert swap.finished() == {"later"}
    assert swap.finished() == set()


def test_reports_of_parallel_workers_add_bytes_not_time() -> None:
    joined = SwapReport(10, 1.0, 20, 2.0, 5, 1.0).aggregate(SwapReport(30, 0.5, 40, 3.0, 5, 2.0))
    assert joined == SwapReport(40, 1.0, 60, 3.0, 10, 3.0)

    class Foreign(KVConnectorWorkerMetadata):
        def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
            return self

    assert joined.aggregate(Foreign()) == joined


def test_messages_reach_other_processes() -> None:
    meta = SwapMeta(
        [Save((1, 2), (Extent(0, 2),))], [Load("r", (3,), (Extent(1, 1),), beside=True)]
    )
    assert pickle.loads(pickle.dumps(meta)) == meta
