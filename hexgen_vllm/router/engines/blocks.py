"""Which prompts' beginnings the KV blocks of engines are, from the events that engines publish.

Events name blocks by hashes of the engine's own and say their tokens. The router knows prompts by
chunks of text (:func:`~hexgen_vllm.router.calls.prompt.chain`). Between both stand hashes of all
tokens from the start of a prompt to the end of a block, which both sides can make: one from the
events, the other from prompts that an engine was asked to tokenize.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

UNIT: Final = 8
"""Tokens after which a prompt is hashed; sizes of blocks are multiples of it."""

_START: Final = hash("start of a prompt")
_MOST_KEYS: Final = 2**17
_MOST_BLOCKS: Final = 2**20  # of one engine
_SURE: Final = 0.95  # chunks of text hold not all the same number of tokens
_FIELDS: Final = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id",
                  "medium", "lora_name", "extra_keys", "group_idx")  # fmt: skip


def fold(state: int, tokens: Sequence[int]) -> int:
    """Return the hash after more tokens, a multiple of :data:`UNIT` of them."""
    for i in range(0, len(tokens), UNIT):
        state = hash((state, tuple(tokens[i : i + UNIT])))
    return state


class Prompts:
    """Chunks of prompts that were tokenized, and the tokens up to about their ends."""

    def __init__(self) -> None:
        self._at: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._keys: dict[int, list[int]] = {}
        self._step = 0

    @property
    def usable(self) -> bool:
        """Whether a size of blocks is known, so that prompts can be taken in."""
        return self._step > 0

    def use(self, block_size: int) -> None:
        """Note an engine's size of blocks: what is learned from now on ends with a block of it."""
        self._step = math.lcm(self._step or UNIT, block_size)

    def knows(self, key: int) -> bool:
        """Whether the prompt of a chunk was tokenized."""
        return key in self._at

    def keys(self, state: int) -> Sequence[int]:
        """Return the chunks that end about where the hash is ``state``."""
        return self._keys.get(state, ())

    def learn(
        self,
        prefix: Sequence[int],
        chunk_tokens: int,
        tokens: Sequence[int],
        ends: Sequence[float],
    ) -> None:
        """Take in a prompt.

        Args:
            prefix: its leading chunks.
            chunk_tokens: what each counts for.
            tokens: the prompt.
            ends: where in it each chunk ends.
        """
        state, at = _START, 0
        for key, end in zip(prefix, ends, strict=True):
            upto = min(int(end), len(tokens)) // self._step * self._step
            state, at = fold(state, tokens[at:upto]), max(at, upto)
            if at and key not in self._at:
                self._at[key] = state, chunk_tokens
                self._keys.setdefault(state, []).append(key)
        while len(self._at) > _MOST_KEYS:
            old, (where, _) = self._at.popitem(last=False)
            self._keys[where].remove(old)
            if not self._keys[where]:
                del self._keys[where]

    def at(self, key: int) -> tuple[int, int]:
        """Return the hash at the end of a chunk that was tokenized, and what that counts for."""
        return self._at[key]


def text_ends(chunks: int, chunk_chars: int, chars: int, tokens: int) -> list[float]:
    """Return where chunks of a text end in its tokens, rather too early than too late."""
    per_char = _SURE * tokens / max(chars, 1)
    return [per_char * chunk_chars * (i + 1) for i in range(chunks)]


class Change(NamedTuple):
    """What follows from an event for what an engine holds.

    Attributes:
        came: chunks that it holds now.
        gone: chunks that it holds no more.
        cleared: it holds nothing.
    """

    came: Sequence[int] = ()
    gone: Sequence[int] = ()
    cleared: bool = False


class EngineBlocks:
    """The blocks of one engine's prefix cache, as far as its events tell.

    Args:
        prompts: that were tokenized.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._states: dict[bytes | int, int] = {}
        self._held: set[int] = set()

    def __len__(self) -> int:
        return len(self._states)

    def holds(self, key: int) -> bool:
        """Whether it holds a chunk that was tokenized."""
        return self._prompts.at(key)[0] in self._held

    def clear(self) -> None:
        """Forget all of them."""
        self._states.clear()
        self._held.clear()

    def take(self, event: Any) -> Change:
        """Take in an event as vLLM encodes it; one that is no event of blocks changes nothing."""
        kind, said = _parts(event)
        if kind == "AllBlocksCleared":
            self.clear()
            return Change(cleared=True)
        if said.get("group_idx") or said.get("medium") not in (None, "GPU"):
            return Change()  # copies elsewhere, and other kinds of attention
        hashes = said.get("block_hashes")
        if not isinstance(hashes, list):
            return Change()
        if kind == "BlockStored":
            return Change(came=self._stored(hashes, said))
        return Change(gone=self._removed(hashes)) if kind == "BlockRemoved" else Change()

    def _stored(self, hashes: list[Any], said: Mapping[str, Any]) -> list[int]:
        size, tokens = said.get("block_size"), said.get("token_ids")
        parent, extra = said.get("parent_block_hash"), said.get("extra_keys")
        if type(size) is not int or size < 1 or size % UNIT or not isinstance(tokens, list):
            return []
        if said.get("lora_name") or said.get("lora_id") or any(extra or ()):
            return []  # such blocks hold more than tokens tell
        state = _START if parent is None else self._states.get(parent)
        if state is None or len(tokens) < size * len(hashes):
            return []
        self._prompts.use(size)
        if len(self._states) > _MOST_BLOCKS:
            self.clear()
        came: list[int] = []
        for i, name in enumerate(hashes):
            state = fold(state, tokens[i * size : (i + 1) * size])
            self._states[name] = state
            self._held.add(state)
            came += self._prompts.keys(state)
        return came

    def _removed(self, hashes: Iterable[Any]) -> list[int]:
        gone: list[int] = []
        for name in hashes:
            state = self._states.pop(name, None)
            if state is not None:
                self._held.discard(state)
                gone += self._prompts.keys(state)
        return gone


def _parts(event: Any) -> tuple[str, Mapping[str, Any]]:
    """Return kind and fields of an event: an object in newer versions of vLLM, else a list."""
    if isinstance(event, dict):
        return str(event.get("type")), event
    if isinstance(event, list) and event:
        names = _FIELDS if event[0] == "BlockStored" else ("block_hashes", "medium")
        return str(event[0]), dict(zip(names, event[1:], strict=False))
    return "", {}
