"""The GPU's copier: the streams it works in, without a GPU, and that bytes come back, with one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hexgen_vllm.engine.swap import worker as kv_copier
from hexgen_vllm.engine.swap.messages import Load, Save
from hexgen_vllm.engine.swap.pool import Extent
from hexgen_vllm.engine.swap.worker import DeviceCopier, SwapWorker, make_copier
from hexgen_vllm.kernels import BlockLayout

Log = list[tuple[str, str]]


class Event:
    """An event that remembers on which stream it was recorded."""

    def __init__(self, log: Log, name: str = "saved") -> None:
        self._log, self.name = log, name

    def record(self, stream: Stream) -> None:
        self._log.append((stream.name, f"record {self.name}"))

    def query(self) -> bool:
        return False


class Stream:
    def __init__(self, log: Log, name: str) -> None:
        self._log, self.name = log, name

    def wait_event(self, event: Event) -> None:
        self._log.append((self.name, f"wait {event.name}"))

    def record_event(self) -> Event:
        self._log.append((self.name, "record done"))
        return Event(self._log, "done")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Puts a fake of CUDA in place, and tells what is submitted to which stream."""
    found: Log = []
    compute, current = Stream(found, "compute"), ["compute"]

    class Staged:
        def __init__(self, layout: Any, staging_bytes: int) -> None:
            assert staging_bytes >= 2 * layout.record_bytes

        def save(self, ids: Any, records: Any) -> None:
            found.append((current[0], f"save {list(ids)}"))

        def restore(self, ids: Any, records: Any) -> None:
            found.append((current[0], f"restore {list(ids)}"))

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    monkeypatch.setattr(kv_copier, "StagedCopier", Staged)
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: Stream(found, "side"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(found))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return found


def device_copier() -> DeviceCopier:
    layout: Any = SimpleNamespace(device=torch.device("cuda"), record_bytes=1 << 20)
    return DeviceCopier(layout)


def test_saves_and_urgent_loads_stay_in_order_with_the_forward_pass(log: Log) -> None:
    copier, memory = device_copier(), torch.empty(0)
    copier.save([1, 2], memory)
    copier.saved()
    copier.load([3], memory, beside=False)
    assert log == [
        ("compute", "save [1, 2]"),
        ("compute", "record saved"),
        ("compute", "restore [3]"),
        ("compute", "record done"),
    ]


def test_a_load_beside_waits_for_the_saves_and_not_for_the_forward_pass(log: Log) -> None:
    copier, memory = device_copier(), torch.empty(0)
    copier.save([1], memory)
    copier.saved()
    log.append(("compute", "forward"))
    done = copier.load([1], memory, beside=True)
    assert log[1:] == [
        ("compute", "record saved"),
        ("compute", "forward"),
        ("side", "wait saved"),
        ("side", "restore [1]"),
        ("side", "record done"),
    ]
    assert not done()


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True])
def test_bytes_come_back_on_a_gpu(beside: bool) -> None:
    tensors = [torch.rand(64, 2, 16, 32, device="cuda", dtype=torch.float16) for _ in range(4)]
    layout = BlockLayout.from_tensors(tensors)
    worker = SwapWorker(layout, 100, make_copier(layout))
    ids, target = tuple(range(3, 23)), tuple(range(40, 60))
    want = [t[list(ids)].clone() for t in tensors]
    extents = (Extent(70, 12), Extent(5, 8))
    worker.save([Save(ids, extents)])
    for tensor in tensors:
        tensor[:30].fill_(7)  # the blocks are given away at once
    worker.load([Load("r", target, extents, beside)])
    while beside and worker.finished() != {"r"}:
        pass
    got = [t[list(target)] for t in tensors]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    report = worker.report()
    assert report is not None
    assert report.out_s > 0
    worker.close()
