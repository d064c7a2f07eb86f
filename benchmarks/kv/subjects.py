"""What a benchmark of block copies times: a cache, its buffers and every way to copy them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from hexgen_vllm import kernels
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.pinned import pinned_buffer
from hexgen_vllm.kernels.staging import DeviceCopier

# One call per block and layer: beyond this many the way is hopeless and only takes time.
MAX_SINGLE_COPIES = 8192

_STAGED = ("cuda", "triton")


@dataclass(frozen=True)
class CopyCase:
    """How much is copied: ``num_blocks`` scattered blocks of ``layers`` pages of ``page_bytes``."""

    page_bytes: int
    num_blocks: int
    layers: int = 1

    @property
    def total_bytes(self) -> int:
        """Bytes of one save or one restore."""
        return self.page_bytes * self.num_blocks * self.layers


@dataclass(frozen=True)
class Way:
    """One way to do the same copy. Both calls may return before the copy is done.

    ``exact`` says that a save followed by a restore gives the blocks back.
    """

    name: str
    save: Callable[[], object]
    restore: Callable[[], object]
    exact: bool = True


def environment(device: str) -> dict[str, str | int]:
    """What the figures of ``device`` depend on.

    Raises:
        ConfigError: ``device`` is none of ``cpu``, ``cuda`` and ``cuda:N``, or is not there.
    """
    kind, _, number = device.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdigit()):
        raise ConfigError(f"device: {device!r} is none of cpu, cuda and cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device} is not there.")
    return {
        "device": device,
        "name": torch.cuda.get_device_name(device) if kind == "cuda" else "host memory",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": kernels.describe(),
    }


class CopyBed:
    """A cache twice as large as the case needs, scattered block ids, and a host buffer.

    Attributes:
        case: what is copied.
        tensors: one uint8 tensor ``(blocks, page_bytes)`` per layer.
        layout: the tensors as a layout.
        block_ids: the blocks to copy, in random order.
        host: packed host buffer, pinned where the cache lies on a GPU.
    """

    def __init__(self, case: CopyCase, device: str, seed: int = 0) -> None:
        self.case = case
        self.device = torch.device(device)
        shape = (2 * case.num_blocks, case.page_bytes)
        self.tensors = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            for _ in range(case.layers)
        ]
        self.layout = BlockLayout.from_tensors(self.tensors)
        self.block_ids = random.Random(seed).sample(range(shape[0]), case.num_blocks)
        self.host = self._host_buffer()

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ways(self, plugs: Iterable[Plug] = ()) -> Iterator[Way]:
        """The limit first (``contiguous``), then the kernels, then ``per block`` and the plugs."""
        yield self._contiguous()
        for name in kernels.available_kernels(self.device):
            yield self._direct(name)
            if self.device.type == "cuda" and name in _STAGED:
                yield self._staged(name)
        if self.case.num_blocks * self.case.layers <= MAX_SINGLE_COPIES:
            yield self._per_block()
        yield from filter(None, (plug(self) for plug in plugs))

    def gives_back(self, way: Way) -> bool:
        """Save, overwrite the whole cache, restore: are the blocks what they were?"""
        ids = torch.tensor(self.block_ids, device=self.device)
        before = [tensor[ids] for tensor in self.tensors]
        way.save()
        self.synchronize()
        for tensor in self.tensors:
            tensor.fill_(0xA5)
        way.restore()
        self.synchronize()
        return all(
            torch.equal(tensor[ids], was) for tensor, was in zip(self.tensors, before, strict=True)
        )

    def _host_buffer(self) -> torch.Tensor:
        num_bytes = self.case.total_bytes
        if self.device.type == "cuda":
            return pinned_buffer(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def _contiguous(self) -> Way:
        """One copy of as many bytes that lie in one piece: no block copy can be faster."""
        other = torch.ones(self.case.total_bytes, dtype=torch.uint8, device=self.device)
        return Way(
            "contiguous",
            lambda: self.host.copy_(other, non_blocking=True),
            lambda: other.copy_(self.host, non_blocking=True),
            exact=False,
        )

    def _direct(self, kernel: str) -> Way:
        return Way(
            kernel,
            lambda: kernels.gather_blocks(self.layout, self.block_ids, self.host, kernel=kernel),
            lambda: kernels.scatter_blocks(self.layout, self.block_ids, self.host, kernel=kernel),
        )

    def _staged(self, kernel: str) -> Way:
        copier = DeviceCopier(
            self.layout, self.case.num_blocks, staging_bytes=2 * self.case.total_bytes
        )
        copier.save_way = copier.load_way = kernel
        spans = [(0, self.case.num_blocks)]
        return Way(
            f"{kernel} staged",
            lambda: copier.save(self.block_ids, spans),
            lambda: copier.load(self.block_ids, spans, beside=False),
        )

    def _per_block(self) -> Way:
        records = self.host.view(self.case.num_blocks, self.case.layers, self.case.page_bytes)
        pairs = [
            (records[place, layer], tensor[block])
            for layer, tensor in enumerate(self.tensors)
            for place, block in enumerate(self.block_ids)
        ]

        def save() -> None:
            for record, page in pairs:
                record.copy_(page, non_blocking=True)

        def restore() -> None:
            for record, page in pairs:
                page.copy_(record, non_blocking=True)

        return Way("per block", save, restore)


Plug = Callable[[CopyBed], Way | None]
"""Makes a further way for a case, or ``None`` where it cannot serve it."""
