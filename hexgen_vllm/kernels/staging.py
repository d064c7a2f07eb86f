"""Copies between a GPU's KV cache and pinned host memory, beside the forward pass.

A save packs its blocks into staging memory on the caller's stream, at the speed of device memory:
that is all that holds the caller up, as long as the staging memory has room. The copy engine then
takes the packed bytes over the bus. A load comes the other way.

Three lanes, each with a stream for the bus and staging memory of its own, so that none waits in
line behind another: saves, loads that the next forward pass needs, and loads beside it. Order
between lanes is kept record by record: a load waits for the save of its records, a save for the
loads that still read the records that it overwrites.

How blocks are copied is measured at start (:meth:`DeviceCopier.calibrate`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hexgen_vllm.kernels.checks import check_gather, check_scatter
from hexgen_vllm.kernels.device import CudaDevice, Device, Event, Stream
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.pinned import piece_bytes

logger = logging.getLogger(__name__)

LEAST_STAGING_BYTES: Final = 64 << 20
MOST_STAGING_BYTES: Final = 640 << 20
LOAD_STAGING_BYTES: Final = 32 << 20
_SHARE_OF_FREE: Final = 8
_PARTS: Final = 4  # a part leaves over the bus while the next one is packed
_ROUNDS: Final = 3
_AS_FAST: Final = 1.05

Span = tuple[int, int]
"""Records ``first .. first + size - 1``: (first, size)."""


@dataclass
class _Use:
    """A part of the staging memory in use until ``done``; blocks ``first .. last - 1`` of it."""

    first: int
    last: int
    done: Event


class _Lane:
    """Staging memory, taken in turn like a ring, and the stream that carries it over the bus."""

    def __init__(self, device: Device, layout: BlockLayout, num_bytes: int) -> None:
        self.bus = device.new_stream()
        self._record_bytes = layout.record_bytes
        self.blocks = max(num_bytes // layout.record_bytes, 2)
        self.memory = device.empty(self.blocks * layout.record_bytes)
        self._next = 0
        self._uses: deque[_Use] = deque()

    def take(self, wanted: int, stream: Stream) -> tuple[int, torch.Tensor]:
        """Return staging for up to ``wanted`` blocks; ``stream`` waits until it is free.

        Returns:
            Its first block, and the memory.
        """
        first = self._next
        last = min(first + min(wanted, max(self.blocks // _PARTS, 1)), self.blocks)
        self._next = last % self.blocks
        while self._uses and self._uses[0].first < last and first < self._uses[0].last:
            stream.wait_event(self._uses.popleft().done)
        return first, self.memory[first * self._record_bytes : last * self._record_bytes]

    def used(self, first: int, packed: torch.Tensor, done: Event) -> None:
        """Note that staging is free again after ``done``."""
        self._uses.append(_Use(first, first + packed.numel() // self._record_bytes, done))


class _Traffic:
    """Copies under way, by the host records that they touch."""

    def __init__(self) -> None:
        self._under_way: list[tuple[int, int, Event]] = []

    def add(self, spans: Iterable[Span], done: Event) -> None:
        """Note copies of ``spans`` that are over after ``done``."""
        self._under_way += [(first, first + size, done) for first, size in spans]

    def hold(self, stream: Stream, spans: Sequence[Span]) -> None:
        """Have ``stream`` wait for all that touches ``spans``."""
        self._under_way = [entry for entry in self._under_way if not entry[2].query()]
        waited: set[int] = set()
        for first, last, done in self._under_way:
            touches = any(first < a + size and a < last for a, size in spans)
            if touches and id(done) not in waited:
                waited.add(id(done))
                stream.wait_event(done)


class DeviceCopier:
    """Saves and loads blocks of one cache; calls belong to one thread and never block it.

    Args:
        layout: a cache on a GPU.
        records: how many blocks the host memory holds.
        device: the GPU; found by the layout if not given.
        staging_bytes: device memory for saves; by default an eighth of what is free, at least
            64 MiB and at most 640 MiB. A save that fits holds the caller up for its packing only.

    Attributes:
        at_once: a copy is done when its call returns; never here.
        memory: the host records, flat uint8.
        staging_bytes: what it took for saves.
        pack_bytes_per_s: how fast blocks are packed, ``None`` before :meth:`calibrate`.
        save_way: the kernel that packs and unpacks.
        load_way: ``batch`` where copy engines load blocks straight from the host, else as above.

    Raises:
        ConfigError: the cache is not on a GPU.
    """

    at_once = False

    def __init__(
        self,
        layout: BlockLayout,
        records: int,
        device: Device | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        self._layout = layout
        self._device = device = CudaDevice(layout.device) if device is None else device
        if staging_bytes is None:
            staging_bytes = staging_for(device.free_bytes())
        record = layout.record_bytes
        self.memory = device.pinned(layout.packed_bytes(records), record)
        self._border = max(piece_bytes(record) // record, 1)
        self._saves = _Lane(device, layout, staging_bytes)
        small = min(LOAD_STAGING_BYTES, staging_bytes)
        self._loads = {beside: _Lane(device, layout, small) for beside in (False, True)}
        self._side = device.new_stream()
        self._writes, self._reads = _Traffic(), _Traffic()
        self._saved: Event | None = None
        self.staging_bytes = self._saves.memory.numel()
        self.pack_bytes_per_s: float | None = None
        self.save_way = self.load_way = device.ways()[0]
        if self.load_way == "batch":
            self.save_way = "reference"

    def seconds(self) -> float:
        """Return the time that copies are measured by."""
        return self._device.seconds()

    def save(self, block_ids: Sequence[int] | torch.Tensor, spans: Sequence[Span]) -> Event | None:
        """Enqueue the copies of a step, all saves together.

        Work put on the current stream afterwards may overwrite the blocks.

        Args:
            block_ids: blocks of the cache.
            spans: the records that they go to, in the same order.

        Returns:
            The event after which the records are there, ``None`` if nothing is saved.

        Raises:
            ValueError: see :func:`~hexgen_vllm.kernels.checks.check_gather`.
        """
        device, lane = self._device, self._saves
        ids = self._checked(block_ids, spans, save=True)
        compute, done = device.current(), None
        self._reads.hold(lane.bus, spans)
        for part, place in self._parts(lane, ids, compute):
            first, packed = place
            device.copy_blocks(self.save_way, self._layout, ids[part], packed, save=True)
            lane.bus.wait_event(compute.record_event())
            targets = list(_cut(spans, part.start, part.stop, self._border))
            with device.on(lane.bus):
                for host, staged in self._both(targets, packed):
                    device.copy(host, staged)
            done = lane.bus.record_event()
            lane.used(first, packed, done)
            self._writes.add(targets, done)
        self._saved = compute.record_event()
        return done

    def load(
        self, block_ids: Sequence[int] | torch.Tensor, spans: Sequence[Span], *, beside: bool
    ) -> Callable[[], bool]:
        """Enqueue a load, and return what tells whether it is done.

        Unless ``beside``, work put on the current stream afterwards sees the blocks. Otherwise
        only work put there after the answer was true does, and until then nothing else may use
        the blocks. It starts after the saves of its step, which may free its blocks.

        Raises:
            ValueError: see :func:`~hexgen_vllm.kernels.checks.check_scatter`.
        """
        device, lane = self._device, self._loads[beside]
        ids = self._checked(block_ids, spans, save=False)
        stream = self._side if beside else device.current()
        if beside and self._saved is not None:
            stream.wait_event(self._saved)
        if self.load_way == "batch":
            self._load_straight(ids, spans, stream)
        else:
            self._writes.hold(lane.bus, spans)
            for part, place in self._parts(lane, ids, lane.bus):
                first, packed = place
                sources = list(_cut(spans, part.start, part.stop, self._border))
                with device.on(lane.bus):
                    for host, staged in self._both(sources, packed):
                        device.copy(staged, host)
                arrived = lane.bus.record_event()
                self._reads.add(sources, arrived)
                stream.wait_event(arrived)
                with device.on(stream):
                    device.copy_blocks(self.save_way, self._layout, ids[part], packed, save=False)
                lane.used(first, packed, stream.record_event())
        return stream.record_event().query

    def _load_straight(self, ids: torch.Tensor, spans: Sequence[Span], stream: Stream) -> None:
        """Have copy engines load blocks from host memory, without staging or a kernel."""
        self._writes.hold(stream, spans)
        start = 0
        with self._device.on(stream):
            for first, size in _cut(spans, 0, ids.numel(), self._border):
                part = ids[start : start + size]
                records = self.memory[self._layout.record_span(first, first + size)]
                self._device.copy_blocks("batch", self._layout, part, records, save=False)
                start += size
        self._reads.add(spans, stream.record_event())

    def fence(self) -> None:
        """Have work put on the current stream from now on wait for all loads ``beside``."""
        self._device.current().wait_event(self._side.record_event())

    def wait(self) -> None:
        """Return when all copies are done."""
        self._device.synchronize()

    def close(self) -> None:
        """Wait for copies under way, and let go of the host memory."""
        self.wait()
        self.memory = torch.empty(0, dtype=torch.uint8)

    def calibrate(self, blocks: int) -> None:
        """Choose how blocks are copied, by copying the first ``blocks`` of the cache; none changes.

        Packing goes to the kernel that is fastest within the device. Loads come straight from the
        host by copy engines where that is as fast as by staging: they leave the multiprocessors to
        the forward pass. No kernel ever reads or writes over the bus.
        """
        device, ids = self._device, torch.arange(min(blocks, self._saves.blocks // _PARTS or 1))
        packed = self._saves.memory[: self._layout.packed_bytes(ids.numel())]
        ways = device.ways()
        packs: dict[str, float] = {}
        for way in [way for way in ways if way != "batch"] or ["reference"]:
            self.save_way = way
            packs[way] = self._timed(
                lambda: device.copy_blocks(self.save_way, self._layout, ids, packed, save=True)
            )
        self.save_way = min(packs, key=lambda way: packs[way])
        self.pack_bytes_per_s = packed.numel() / max(packs[self.save_way], 1e-9)
        loads: dict[str, float] = {}
        spans = [(0, ids.numel())]
        self.save(ids, spans)
        for way in (self.save_way, "batch") if "batch" in ways else (self.save_way,):
            self.load_way = way
            loads[way] = self._timed(lambda: self.load(ids, spans, beside=False))
        straight = loads.get("batch", float("inf"))
        self.load_way = "batch" if straight <= _AS_FAST * loads[self.save_way] else self.save_way
        logger.info(
            "KV blocks are packed by %s (%s GB/s), loaded by %s (%s GB/s); %d MiB of staging.",
            *(self.save_way, _gb_per_s(packed.numel(), packs)),
            *(self.load_way, _gb_per_s(packed.numel(), loads)),
            self.staging_bytes >> 20,
        )

    def _timed(self, copy: Callable[[], object]) -> float:
        """Return the least seconds that a copy takes."""
        found = []
        for _ in range(_ROUNDS):
            self._device.synchronize()
            start = self._device.seconds()
            copy()
            self._device.synchronize()
            found.append(self._device.seconds() - start)
        return min(found)

    def _checked(
        self, block_ids: Sequence[int] | torch.Tensor, spans: Sequence[Span], *, save: bool
    ) -> torch.Tensor:
        records = sum(size for _, size in spans)
        last = max((first + size for first, size in spans), default=0)
        if records != len(block_ids) or self._layout.packed_bytes(last) > self.memory.numel():
            raise ValueError(
                f"spans: {records} records up to record {last} do not fit {len(block_ids)} blocks "
                f"and {self.memory.numel()} bytes."
            )
        check = check_gather if save else check_scatter
        return check(self._layout, block_ids, self.memory[: self._layout.packed_bytes(records)])

    @staticmethod
    def _parts(
        lane: _Lane, ids: torch.Tensor, stream: Stream
    ) -> Iterator[tuple[slice, tuple[int, torch.Tensor]]]:
        """Which ids go through which part of the staging; ``stream`` waits for each."""
        start = 0
        while start < ids.numel():
            place, packed = lane.take(ids.numel() - start, stream)
            stop = start + packed.numel() // (lane.memory.numel() // lane.blocks)
            yield slice(start, stop), (place, packed)
            start = stop

    def _both(
        self, spans: Iterable[Span], packed: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Host and staging memory of records that follow one another."""
        start = 0
        for first, size in spans:
            staged = packed[self._layout.record_span(start, start + size)]
            yield self.memory[self._layout.record_span(first, first + size)], staged
            start += size


def staging_for(free_bytes: int) -> int:
    """Return the bytes of staging for saves on a device with so much free memory."""
    return min(max(free_bytes // _SHARE_OF_FREE, LEAST_STAGING_BYTES), MOST_STAGING_BYTES)


def _cut(spans: Iterable[Span], start: int, stop: int, border: int) -> Iterator[Span]:
    """Return records ``start .. stop - 1`` of ``spans``: neighbours joined, cut at borders."""
    joined: list[Span] = []
    seen = 0
    for first, size in spans:
        low, high = max(start - seen, 0), min(stop - seen, size)
        seen += size
        if low >= high:
            continue
        if joined and sum(joined[-1]) == first + low:
            joined[-1] = (joined[-1][0], joined[-1][1] + high - low)
        else:
            joined.append((first + low, high - low))
    for first, size in joined:
        begin, end = first, first + size
        while begin < end:
            part = min(end - begin, border - begin % border)
            yield begin, part
            begin += part


def _gb_per_s(num_bytes: int, seconds: dict[str, float]) -> str:
    return ", ".join(f"{way} {num_bytes / max(s, 1e-9) / 1e9:.1f}" for way, s in seconds.items())
