"""Host memory for the KV of preempted calls, counted in records of one KV block each.

The scheduler keeps the books; each worker has the memory itself, as many records of its share of
a block, and copies where it is told. So a copy needs no message to go away, and every worker of a
tensor-parallel engine uses the same record numbers.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hexgen_vllm.policy.retention import StoredCopy, choose_evictions


class Extent(NamedTuple):
    """Neighbouring records ``first .. first + size - 1``."""

    first: int
    size: int


class RecordSpace:
    """Which records are free.

    Attributes:
        capacity: records in all.
        free: records that are free.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = self.free = capacity
        self._gaps = [Extent(0, capacity)] if capacity else []  # in order, never touching

    def take(self, count: int) -> tuple[Extent, ...] | None:
        """Return ``count`` records in as few pieces as there are, ``None`` if so many are not free.

        The smallest gap that holds them all is used, else the largest ones.
        """
        if count > self.free:
            return None
        fitting = [gap for gap in self._gaps if gap.size >= count]
        if fitting:
            pieces = [min(fitting, key=lambda gap: (gap.size, gap.first))]
        else:
            pieces = sorted(self._gaps, key=lambda gap: (-gap.size, gap.first))
        taken: list[Extent] = []
        for gap in pieces:
            if count == 0:
                break
            piece = Extent(gap.first, min(gap.size, count))
            taken.append(piece)
            self._cut(gap, piece.size)
            count -= piece.size
        return tuple(taken)

    def _cut(self, gap: Extent, size: int) -> None:
        """Take ``size`` records from the start of ``gap``."""
        i = self._gaps.index(gap)
        rest = Extent(gap.first + size, gap.size - size)
        self._gaps[i : i + 1] = [rest] if rest.size else []
        self.free -= size

    def give_back(self, extents: Iterable[Extent]) -> None:
        """Free records that were taken."""
        for extent in extents:
            insort(self._gaps, extent)
            self.free += extent.size
        merged: list[Extent] = []
        for gap in self._gaps:
            if merged and merged[-1].first + merged[-1].size == gap.first:
                merged[-1] = Extent(merged[-1].first, merged[-1].size + gap.size)
            else:
                merged.append(gap)
        self._gaps = merged


class Owner(Protocol):
    """Whose copy it is.

    Attributes:
        latest_start_s: how urgent the call is, absolute seconds; may change at any moment.
        kept_tokens: its KV that waits in host memory.
    """

    latest_start_s: float
    kept_tokens: int


@dataclass(slots=True)
class HostCopy:
    """The KV of one preempted call.

    Attributes:
        request_id: the call's request.
        owner: the call's state.
        tokens: the copy ends with the KV of token ``tokens - 1``.
        first_block: the block that the copy starts with; the ones before it stay on the device.
        shared_blocks: how many blocks from the start other running calls held, too.
        saves_s: seconds of computing that it saves.
        local: tokens of the call that the prefix cache held when it was last asked.
        extents: the records it takes, in the order of the call's blocks.
    """

    request_id: str
    owner: Owner
    tokens: int
    first_block: int
    shared_blocks: int
    saves_s: float
    local: int = 0
    extents: tuple[Extent, ...] = ()

    @property
    def blocks(self) -> int:
        """KV blocks that the copy holds."""
        return sum(extent.size for extent in self.extents)

    def stored(self) -> StoredCopy:
        """Return the copy as the eviction policy sees it."""
        return StoredCopy(self.saves_s, self.blocks, self.owner.latest_start_s)

    def records(self, first_block: int, last_block: int) -> list[Extent]:
        """Return the records of blocks ``first_block .. last_block - 1`` of the call."""
        skip, left = first_block - self.first_block, last_block - first_block
        found: list[Extent] = []
        for extent in self.extents:
            size = min(extent.size - skip, left)
            if size > 0:
                found.append(Extent(extent.first + skip, size))
                left -= size
            skip = max(skip - extent.size, 0)
        return found


@dataclass
class HostPool:
    """The copies in host memory, by request id.

    Attributes:
        space: which records are free.
        copies: whose KV is there.
    """

    space: RecordSpace
    copies: dict[str, HostCopy] = field(default_factory=dict)
    _loading: list[Extent] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Records in use, those that this step still reads included."""
        return self.space.capacity - self.space.free

    def put(self, copy: HostCopy, blocks: int, now: float) -> list[HostCopy] | None:
        """Find ``blocks`` records for ``copy``, evicting copies of less worth if need be.

        Returns:
            The copies that were evicted, ``None`` when there is no room; then nothing changed.
        """
        others = list(self.copies.values())
        newcomer = StoredCopy(copy.saves_s, blocks, copy.owner.latest_start_s)
        short = blocks - self.space.free
        chosen = choose_evictions([c.stored() for c in others], newcomer, short, now)
        if chosen is None:
            return None
        evicted = [others[i] for i in chosen]
        for other in evicted:
            self.drop(other.request_id)
        copy.extents = self.space.take(blocks) or ()
        self.copies[copy.request_id] = copy
        return evicted

    def drop(self, request_id: str) -> HostCopy | None:
        """Forget a copy and free its records."""
        copy = self.copies.pop(request_id, None)
        if copy is not None:
            self.space.give_back(copy.extents)
        return copy

    def load(self, request_id: str) -> None:
        """Forget a copy that this step reads; its records stay taken until :meth:`step_ends`.

        In a step, workers save before they load: a record freed at once could be overwritten.
        """
        self._loading += self.copies.pop(request_id).extents

    def step_ends(self) -> None:
        """Free the records of copies that were read in this step."""
        if self._loading:
            self.space.give_back(self._loading)
            self._loading = []
