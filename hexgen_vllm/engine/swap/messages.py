"""What scheduler and workers tell each other about KV in host memory.

Messages are pickled on their way to other processes; record numbers mean the same in all workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from hexgen_vllm.engine.swap.pool import Extent


class Save(NamedTuple):
    """Copy blocks to records, in this order."""

    block_ids: tuple[int, ...]
    extents: tuple[Extent, ...]


class Load(NamedTuple):
    """Copy records to blocks; ``beside`` the forward pass the request is told when it is done."""

    request_id: str
    block_ids: tuple[int, ...]
    extents: tuple[Extent, ...]
    beside: bool


@dataclass
class SwapMeta(KVConnectorMetadata):
    """What a step copies: saves come before its forward pass and before its loads.

    ``fence``: all of it comes after the loads beside earlier forward passes. ``renew``: first make
    again what workers keep in device memory.
    """

    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    fence: bool = False
    renew: bool = False


@dataclass
class SwapReport(KVConnectorWorkerMetadata):
    """Bytes that were copied and the seconds it took, since the last report.

    In the first one, also the device memory that saves pass through and how fast they get there;
    0 says that a save holds the forward pass up until it is done.
    """

    out_bytes: int = 0
    out_s: float = 0.0
    in_bytes: int = 0
    in_s: float = 0.0
    staging_bytes: int = 0
    pack_bytes_per_s: float = 0.0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> SwapReport:
        """Join the reports of two workers, which copied at the same time."""
        if not isinstance(other, SwapReport):
            return self
        return SwapReport(
            self.out_bytes + other.out_bytes,
            max(self.out_s, other.out_s),
            self.in_bytes + other.in_bytes,
            max(self.in_s, other.in_s),
            self.staging_bytes + other.staging_bytes,
            self.pack_bytes_per_s + other.pack_bytes_per_s,
        )
