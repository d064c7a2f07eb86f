"""KV blocks of one engine and vLLM's prefix cache over them, in runs instead of single blocks.

vLLM hashes every full block together with all before it, shares equal blocks between sequences,
and keeps the blocks of ended sequences until it needs them, least recently freed first and the
tail of a sequence before its head. Blocks that never got a hash are reused before all others.

Here a prompt is a chain of :class:`Link`: runs of blocks with equal content, wherever the prompts
that hold them come from. Because a sequence that holds a block of a run holds all before it, the
cached part of a run is always its head, and the free part of that is a few pieces, each freed at
one moment. So everything costs O(links), not O(blocks), and eviction order is vLLM's.

One difference: when two sequences compute the same prefix at the same time, vLLM registers both
copies; here the second holds on to the first copy and its own blocks count as private. Hits and
free blocks then differ by these blocks until both sequences end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Link(NamedTuple):
    """A run of full blocks at ``[first, end)`` of a sequence, its content named by ``key``."""

    key: int
    first: int
    end: int


class _Piece:
    """Free cached blocks ``[low, high)`` of a run; the highest is evicted first."""

    __slots__ = ("high", "low", "run")

    def __init__(self, run: _Run | None, low: int, high: int) -> None:
        self.run, self.low, self.high = run, low, high


class _Run:
    """Cached blocks ``[first, cached)`` under one key; ``[first, held)`` belong to sequences."""

    __slots__ = ("cached", "first", "held", "holders", "key", "pieces")

    def __init__(self, key: int, first: int) -> None:
        self.key, self.first = key, first
        self.cached = self.held = first
        self.holders: dict[int, int] = {}  # end of what a sequence holds: number of sequences
        self.pieces: list[_Piece] = []  # of [held, cached), lowest first


@dataclass(slots=True)
class Holding:
    """Blocks of one sequence (mutable, changed by :class:`BlockPool` only).

    Attributes:
        chain: what its prompt is made of.
        ends: per link it holds, the end of what it holds.
        shared: blocks it holds in links, so that the rest is private.
        blocks: all its blocks.
        copies: blocks it computed although they were cached meanwhile.
    """

    chain: tuple[Link, ...]
    ends: list[int]
    shared: int = 0
    blocks: int = 0
    copies: int = 0


class Hit(NamedTuple):
    """What the cache has of a prompt: leading blocks, and how many of them nobody holds."""

    blocks: int
    idle: int


class Exclusive(NamedTuple):
    """Blocks that one sequence alone holds, and those of them that become free with it."""

    held: int
    released: int


class BlockPool:
    """The KV blocks of one engine.

    Attributes:
        total, free: usable blocks, and those that no sequence holds.
        copied: blocks computed while another sequence's copy of them was cached.

    Args:
        blocks: usable blocks.
        caching: whether prefixes are cached.
    """

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        self.total = self.free = blocks
        self.copied = 0
        self._caching = caching
        self._plain = blocks  # free blocks without a hash; reused first
        self._runs: dict[Hashable, _Run] = {}
        self._lru: deque[_Piece] = deque()
        self._private_key = 0

    def lookup(self, chain: tuple[Link, ...], most: int) -> Hit:
        """Return what is cached of a prompt, at most ``most`` blocks."""
        found = idle = 0
        for key, _, end in chain:
            run = self._runs.get(key)
            if run is None:
                break
            upto = min(end, run.cached, most)
            if upto <= run.first:
                break
            found = upto
            if upto > run.held:
                idle += upto - run.held
            if upto < end:
                break
        return Hit(found, idle)

    def adopt(self, holding: Holding, hit: int) -> None:
        """Let ``holding`` hold the ``hit`` leading blocks that :meth:`lookup` found."""
        for key, first, end in holding.chain:
            if first >= hit:
                break
            self._hold(self._runs[key], min(end, hit))
            holding.ends.append(min(end, hit))
        holding.shared = holding.blocks = hit

    def grow(self, holding: Holding, blocks: int) -> None:
        """Let ``holding`` have ``blocks`` blocks in all; there must be enough free ones."""
        if blocks > holding.blocks:
            self.take(blocks - holding.blocks)
            holding.blocks = blocks

    def take(self, count: int) -> None:
        """Take ``count`` free blocks out of the pool, evicting what they cached."""
        self.free -= count
        if count <= self._plain:
            self._plain -= count
            return
        count -= self._plain
        self._plain = 0
        while count:
            piece = self._lru[0]
            evicted = min(count, piece.high - piece.low)
            piece.high -= evicted
            count -= evicted
            if piece.run is not None and evicted:
                self._evicted(piece.run, piece)
            if piece.high == piece.low:
                self._lru.popleft()

    def register(self, holding: Holding, full: int) -> None:
        """Note that the first ``full`` blocks of ``holding`` are computed and can be shared."""
        chain, ends = holding.chain, holding.ends
        while self._caching and holding.shared < full:
            index = len(ends) - 1
            if index < 0 or ends[index] == chain[index].end:
                index += 1
                if index == len(chain):
                    return
            key, first, end = chain[index]
            run = self._runs.get(key)
            if run is None:
                run = self._runs[key] = _Run(key, first)
            upto = min(end, full)
            copies = max(min(run.cached, upto) - holding.shared, 0)
            holding.copies += copies
            self.copied += copies
            run.cached = max(run.cached, upto)
            if index == len(ends):
                ends.append(upto)
            else:
                self._release(run, ends[index], quiet=True)
                ends[index] = upto
            self._hold(run, upto)
            holding.shared = upto

    def drop(self, holding: Holding, full: int) -> None:
        """Free all blocks of ``holding``, of which the first ``full`` are computed and full."""
        private = holding.blocks - holding.shared
        cached = full - holding.shared + holding.copies if self._caching else 0
        self._plain += private + holding.copies - cached
        self.free += private + holding.copies
        if cached:
            self._lru.append(_Piece(None, 0, cached))
        chain, ends = holding.chain, holding.ends
        for index in range(len(ends) - 1, -1, -1):
            self._release(self._runs[chain[index].key], ends[index])
        ends.clear()
        holding.shared = holding.blocks = holding.copies = 0

    def drop_keeping(self, holding: Holding, full: int) -> None:
        """Free as :meth:`drop` does, but so that ``holding`` itself may find its blocks again."""
        if self._caching and full > holding.shared and self._complete(holding):
            self._private_key -= 1
            holding.chain = (*holding.chain, Link(self._private_key, holding.shared, full))
            self.register(holding, full)
        self.drop(holding, full)

    def let_go(self, keys: Iterable[Hashable]) -> None:
        """Have the free blocks of the runs named by ``keys`` evicted before all other cached ones.

        They are in the order of the text, whose end goes first.
        """
        for key in keys:
            run = self._runs.get(key)
            if run is None:
                continue
            for i, piece in enumerate(run.pieces):
                first = run.pieces[i] = _Piece(run, piece.low, piece.high)
                piece.low = piece.high  # where it stood in line there is nothing now
                self._lru.appendleft(first)

    def exclusive(self, holding: Holding, blocks: int, wanted: tuple[Link, ...]) -> Exclusive:
        """Return which of the ``blocks`` blocks of ``holding`` nobody else holds.

        Args:
            holding: a sequence's blocks.
            blocks: how many it has, if it decodes and they were not counted one by one.
            wanted: prefix that another sequence would take over from it.
        """
        held = blocks - holding.shared + holding.copies
        released = held
        taken = {link.key: link.end for link in wanted}
        for link, end in zip(holding.chain, holding.ends, strict=False):
            holders = self._runs[link.key].holders
            if holders[end] > 1:
                continue
            first = max((e for e in holders if e != end), default=link.first)
            held += max(end - first, 0)
            released += max(end - max(first, taken.get(link.key, 0)), 0)
        return Exclusive(held, released)

    def usage(self) -> float:
        """Return the share of blocks that sequences hold, 0 to 1."""
        return 1.0 - self.free / self.total

    @staticmethod
    def _complete(holding: Holding) -> bool:
        ends, chain = holding.ends, holding.chain
        return len(ends) == len(chain) and (not ends or ends[-1] == chain[-1].end)

    def _hold(self, run: _Run, end: int) -> None:
        run.holders[end] = run.holders.get(end, 0) + 1
        if end <= run.held:
            return
        pieces = run.pieces
        while pieces and pieces[0].low < end:
            piece = pieces[0]
            taken = min(end, piece.high) - piece.low
            piece.low += taken
            self.free -= taken
            if piece.low == piece.high:
                del pieces[0]
        run.held = end

    def _release(self, run: _Run, end: int, *, quiet: bool = False) -> None:
        holders = run.holders
        count = holders[end] - 1
        if count:
            holders[end] = count
            return
        del holders[end]
        if quiet or end < run.held:
            return
        held = max(holders, default=run.first)
        if held < run.held:
            piece = _Piece(run, held, run.held)
            self._lru.append(piece)
            run.pieces.insert(0, piece)
            self.free += run.held - held
            run.held = held

    def _evicted(self, run: _Run, piece: _Piece) -> None:
        run.cached = piece.high
        if piece.high == piece.low:
            run.pieces.pop()
            if run.cached == run.first and not run.holders:
                del self._runs[run.key]
