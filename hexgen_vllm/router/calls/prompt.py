"""How long a prompt is and what it starts with, without a tokenizer.

Token ids are counted. Text is counted in characters, and divided by what a character of this
model turned out to be worth in tokens. The start of a prompt is known by chain hashes of
fixed-size chunks, as a prefix cache knows its blocks.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

CHUNK_TOKENS: Final = 256
CHUNK_CHARS: Final = 1024
MAX_CHUNKS: Final = 64
CHARS_PER_TOKEN: Final = 4.0
_MAX_IDS: Final = MAX_CHUNKS * CHUNK_TOKENS
_MAX_CHARS: Final = MAX_CHUNKS * CHUNK_CHARS
# Values that are long and no text of the prompt: pictures and sound are data URLs.
_MEDIA: Final = frozenset(("image_url", "input_audio", "video_url", "audio_url", "source"))
_SEPARATOR: Final = "\x1f"


@dataclass(init=False, slots=True)
class Prompt:
    """A prompt, or several of one request.

    Attributes:
        start: text or token ids of the first one, as much of them as :func:`chain` reads.
        chars: characters of all text.
        ids: token ids of all.
    """

    start: str | Sequence[int]
    chars: int
    ids: int

    def __init__(self, start: str | Sequence[int], chars: int, ids: int) -> None:
        self.start, self.chars, self.ids = start, chars, ids


def read_prompt(body: Mapping[str, Any], names: Sequence[str]) -> Prompt:
    """Return the prompt under the fields ``names`` of ``body``; malformed parts count nothing."""
    present = [body[name] for name in names if body.get(name)]
    if len(present) == 1 and isinstance(present[0], list):
        only = present[0]
        if _is_ids(only):
            return Prompt(only[:_MAX_IDS], 0, len(only))
        if _is_ids(only[0]):
            ids = sum(len(one) for one in only if isinstance(one, list))
            return Prompt(only[0][:_MAX_IDS], 0, ids)
    found = _texts(present)
    chars = sum(len(text) for text in found) + max(len(found) - 1, 0) * len(_SEPARATOR)
    first = found if chars <= _MAX_CHARS else _first(found)
    return Prompt(_SEPARATOR.join(first)[:_MAX_CHARS], chars, 0)


def _is_ids(value: object) -> bool:
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        return False
    return set(map(type, value)) == {int}


def _first(texts: list[str]) -> list[str]:
    """Return as many of ``texts`` as :func:`chain` reads of them."""
    size = 0
    for i, text in enumerate(texts, 1):
        size += len(text) + 1
        if size > _MAX_CHARS:
            return texts[:i]
    return texts


def _texts(value: object) -> list[str]:
    """Return all strings within ``value`` in order; without recursion, nesting is the client's."""
    found: list[str] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            stack.extend(item[::-1])
        elif isinstance(item, dict):
            values = [v for k, v in item.items() if k not in _MEDIA]
            values.reverse()
            stack.extend(values)
    return found


def chain(prompt: Prompt, seed: str) -> tuple[int, ...]:
    """Return chain hashes of the leading full chunks, at most :data:`MAX_CHUNKS`.

    They are the same in every process, unlike Python's of text: routers tell them each other.

    Args:
        prompt: what is hashed.
        seed: prompts of another seed (model) never look alike.
    """
    start = prompt.start
    text = isinstance(start, str)
    size = CHUNK_CHARS if text else CHUNK_TOKENS
    key = hash((_number(seed), text))
    found = []
    for i in range(0, min(len(start) // size, MAX_CHUNKS) * size, size):
        piece = start[i : i + size]
        key = hash((key, _number(piece) if isinstance(piece, str) else tuple(piece)))
        found.append(key)
    return tuple(found)


def _number(text: str) -> int:
    """Return 64 bits that tell texts apart which nobody chose to look alike."""
    raw = text.encode("utf-8", "surrogatepass")
    return zlib.crc32(raw) << 32 | zlib.adler32(raw)


_BYTES_PER_CHAR: Final = 4
_TEMPLATE_TOKENS: Final = 256


class TokenRatios:
    """Characters per token of each model, learned from what engines report.

    Args:
        max_models: models remembered; the longest unused goes first.
    """

    def __init__(self, max_models: int = 256) -> None:
        self._sums: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._max_models = max_models

    def learn(self, model: str, chars: int, tokens: int) -> None:
        """Take in that a prompt of ``chars`` characters had ``tokens`` tokens.

        More tokens than its bytes and a template can be teach nothing: they are of images, or an
        engine that miscounts.
        """
        if chars <= 0 or not 0 < tokens <= _BYTES_PER_CHAR * chars + _TEMPLATE_TOKENS:
            return
        old_chars, old_tokens = self._sums.get(model, (0.0, 0.0))
        self._sums[model] = (0.98 * old_chars + chars, 0.98 * old_tokens + tokens)
        self._sums.move_to_end(model)
        if len(self._sums) > self._max_models:
            self._sums.popitem(last=False)

    def ratio(self, model: str) -> float:
        """Return the characters that one token of ``model`` stands for."""
        chars, tokens = self._sums.get(model, (CHARS_PER_TOKEN, 1.0))
        return chars / tokens

    def tokens(self, model: str, prompt: Prompt) -> int:
        """Return the length of ``prompt`` in tokens, at least 1."""
        return max(prompt.ids + round(prompt.chars / self.ratio(model)), 1)

    def chunk_tokens(self, model: str, prompt: Prompt) -> int:
        """Return the tokens that one entry of :func:`chain` stands for."""
        if not isinstance(prompt.start, str):
            return CHUNK_TOKENS
        return max(round(CHUNK_CHARS / self.ratio(model)), 1)
