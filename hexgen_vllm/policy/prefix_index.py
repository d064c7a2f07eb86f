"""What the prefix cache of an engine probably holds."""

from __future__ import annotations

from collections import OrderedDict

from hexgen_vllm.types import Call


class PrefixIndex:
    """Which prompt chunks an engine's prefix cache probably holds (least recently used go first).

    Attributes:
        changes: how often it changed; below 0 where it does not know that itself.

    Args:
        capacity_tokens: size of the KV cache; ``None`` assumes 200,000 tokens.
    """

    def __init__(self, capacity_tokens: int | None) -> None:
        self._capacity = capacity_tokens or 200_000
        self._tokens: OrderedDict[int, int] = OrderedDict()
        self._held = 0
        self.changes = 0

    def match(self, call: Call) -> int:
        """Return how many leading prompt tokens of ``call`` are probably cached."""
        # A chunk is touched, so evicted, after all that follow it: what is held is a head.
        prefix, held = call.prefix, self._tokens
        if not prefix or prefix[0] not in held:  # as with most engines of a large fleet
            return 0
        low, high = 1, len(prefix)
        while low < high:
            middle = (low + high) // 2
            if prefix[middle] in held:
                low = middle + 1
            else:
                high = middle
        return min(low * call.prefix_chunk_tokens, max(call.prompt_tokens - 1, 0))

    def add(self, call: Call) -> None:
        """Note that the engine now computes the prompt of ``call``."""
        self.put(call.prefix, call.prefix_chunk_tokens)

    def put(self, prefix: tuple[int, ...], chunk_tokens: int) -> None:
        """Note that the engine computes a prompt of these chunks, or did so for others."""
        self.changes += 1
        size = max(chunk_tokens, 1)  # of nothing there could be any number
        # Leading chunks are touched last: vLLM evicts the tail of a prefix first.
        for key in reversed(prefix):
            if key not in self._tokens:
                self._tokens[key] = size
                self._held += size
            self._tokens.move_to_end(key)
        while self._held > self._capacity and self._tokens:
            self._held -= self._tokens.popitem(last=False)[1]

    def drop(self, key: int) -> None:
        """Note that the engine holds a chunk no more."""
        self.changes += 1
        self._held -= self._tokens.pop(key, 0)

    def clear(self) -> None:
        """Forget everything (the engine restarted)."""
        self.changes += 1
        self._tokens.clear()
        self._held = 0
