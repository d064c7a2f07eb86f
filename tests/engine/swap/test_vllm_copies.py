"""vLLM's own copy kernels are timed where its build has them, and said to be absent elsewhere."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.kv_offload.cpu import swap_blocks_triton

from benchmarks.engine import vllm_copies
from benchmarks.kv.subjects import CopyBed, CopyCase

NAMES = ("swap_blocks", "swap_blocks_batch")


class Operators:
    """Do on the host what vLLM's do between host and GPU; they are called with the same words."""

    @staticmethod
    def swap_blocks(src: torch.Tensor, dst: torch.Tensor, size: int, mapping: torch.Tensor) -> None:
        source, target = src.view(-1, size), dst.view(-1, size)
        for one, other in mapping.tolist():
            target[other] = source[one]

    @staticmethod
    def swap_blocks_batch(src: torch.Tensor, dst: torch.Tensor, sizes: torch.Tensor) -> None:
        for one, other, size in zip(*(t.tolist() for t in (src, dst, sizes)), strict=True):
            memory(other, size).copy_(memory(one, size))


def memory(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def without(names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = type("There", (), {name: None for name in NAMES if name not in names})
    monkeypatch.setattr(torch.ops, "_C_cache_ops", there)


def test_the_build_for_cpus_has_none() -> None:
    assert vllm_copies.plugs() == ([], f"this vLLM is built without {' and '.join(NAMES)}")


def test_one_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(["swap_blocks"], monkeypatch)
    plugs, missing = vllm_copies.plugs()
    assert len(plugs) == 1
    assert missing == "this vLLM is built without swap_blocks"


def test_they_serve_no_cache_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    without([], monkeypatch)
    plugs, missing = vllm_copies.plugs()
    assert missing is None
    assert [plug(CopyBed(CopyCase(64, 1), "cpu")) for plug in plugs] == [None, None]


@pytest.mark.parametrize("make", [vllm_copies._per_layer, vllm_copies._batch])
def test_they_are_called_so_that_blocks_come_back(make: Any) -> None:
    bed = CopyBed(CopyCase(40 << 10, 5, layers=3), "cpu")
    assert bed.gives_back(make(bed, Operators))


def test_vllms_operators_take_the_arguments_that_they_are_given() -> None:
    wanted = {"swap_blocks": 4, "swap_blocks_batch": 3}
    for name, count in wanted.items():
        parameters = list(inspect.signature(getattr(ops, name)).parameters.values())
        assert all(p.default is not p.empty for p in parameters[count:])


@pytest.mark.parametrize(("page_bytes", "chunk"), [(4096, 4096), (6000, 8192), (16 << 10, 8192)])
def test_small_pages_are_loaded_with_triton(
    monkeypatch: pytest.MonkeyPatch, page_bytes: int, chunk: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        swap_blocks_triton,
        "swap_blocks_batch",
        lambda *where, bytes_per_chunk: calls.append((*where, bytes_per_chunk)),
    )
    load = vllm_copies._small_pages(page_bytes)
    assert load is not None
    load("host", "device", "sizes")
    assert calls == [("host", "device", "sizes", chunk)]


def test_large_and_odd_pages_are_not() -> None:
    assert vllm_copies._small_pages(28 << 10) is None
    assert vllm_copies._small_pages(4097) is None
