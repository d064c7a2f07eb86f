"""Work to be timed: stand-ins for prefill and decode, and copies that run beside them.

They need nothing but torch: a large matrix product for prefill, which arithmetic bounds, and thin
ones for decode, which memory bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.kv.subjects import CopyBed, Way

_PREFILL = {"cpu": 1024, "cuda": 8192}
_DECODE = {"cpu": 2048, "cuda": 8192}
_LAYERS = {"cpu": 4, "cuda": 16}
_BATCH = 32


class Probe:
    """A made-up piece of a model on ``device``.

    Attributes:
        flops: floating-point operations of one step.
        item_bytes: bytes of a number: bfloat16 on a GPU, float32 on a CPU.
    """

    def __init__(self, device: str, rows: int, width: int, layers: int) -> None:
        self._device = torch.device(device)
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        scale = width**-0.5
        shapes = [(rows, width), *[(width, width)] * layers]
        self._input, *self._weights = (
            torch.randn(*shape, device=self._device, dtype=dtype) * scale for shape in shapes
        )
        self.flops = 2.0 * rows * width**2 * layers
        self.item_bytes = dtype.itemsize

    def step(self) -> None:
        """Compute, and return when it is done; work in other streams goes on."""
        hidden = self._input
        for weights in self._weights:
            hidden = hidden @ weights
        if self._device.type != "cpu":
            torch.cuda.current_stream(self._device).synchronize()


def prefill(device: str) -> Probe:
    """Return one large product; a real prefill does no more operations per second."""
    size = _PREFILL[torch.device(device).type]
    return Probe(device, size, size, 1)


def decode(device: str) -> Probe:
    """Return a step of a small batch through one large matrix after another."""
    kind = torch.device(device).type
    return Probe(device, _BATCH, _DECODE[kind], _LAYERS[kind])


@contextmanager
def copying(bed: CopyBed, way: Way) -> Iterator[Callable[[], int]]:
    """Save and restore without a pause, in a thread and a stream of their own.

    Yields:
        What tells the bytes copied so far.
    """
    stop, rounds = threading.Event(), [0]

    def run() -> None:
        with _own_stream(bed.device) as finish:
            while not stop.is_set():
                way.save()
                way.restore()
                finish()
                rounds[0] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield lambda: 2 * rounds[0] * bed.case.total_bytes
    finally:
        stop.set()
        thread.join()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """Put the work of this thread into a new stream; yields what waits for it."""
    if device.type == "cpu":
        yield lambda: None
        return
    stream = torch.cuda.Stream(device=device)
    with torch.cuda.stream(stream):
        yield stream.synchronize
