"""Copies beside the forward pass, on a fake CUDA runtime: their order, and whom they hold up."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hexgen_vllm.kernels import BlockLayout, staging
from hexgen_vllm.kernels.staging import DeviceCopier
from hexgen_vllm.policy.retention import CopyRates
from tools.fake_cuda import FakeCuda
from tools.gpu_check import BLOCK_BYTES, Timer, race

SCALE = 64
ENGINES = 40
MS = 1e-3


def place_of_wait() -> str:
    """The lines of the copier that ask for the wait."""
    frame, lines = sys._getframe(1), list[str]()
    while frame is not None:
        if frame.f_code.co_filename == staging.__file__:
            lines.append(f"{frame.f_code.co_name} {frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


def dropping(chosen: str | None, seen: Counter[str]) -> Callable[..., bool]:
    def drop(copier: DeviceCopier, stream: Any, event: Any) -> bool:
        del copier, stream, event
        place = place_of_wait()
        seen[place] += 1
        return place == chosen

    return drop


@pytest.fixture(scope="module")
def waits() -> Counter[str]:
    seen: Counter[str] = Counter()
    engines = [race(seed, fake=True, drop=dropping(None, seen)) for seed in range(ENGINES)]
    assert sum(e.saves for e in engines) > 500
    assert sum(e.loads for e in engines) > 500
    assert [seed for seed, e in enumerate(engines) if e.wrong] == []
    return seen


def test_random_engines_find_their_kv_whatever_gets_ahead(waits: Counter[str]) -> None:
    assert sum(waits.values()) > 1000


def test_every_wait_that_is_left_out_is_noticed(waits: Counter[str]) -> None:
    assert len(waits) >= 8
    for place in waits:
        wrong = (race(s, fake=True, drop=dropping(place, Counter())).wrong for s in range(150))
        assert any(wrong), f"nothing goes wrong without the wait at {place}"


@pytest.mark.parametrize("rate", [24e9, 50e9])
@pytest.mark.parametrize("tokens", [512, 4096, 16384])
def test_a_stall_is_as_long_as_auto_reckons(rate: float, tokens: int) -> None:
    fake = FakeCuda(scale=SCALE, out_bytes_per_s=rate, in_bytes_per_s=rate)
    timer, blocks = Timer(fake), tokens // 16
    held_s = timer.held_s(lambda: timer.save(blocks))
    copier = timer.copier
    assert copier.pack_bytes_per_s is not None
    rates = CopyRates(
        rate,
        rate,
        beside=True,
        staging_bytes=copier.staging_bytes * SCALE,
        pack_bytes_per_s=copier.pack_bytes_per_s * SCALE,
    )
    assert rates.stall_s(blocks * BLOCK_BYTES, 0) == pytest.approx(held_s, rel=0.2)
    if tokens <= 4096:
        assert held_s <= 2 * MS


def test_a_long_load_holds_nothing_else_up() -> None:
    timer = Timer(FakeCuda(scale=SCALE))
    one_s = timer.spent_s(lambda: None)
    for later in (timer.save_after_load, timer.load_after_load):
        assert timer.spent_s(lambda: later(512)) - 2 * one_s < 0.1 * MS  # noqa: B023


def test_scattered_records_cost_no_more_staging() -> None:
    timer = Timer(FakeCuda(scale=SCALE))
    whole_s = timer.held_s(lambda: timer.save(256))
    assert timer.held_s(lambda: timer.scattered_save(256)) == pytest.approx(whole_s, rel=0.01)


def test_neighbours_leave_in_one_copy() -> None:
    class Counting(FakeCuda):
        copies = 0

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            self.copies += 1
            super().copy(target, source)

    device = Counting()
    copier = DeviceCopier(layout(), 40, device)
    copier.save([5, 1, 9, 3, 2, 8], [(7, 2), (9, 1), (20, 3)])
    assert device.copies == 2


def layout() -> BlockLayout:
    return BlockLayout.from_tensors([torch.zeros(16, 64, dtype=torch.uint8) for _ in range(3)])


def test_ids_are_checked_once_per_save(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    check = staging.check_gather
    monkeypatch.setattr(staging, "check_gather", lambda *a: checks.append(a) or check(*a))
    monkeypatch.setattr("hexgen_vllm.kernels.check_gather", staging.check_gather)
    copier = DeviceCopier(layout(), 40, FakeCuda(), 192 * 4)
    copier.save(range(16), [(2 * i, 1) for i in range(16)])
    copier.wait()
    assert len(checks) == 1


@pytest.mark.parametrize(
    ("ids", "spans"), [([1], []), ([1, 2], [(0, 1)]), ([1, 2], [(39, 2)]), ([99], [(0, 1)])]
)
def test_a_wrong_copy_is_refused(ids: list[int], spans: list[tuple[int, int]]) -> None:
    copier = DeviceCopier(layout(), 40, FakeCuda())
    for copy in (copier.save, lambda *a: copier.load(*a, beside=True)):
        with pytest.raises(ValueError, match=r"^(spans|block_ids): "):
            copy(ids, spans)


def test_no_copy_reaches_over_the_border_of_registered_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "piece_bytes", lambda unit: 8 * unit)
    sizes = []

    class Watching(FakeCuda):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            host = target if target.data_ptr() in range(*self.bounds) else source
            first = (host.data_ptr() - self.bounds[0]) // 192
            sizes.append((first, host.numel() // 192))
            super().copy(target, source)

    device = Watching()
    copier = DeviceCopier(layout(), 40, device)
    device.bounds = (copier.memory.data_ptr(), copier.memory.data_ptr() + copier.memory.numel())
    copier.save(range(14), [(5, 14)])
    copier.load(range(14), [(5, 14)], beside=False)
    assert sizes == [(5, 3), (8, 8), (16, 3)] * 2


@pytest.mark.parametrize("fast", [True, False])
def test_loads_go_to_the_copy_engines_where_those_are_as_fast(fast: bool) -> None:
    class Engines(FakeCuda):
        def copy_blocks(self, way: str, *args: Any, **more: Any) -> None:
            if way == "batch" and not fast:
                self.submit(lambda: None, more_s=1e-3)
            super().copy_blocks(way, *args, **more)

    device = Engines(ways=("cuda", "batch"), scale=10_000)
    copier = DeviceCopier(layout(), 40, device)
    copier.calibrate(16)
    assert (copier.save_way, copier.load_way) == ("cuda", "batch" if fast else "cuda")


def test_the_fastest_kernel_packs() -> None:
    class Slow(FakeCuda):
        def copy_blocks(self, way: str, *args: Any, **more: Any) -> None:
            self.submit(lambda: None, more_s={"cuda": 2e-4, "triton": 1e-4, "reference": 3e-4}[way])
            super().copy_blocks(way, *args, **more)

    copier = DeviceCopier(layout(), 40, Slow(ways=("cuda", "triton", "reference")))
    copier.calibrate(16)
    assert copier.save_way == "triton"


def test_staging_follows_the_free_memory() -> None:
    sizes = [staging.staging_for(free << 20) >> 20 for free in (100, 2400, 100_000)]
    assert sizes == [64, 300, 640]
