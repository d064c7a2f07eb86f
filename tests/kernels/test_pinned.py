"""Pinned memory: as much as was asked for, in pieces, near the GPU, and given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hexgen_vllm.kernels.pinned import near_cpus, on_cpus, piece_bytes, register


class Runtime:
    """What torch tells of CUDA's runtime; registers up to ``most`` pieces."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.registered: dict[int, int] = {}
        self.pieces: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        if len(self.registered) == self.most:
            return 2
        self.registered[address] = num_bytes
        self.pieces.append(num_bytes)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def test_memory_has_the_asked_size_and_is_registered_in_pieces() -> None:
    runtime = Runtime()
    buffer = register(70_001, runtime, 1 << 15)
    assert buffer.numel() == 70_001  # not the next power of two
    assert runtime.pieces == [32768, 32768, 4465]
    view = buffer[5:9]
    del buffer
    gc.collect()
    assert len(runtime.registered) == 3
    assert view.fill_(1).sum() == 4
    del view
    gc.collect()
    assert runtime.registered == {}


def test_what_cannot_be_pinned_is_an_error_and_nothing_stays_registered() -> None:
    runtime = Runtime(most=1)
    with pytest.raises(RuntimeError, match="cannot pin 70001 bytes of host memory: error 2"):
        register(70_001, runtime, 1 << 15)
    assert runtime.registered == {}


@pytest.mark.parametrize("unit", [1, 4096, 2 << 20, 3 * 5 * 7 * 512])
def test_a_piece_has_whole_units_and_pages(unit: int) -> None:
    size = piece_bytes(unit)
    assert size % unit == size % os.sysconf("SC_PAGESIZE") == 0
    assert 32 << 30 < size <= 64 << 30


def test_the_cpus_of_the_gpus_node_are_found(tmp_path: Path) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    device = tmp_path / "bus/pci/devices/0000:c1:00.0"
    node = tmp_path / "devices/system/node/node1"
    assert near_cpus(gpu, tmp_path) == set()
    device.mkdir(parents=True)
    (device / "numa_node").write_text("-1\n")
    assert near_cpus(gpu, tmp_path) == set()
    (device / "numa_node").write_text("1\n")
    node.mkdir(parents=True)
    (node / "cpulist").write_text("4-6,12\n")
    assert near_cpus(gpu, tmp_path) == {4, 5, 6, 12}


def test_the_thread_runs_there_and_comes_back() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with on_cpus(one):
        assert os.sched_getaffinity(0) == one
    for unusable in (set[int](), {max(before) + 100}):
        with on_cpus(unusable):
            assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before
