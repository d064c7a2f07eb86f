"""A GPU that is none: streams, events and asynchronous copies of real bytes, on the host.

Without a seed, in virtual time: kernels take as long as device memory needs for their bytes, the
bus has one copy engine per direction, which serves the stream whose copy was ready first, and the
host's own time stands still unless it sleeps or waits. Kernels of different streams do not slow
one another. With a seed there is no time: whenever the host does anything, any of the streams may
get ahead or not, so that many seeds try the orders that CUDA allows.

Rates are the caller's: this shows who waits for whom and for how long, never how fast a GPU is.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hexgen_vllm import kernels
from hexgen_vllm.kernels.layout import BlockLayout

_KERNEL = "kernel"
_LAGGARD_CHANGES = 0.02
_SECONDS_PER_COPY = 0.3e-6  # of a batch of copies, beside its bytes


@dataclass
class FakeEvent:
    """A point in a stream; ``time_s`` is when the stream passed it."""

    device: FakeCuda
    passed: bool = False
    time_s: float = math.inf

    def query(self) -> bool:
        """Return whether the stream has passed it by now."""
        self.device.let_work()
        return self.passed

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""
        while not self.passed:
            assert self.device.one(math.inf), "an event that never comes"
        self.device.now_s = max(self.device.now_s, self.time_s if self.device.timed else 0.0)


@dataclass
class _Work:
    """One entry of a stream: something to do, or an event to pass or to wait for."""

    issued_s: float
    do: Callable[[], object] | None = None
    engine: str = _KERNEL
    takes_s: float = 0.0
    waits: FakeEvent | None = None
    passes: FakeEvent | None = None


@dataclass(eq=False)
class FakeStream:
    """Work in order."""

    device: FakeCuda
    name: str
    queue: deque[_Work] = field(default_factory=deque)
    free_s: float = 0.0

    def wait_event(self, event: FakeEvent) -> None:
        """Have later work wait for ``event``."""
        if self.device.waits(self, event):
            self.queue.append(_Work(self.device.now_s, waits=event))

    def record_event(self) -> FakeEvent:
        """Return an event after all work so far."""
        event = FakeEvent(self.device)
        self.queue.append(_Work(self.device.now_s, passes=event))
        self.device.let_work()
        return event

    def ready_s(self) -> float:
        """Return when the first entry could begin, ``inf`` while it waits for another stream."""
        if not self.queue:
            return math.inf
        head = self.queue[0]
        ready_s = max(self.free_s, head.issued_s)
        if head.waits is None:
            return ready_s
        return max(ready_s, head.waits.time_s) if head.waits.passed else math.inf


class FakeCuda:
    """See :class:`hexgen_vllm.kernels.device.Device`.

    Args:
        seed: order of the streams; ``None`` is virtual time.
        out_bytes_per_s: of the bus, from the device.
        in_bytes_per_s: of the bus, to the device.
        memory_bytes_per_s: of device memory; a packed byte is read and written.
        free: bytes of device memory that are free.
        scale: bytes of the model per real byte: times are those of a cache so much larger.
        ways: kernels that can copy blocks.

    Attributes:
        now_s: the host's time.
        drop: told of each wait, returns whether it is left out; for tests of tests.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        out_bytes_per_s: float = 24e9,
        in_bytes_per_s: float = 24e9,
        memory_bytes_per_s: float = 1.5e12,
        free: int = 1 << 33,
        scale: int = 1,
        ways: tuple[str, ...] = ("cuda",),
    ) -> None:
        self.timed = seed is None
        self.now_s = 0.0
        self.drop: Callable[[FakeStream, FakeEvent], bool] = lambda stream, event: False
        self._rng = random.Random(seed)
        self._free, self._scale, self._ways = free, scale, ways
        self._rates = {
            "out": out_bytes_per_s,
            "in": in_bytes_per_s,
            _KERNEL: memory_bytes_per_s / 2,
        }
        self._engine_free_s = dict.fromkeys(("out", "in"), 0.0)
        self._streams: list[FakeStream] = []
        self._laggard = -1  # a stream that gets on only when no other can
        self._on_device: list[torch.Tensor] = []
        self._current = self.new_stream()

    # What a device offers.

    def new_stream(self) -> FakeStream:
        """Return a stream beside all others."""
        stream = FakeStream(self, f"stream {len(self._streams)}")
        self._streams.append(stream)
        return stream

    def current(self) -> FakeStream:
        """Return the stream that work goes to now."""
        return self._current

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Have work go to ``stream``."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def synchronize(self) -> None:
        """Return when all work is done."""
        while self.one(math.inf):
            pass
        if self.timed:
            self.now_s = max([self.now_s, *(stream.free_s for stream in self._streams)])

    def seconds(self) -> float:
        """Return the host's time."""
        return self.now_s

    def free_bytes(self) -> int:
        """Return how much device memory is free."""
        return self._free // self._scale

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Return device memory."""
        memory = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        self._on_device.append(memory)
        return memory

    def pinned(self, num_bytes: int, unit_bytes: int) -> torch.Tensor:
        """Return host memory."""
        assert num_bytes % unit_bytes == 0
        return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy over the bus."""
        to_host = not self._is_on_device(target)
        assert to_host == self._is_on_device(source), "a copy within one memory"
        self.submit(lambda: target.copy_(source), "out" if to_host else "in", target.numel())

    def ways(self) -> tuple[str, ...]:
        """Return the names that it was made with."""
        return self._ways

    def copy_blocks(
        self, way: str, layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, save: bool
    ) -> None:
        """Enqueue a copy of blocks: by a kernel, or by the copy engines over the bus."""
        own, kept = ids.clone(), not self._is_on_device(buffer)
        assert (way == "batch") == kept, "a kernel over the bus, or copy engines within the device"
        engine, extra_s = _KERNEL, 0.0
        if kept:
            engine = "out" if save else "in"
            extra_s = _SECONDS_PER_COPY * own.numel() * layout.runs_per_block
        self.submit(
            lambda: kernels.copy_blocks(layout, own, buffer, to_records=save, kernel="reference"),
            engine,
            buffer.numel(),
            extra_s,
        )

    # What a test does.

    def submit(
        self, do: Callable[[], object], engine: str = _KERNEL, num_bytes: int = 0, more_s: float = 0
    ) -> None:
        """Put work on the current stream: ``num_bytes`` at the engine's rate, and ``more_s``."""
        takes_s = num_bytes * self._scale / self._rates[engine] + more_s
        work = _Work(self.now_s, do, engine, takes_s)
        self._current.queue.append(work)
        self.let_work()

    def sleep(self, seconds: float) -> None:
        """Let the host's time pass."""
        self.now_s += seconds
        while self.timed and self.one(self.now_s):
            pass

    def finish_s(self, stream: FakeStream) -> float:
        """Return when ``stream`` will have done what it has, all else going on beside it."""
        event = stream.record_event()
        while not event.passed:
            assert self.one(math.inf), "a stream that waits for ever"
        return event.time_s

    def waits(self, stream: FakeStream, event: FakeEvent) -> bool:
        """Return whether a wait is not dropped."""
        return not self.drop(stream, event)

    def let_work(self) -> None:
        """Let streams get ahead while the host does something else."""
        if self.timed:
            while self.one(self.now_s):
                pass
            return
        if self._rng.random() < _LAGGARD_CHANGES:
            self._laggard = self._rng.randrange(2 * len(self._streams))
        for _ in range(self._rng.choice((0, 0, 0, 1, 2, 30))):
            if not self.one(math.inf):
                return

    def one(self, until_s: float) -> bool:
        """Do one entry of a stream, if any can begin by ``until_s``; return whether one did."""
        ready = [(s.ready_s(), i) for i, s in enumerate(self._streams)]
        able = [(at_s, i) for at_s, i in ready if at_s < math.inf]
        if not able:
            assert not any(s.queue for s in self._streams), "streams wait for one another"
            return False
        if not self.timed:
            able = [(at_s, i) for at_s, i in able if i != self._laggard] or able
        found = self._next(sorted(able), until_s) if self.timed else self._rng.choice(able)
        if found is None:
            return False
        start_s, chosen = found
        stream = self._streams[chosen]
        work = stream.queue[0]
        stream.queue.popleft()
        stream.free_s = start_s + work.takes_s
        if work.do is not None:
            work.do()
            if work.engine in self._engine_free_s:
                self._engine_free_s[work.engine] = stream.free_s
        if work.passes is not None:
            work.passes.passed, work.passes.time_s = True, stream.free_s
        return True

    def _next(self, able: list[tuple[float, int]], until_s: float) -> tuple[float, int] | None:
        """Return when and where the next entry begins that is done by ``until_s``.

        An engine serves what was ready first, also while that cannot be done in time.
        """
        taken: set[str] = set()
        for ready_s, i in able:
            work = self._streams[i].queue[0]
            start_s = ready_s
            if work.do is not None and work.engine in self._engine_free_s:
                if work.engine in taken:
                    continue
                start_s = max(start_s, self._engine_free_s[work.engine])
            if start_s + work.takes_s <= until_s:
                return start_s, i
            taken.add(work.engine if work.do is not None else "")
        return None

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr()
        return any(m.data_ptr() <= at < m.data_ptr() + m.numel() for m in self._on_device)
