"""vLLM's prefix cache block by block, as simple as can be, to compare with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

Block = tuple[int, int]  # name of the content, and which block of it


class PlainCache:
    """Blocks of content; private ones have a name of their own."""

    def __init__(self, blocks: int) -> None:
        self.plain = blocks
        self.users: dict[Block, int] = {}
        self.idle: OrderedDict[Block, None] = OrderedDict()  # least recently freed first

    @property
    def free(self) -> int:
        return self.plain + len(self.idle)

    def hit(self, prompt: list[Block], most: int) -> int:
        count = 0
        while count < min(most, len(prompt)) and (
            prompt[count] in self.users or prompt[count] in self.idle
        ):
            count += 1
        return count

    def idle_hits(self, prompt: list[Block], hit: int) -> int:
        return sum(block in self.idle for block in prompt[:hit])

    def hold(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.idle.pop(block, None)
            self.users[block] = self.users.get(block, 0) + 1

    def take(self, count: int) -> None:
        for _ in range(count):
            if self.plain:
                self.plain -= 1
            else:
                self.idle.popitem(last=False)

    def drop(self, held: list[Block], unhashed: int) -> None:
        self.plain += unhashed
        for block in reversed(held):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.idle[block] = None

    def let_go(self, keys: Iterable[object]) -> None:
        """Have idle blocks of these contents go first, the last of them before all."""
        for key in keys:
            for block in sorted(block for block in self.idle if block[0] == key):
                self.idle.move_to_end(block, last=False)
