"""The decoding part of a batch, kept in a handful of numbers.

Every decoding sequence gains one token a step, so none of them is touched in a step: a clock counts
steps, a sequence remembers the clock's reading when it joined, and what a step needs (how many
decode, over how much context, who needs a new block, who ends next) is kept in sums.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from hexgen_vllm.sim.engine.sequence import Sequence

MARK_TOKENS: Final = 64
"""Tokens between two marks; the router takes note of a call's progress as often."""


class DecodeClock:
    """Sequences that decode.

    Attributes:
        steps: steps so far; the clock.
        size: sequences.
        context: sum of their tokens with KV.

    Args:
        block_size: tokens of a KV block.
    """

    __slots__ = ("_block_size", "_ends", "_marks", "_residues", "context", "size", "steps")

    def __init__(self, block_size: int) -> None:
        self.steps = self.size = self.context = 0
        self._block_size = block_size
        # By remainder of the clock at which a sequence needs a new block: how many do.
        self._residues = [0] * block_size
        self._ends: list[tuple[int, int, Sequence]] = []
        self._marks: list[tuple[int, int, Sequence]] = []

    def join(self, sequence: Sequence) -> None:
        """Let ``sequence``, whose last token is not computed yet, decode from the next step on."""
        sequence.base = sequence.tokens - self.steps
        sequence.decoding = True
        self.size += 1
        self.context += sequence.tokens - 1
        self._residues[(1 - sequence.base) % self._block_size] += 1
        left = sequence.total_tokens - sequence.tokens
        heappush(self._ends, (self.steps + left, sequence.number, sequence))
        if left > MARK_TOKENS:
            heappush(self._marks, (self.steps + MARK_TOKENS, sequence.number, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Take ``sequence`` off the clock and write its progress down."""
        sequence.tokens = sequence.base + self.steps
        sequence.computed = sequence.tokens - 1
        sequence.decoding = False
        self.size -= 1
        self.context -= sequence.computed
        self._residues[(1 - sequence.base) % self._block_size] -= 1

    def tokens(self, sequence: Sequence) -> int:
        """Return the tokens so far of a sequence, decoding or not."""
        return sequence.base + self.steps if sequence.decoding else sequence.tokens

    def advance(self, steps: int) -> None:
        """Count ``steps`` steps in which all decoded."""
        self.steps += steps
        self.context += steps * self.size

    def missed(self, sequence: Sequence) -> None:
        """Undo the last step for a sequence that did not decode in it."""
        self._residues[(1 - sequence.base) % self._block_size] -= 1
        sequence.base -= 1
        self.context -= 1
        self._residues[(1 - sequence.base) % self._block_size] += 1
        heappush(self._ends, (sequence.total_tokens - sequence.base, sequence.number, sequence))

    def blocks(self, first: int, count: int) -> int:
        """Return the blocks that the steps ``first`` to ``first + count - 1`` from now take."""
        rounds, rest = divmod(count, self._block_size)
        needed = rounds * self.size
        at = self.steps + first
        for step in range(at, at + rest):
            needed += self._residues[step % self._block_size]
        return needed

    def steps_within(self, free: int, first: int, most: int) -> int:
        """Return for how many steps, from step ``first`` on and up to ``most``, blocks suffice."""
        size = self._block_size
        if (most // size + 1) * self.size <= free:
            return most
        count = 0
        while count < most:
            free -= self._residues[(self.steps + first + count) % size]
            if free < 0:
                break
            count += 1
        return count

    def steps_to_end(self) -> int:
        """Return the steps until the first sequence ends; there must be one."""
        ends = self._ends
        while True:
            at, _, sequence = ends[0]
            if sequence.decoding and sequence.total_tokens - sequence.base == at:
                return at - self.steps
            heappop(ends)

    def marked(self, ahead: int) -> list[Sequence]:
        """Return the sequences that passed another mark by ``ahead`` steps from now."""
        marks, at, found = self._marks, self.steps + ahead, []
        while marks and marks[0][0] <= at:
            due, number, sequence = heappop(marks)
            if sequence.decoding:
                found.append(sequence)
                heappush(marks, (due + MARK_TOKENS, number, sequence))
        return found

    def ended(self) -> list[Sequence]:
        """Take off the clock and return those that have all their tokens, by admission."""
        ends, found = self._ends, []
        while ends and ends[0][0] <= self.steps:
            at, _, sequence = heappop(ends)
            if sequence.decoding and sequence.total_tokens - sequence.base == at:
                self.leave(sequence)
                found.append(sequence)
        return found
