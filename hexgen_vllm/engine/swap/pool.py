"""Host memory for the KV of preempted and of ended calls, in records of one KV block each.

A preempted call has a copy of its own (:class:`HostCopy`). What ended calls leave is found by the
hashes of its blocks, by whoever comes with that prefix (:class:`KeptPrefix`).

The scheduler keeps the books; each worker has the memory itself, as many records of its share of
a block, and copies where it is told. So a copy needs no message to go away, and every worker of a
tensor-parallel engine uses the same record numbers.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from hexgen_vllm.policy.retention import StoredCopy, choose_evictions
from hexgen_vllm.policy.returns import End, Returns

_MOST_LOOKED_AT: Final = 128


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


class TailKey(NamedTuple):
    """Finds a block that is not full, by the hash of the one before it."""

    before: Any


@dataclass(slots=True, eq=False)
class KeptPrefix:
    """Blocks that an ended call left and that no other had left before, in order.

    Attributes:
        end: whose they are, and when and how they may be wanted; the latest one that uses them.
        workflow_id: its workflow; ``None`` once several use them.
        latest_start_s: when the workflow's next call must begin.
        saves_s: seconds of computing that they save.
        hashes: of the blocks; of one that is not full, the :class:`TailKey`.
        records: where they are.
        tail: the tokens of a block that is not full; such a block is a prefix of its own.
    """

    end: End
    workflow_id: str | None
    latest_start_s: float
    saves_s: float
    hashes: tuple[Any, ...]
    records: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def stored(self, chance: float) -> StoredCopy:
        """Return the blocks as the eviction policy sees them."""
        return StoredCopy(self.saves_s, len(self.hashes), self.latest_start_s, chance)


class Kept(NamedTuple):
    """A block that an ended call left: of which prefix, and in which record."""

    prefix: KeptPrefix
    record: int


@dataclass
class HostPool:
    """What is in host memory.

    Attributes:
        space: which records are free.
        copies: of preempted calls, by request id.
        prefixes: what ended calls left; of the same worth, the first ones go first.
        kept: the same by the hash of a block.
        returns: how likely that is wanted.
    """

    space: RecordSpace
    copies: dict[str, HostCopy] = field(default_factory=dict)
    prefixes: OrderedDict[KeptPrefix, None] = field(default_factory=OrderedDict)
    kept: dict[Any, Kept] = field(default_factory=dict)
    returns: Returns = field(default_factory=Returns)
    _loading: list[Extent] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Records in use, those that this step still reads included."""
        return self.space.capacity - self.space.free

    def put(self, copy: HostCopy, blocks: int, now: float) -> list[HostCopy | KeptPrefix] | None:
        """Find ``blocks`` records for ``copy``, evicting what is of less worth if need be.

        Returns:
            What was evicted, ``None`` when there is no room; then nothing changed.
        """
        newcomer = StoredCopy(copy.saves_s, blocks, copy.owner.latest_start_s)
        evicted = self._make_room(newcomer, (), now)
        if evicted is not None:
            copy.extents = self.space.take(blocks) or ()
            self.copies[copy.request_id] = copy
        return evicted

    def keep(
        self, prefix: KeptPrefix, spared: Collection[KeptPrefix], now: float
    ) -> list[HostCopy | KeptPrefix] | None:
        """Find records for the blocks of ``prefix``; what it builds on is ``spared``.

        Returns:
            As :meth:`put`.
        """
        newcomer = prefix.stored(self.returns.chance(prefix.end, now))
        evicted = self._make_room(newcomer, spared, now)
        if evicted is not None:
            extents = self.space.take(len(prefix.hashes)) or ()
            prefix.records = tuple(i for e in extents for i in range(e.first, e.first + e.size))
            for block_hash, record in zip(prefix.hashes, prefix.records, strict=True):
                self.kept[block_hash] = Kept(prefix, record)
            self.prefixes[prefix] = None
        return evicted

    def used_again(self, prefixes: Sequence[KeptPrefix]) -> None:
        """Have ``prefixes``, each of which builds on those before it, go after all others."""
        for prefix in reversed(prefixes):
            self.prefixes.move_to_end(prefix)

    def _make_room(
        self, newcomer: StoredCopy, spared: Collection[KeptPrefix], now: float
    ) -> list[HostCopy | KeptPrefix] | None:
        short = newcomer.blocks - self.space.free
        if short <= 0:
            return []
        able = (prefix for prefix in self.prefixes if prefix not in spared)
        prefixes = list(islice(able, _MOST_LOOKED_AT))
        others: list[HostCopy | KeptPrefix] = [*prefixes, *self.copies.values()]
        stored = [p.stored(self.returns.chance(p.end, now)) for p in prefixes]
        stored += [c.stored() for c in self.copies.values()]
        chosen = choose_evictions(stored, newcomer, short, now)
        if chosen is None:
            return None
        evicted = [others[i] for i in chosen]
        for other in evicted:
            if isinstance(other, HostCopy):
                self.drop(other.request_id)
            else:
                self.let_go(other)
        return evicted

    def let_go(self, prefix: KeptPrefix) -> None:
        """Forget what an ended call left, and free its records."""
        self._forget(prefix)
        self.space.give_back(Extent(record, 1) for record in prefix.records)

    def _forget(self, prefix: KeptPrefix) -> None:
        del self.prefixes[prefix]
        for block_hash in prefix.hashes:
            del self.kept[block_hash]

    def found(self, hashes: Sequence[Any]) -> list[int]:
        """Return the records of the first blocks of ``hashes``, as far as they are there."""
        records = []
        for block_hash in hashes:
            kept = self.kept.get(block_hash)
            if kept is None:
                break
            records.append(kept.record)
        return records

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

    def load_tail(self, key: TailKey) -> None:
        """Forget a block that was not full and that this step reads, as :meth:`load` does.

        Who reads it fills it, and leaves it full or with more in it.
        """
        kept = self.kept.get(key)
        if kept is not None:
            self._forget(kept.prefix)
            self._loading.append(Extent(kept.record, 1))

    def step_ends(self) -> None:
        """Free the records of copies that were read in this step."""
        if self._loading:
            self.space.give_back(self._loading)
            self._loading = []
