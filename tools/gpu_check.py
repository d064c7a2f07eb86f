"""The copy path of host KV on a GPU, without vLLM: is it right, and whom does it hold up?

    python -m tools.gpu_check races [--fake] [--engines N] [--json FILE]
    python -m tools.gpu_check stalls [--fake] [--json FILE]

``races``: random engines preempt, resume, admit and end calls for many steps; every forward pass
checks on the device what the blocks of its calls hold. ``stalls``: how much later a forward pass
ends because of a save, of a save of one block after a long load, and of a small load behind a long
one, for the pages of Llama-3.1-8B (2 MiB in a block of 16 tokens). ``--fake`` takes a fake CUDA
runtime: random orders for ``races``, virtual time at 24 GB/s for ``stalls``.

``tools/gpu_check.sh`` runs this and everything else that wants a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch

from hexgen_vllm.kernels.device import Device
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.staging import DeviceCopier, Span, staging_for
from tools.fake_cuda import FakeCuda

MIB: Final = 1 << 20
BLOCK_BYTES: Final = 2 * MIB
BLOCK_TOKENS: Final = 16
SAVES_MIB: Final = (32, 128, 512, 2048)
_SCALE: Final = 64
_BLOCKS, _RECORDS = 48, 40


class RandomEngine:
    """Calls that come, are preempted, resume and end, at random; copies as a real engine has them.

    Args:
        seed: what happens.
        tensors: the KV cache, uint8 with blocks first.
        copier: the copies.
        submit: puts a forward pass on the current stream.

    Attributes:
        wrong: blocks that did not hold what they should, counted on the device.
        saves, loads: how many there were.
    """

    def __init__(
        self,
        seed: int,
        tensors: Sequence[torch.Tensor],
        copier: DeviceCopier,
        submit: Callable[[Callable[[], None]], None],
    ) -> None:
        self._rng, self._tensors, self._copier, self._submit = (
            random.Random(seed), tensors, copier, submit,
        )  # fmt: skip
        self.wrong = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
        self.saves = self.loads = 0
        self._free = list(range(_BLOCKS))
        self._rng.shuffle(self._free)
        self._records = list(range(_RECORDS))
        self._running: dict[int, tuple[list[int], int]] = {}
        self._saved: dict[int, tuple[list[int], int]] = {}
        self._loading: dict[int, tuple[list[int], int, Callable[[], bool]]] = {}
        self._calls = 0

    def step(self) -> None:
        """Do a step: saves, loads, a forward pass, and some calls end."""
        rng = self._rng
        if self._loading and rng.random() < 0.4:  # a reset: its blocks are given away at once
            call = rng.choice(sorted(self._loading))
            self._free[:0] = self._loading.pop(call)[0]
            self._copier.fence()
        blocks, records = self._preempt()
        self._copier.save(blocks, _spans(records))
        resumed, read = self._resume()
        new = self._admit()
        work = [(list(b), value, call in new) for call, (b, value) in self._running.items()]
        for wanted, kept, value, call, beside in resumed:
            done = self._copier.load(wanted, _spans(kept), beside=beside)
            if beside:
                self._loading[call] = (wanted, value, done)
            else:
                self._running[call] = (wanted, value)
                work.append((list(wanted), value, False))
        self._submit(lambda: self._forward(work))
        self._records += read  # from the next step on
        for call in [c for c, (_, _, done) in self._loading.items() if done()]:
            wanted, value, _ = self._loading.pop(call)
            self._running[call] = (wanted, value)
        for call in sorted(self._running):
            if rng.random() < 0.15:
                self._free += self._running.pop(call)[0]

    def _preempt(self) -> tuple[list[int], list[int]]:
        rng, blocks, records = self._rng, list[int](), list[int]()
        for call in rng.sample(
            sorted(self._running), min(len(self._running), rng.choice((0, 1, 2)))
        ):
            held, value = self._running.pop(call)
            if len(held) <= len(self._records):
                kept = [self._records.pop() for _ in held]  # those first that were read last
                self._saved[call] = (kept, value)
                blocks, records = blocks + held, records + kept
                self.saves += 1
            self._free[:0] = held  # given away at once
        return blocks, records

    def _resume(self) -> tuple[list[tuple[list[int], list[int], int, int, bool]], list[int]]:
        found, read = [], list[int]()
        for call in sorted(self._saved):
            kept, value = self._saved[call]
            if len(kept) <= len(self._free) and self._rng.random() < 0.5:
                wanted = [self._free.pop(0) for _ in kept]
                del self._saved[call]
                found.append((wanted, kept, value, call, self._rng.random() < 0.5))
                read += kept
                self.loads += 1
            elif self._rng.random() < 0.1:  # dropped: its records are free at once
                self._records += self._saved.pop(call)[0]
        return found, read

    def _admit(self) -> set[int]:
        new = set[int]()
        while self._free and self._rng.random() < 0.6:
            held = [self._free.pop(0) for _ in range(self._rng.randint(1, min(6, len(self._free))))]
            self._calls += 1
            self._running[self._calls] = (held, self._rng.randrange(1, 255))
            new.add(self._calls)
        return new

    def _forward(self, work: Sequence[tuple[list[int], int, bool]]) -> None:
        for blocks, value, first in work:
            for tensor in self._tensors:
                if not first:
                    self.wrong += (tensor[blocks] != value).sum()
                tensor[blocks] = value


def _spans(records: Sequence[int]) -> list[Span]:
    return [(record, 1) for record in records]


def race(
    seed: int,
    *,
    fake: bool,
    steps: int = 40,
    drop: Callable[[DeviceCopier, Any, Any], bool] | None = None,
) -> RandomEngine:
    """Return a random engine after so many steps.

    Args:
        seed: of what happens, and of the order of the streams.
        fake: on the fake runtime.
        steps: how many.
        drop: told of the copier, a stream and an event, returns whether a wait is left out.
    """
    rng = random.Random(seed)
    device = FakeCuda(seed, ways=rng.choice((("cuda",), ("cuda", "batch")))) if fake else None
    place = "cpu" if fake else "cuda"
    page = 8 if fake else 8192
    tensors = [torch.zeros(_BLOCKS, page, dtype=torch.uint8, device=place) for _ in range(2)]
    layout = BlockLayout.from_tensors(tensors)
    staging = layout.record_bytes * rng.choice((2, 5, 12))
    copier = DeviceCopier(layout, _RECORDS, cast("Device | None", device), staging)
    if device is None:
        copier.calibrate(8)
        engine = RandomEngine(seed, tensors, copier, lambda forward: forward())
    else:
        copier.load_way = rng.choice(device.ways())
        engine = RandomEngine(seed, tensors, copier, device.submit)
        if drop is not None:
            device.drop = lambda stream, event: drop(copier, stream, event)
    for _ in range(steps):
        engine.step()
    copier.wait()
    return engine


class Timer:
    """A cache with pages of an 8B model, and how long forward passes on it are held up."""

    def __init__(self, fake: FakeCuda | None, blocks: int = 2200, records: int = 2100) -> None:
        self._fake, layers = fake, 1 if fake else 32
        size = BLOCK_BYTES // (_SCALE if fake else 1) // layers
        place = "cpu" if fake else "cuda"
        tensors = [
            torch.zeros(blocks, size, dtype=torch.uint8, device=place) for _ in range(layers)
        ]
        layout = BlockLayout.from_tensors(tensors)
        staging = None if fake is None else fake_staging(fake)
        self.copier = DeviceCopier(layout, records, cast("Device | None", fake), staging)
        self.copier.calibrate(32)
        self.last = blocks - 1
        if fake is None:
            self._weights = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def forward(self) -> None:
        """Put a forward pass of some 10 ms on the compute stream."""
        if self._fake is not None:
            self._fake.submit(lambda: None, more_s=0.01)
            return
        x = self._weights[:64]
        for _ in range(200):
            x = x @ self._weights

    def held_s(self, before: Callable[[], object]) -> float:
        """Return by how many seconds ``before`` delays a forward pass; see :meth:`spent_s`."""
        alone = self.spent_s(lambda: None)
        return self.spent_s(before) - alone

    def spent_s(self, before: Callable[[], object], rounds: int = 5) -> float:
        """Return the seconds of the compute stream from before ``before`` to a pass after it."""
        found = []
        for _ in range(1 if self._fake else rounds):
            self.copier.wait()
            if self._fake is not None:
                start_s, stream = self._fake.now_s, self._fake.current()
                before()
                self.forward()
                found.append(self._fake.finish_s(stream) - start_s)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.forward()
            start.record()
            before()
            self.forward()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return statistics.median(found)

    def save(self, blocks: int) -> None:
        """Save so many blocks."""
        self.copier.save(range(blocks), [(0, blocks)])

    def scattered_save(self, blocks: int) -> None:
        """Save so many blocks to records that are no neighbours."""
        self.copier.save(range(blocks), [(2 * i, 1) for i in range(blocks)])

    def load_beside(self, blocks: int) -> None:
        """Load so many blocks beside the forward pass, and let it begin."""
        self.copier.save([], [])
        self.copier.load(range(blocks), [(0, blocks)], beside=True)
        self.forward()

    def save_after_load(self, blocks: int) -> None:
        """Save one block in the step after a long load began."""
        self.load_beside(blocks)
        self.copier.save([self.last], [(2090, 1)])

    def load_after_load(self, blocks: int) -> None:
        """Load eight blocks for a step after a long load began."""
        self.load_beside(blocks)
        self.copier.load(range(self.last - 8, self.last), [(2080, 8)], beside=False)


def fake_staging(fake: FakeCuda) -> int:
    """Return the staging that a copier would take on the full-sized device, scaled down."""
    return staging_for(fake.free_bytes() * _SCALE) // _SCALE


def stalls(fake: FakeCuda | None) -> list[dict[str, float]]:
    """Return a row per size of copy; milliseconds, forward passes themselves left out."""
    timer, rows = Timer(fake), list[dict[str, float]]()
    one = timer.spent_s(lambda: None)
    for mib in SAVES_MIB:
        blocks = mib * MIB // BLOCK_BYTES
        found = {
            "save": timer.held_s(partial(timer.save, blocks)),
            "save_after_load": timer.spent_s(partial(timer.save_after_load, blocks)) - 2 * one,
            "load_after_load": timer.spent_s(partial(timer.load_after_load, blocks)) - 2 * one,
        }
        if 2 * blocks < timer.last:
            found["scattered_save"] = timer.held_s(partial(timer.scattered_save, blocks))
        row = {f"{name}_ms": round(1000 * held_s, 3) for name, held_s in found.items()}
        rows.append({"mib": mib, "tokens": blocks * BLOCK_TOKENS, **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; 1 when blocks were wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("races", "stalls"))
    parser.add_argument("--fake", action="store_true", help="on the fake runtime")
    parser.add_argument("--engines", type=int, default=60, help="random engines (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(arguments)
    if not args.fake and not torch.cuda.is_available():
        parser.error("there is no GPU; --fake does without.")
    found: dict[str, Any] = {"fake": args.fake}
    if args.part == "races":
        engines = [race(seed, fake=args.fake) for seed in range(args.engines)]
        found["engines"], found["wrong"] = len(engines), sum(bool(e.wrong) for e in engines)
        found["saves"] = sum(e.saves for e in engines)
        found["loads"] = sum(e.loads for e in engines)
        print(json.dumps(found))
    else:
        found["stalls"] = stalls(FakeCuda(scale=_SCALE) if args.fake else None)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found.get("wrong")))


if __name__ == "__main__":
    sys.exit(main())
