"""Looks at an answer on its way through: whole events, their number, the usage at its end.

Nothing is decoded until the answer has ended. JSON strings hold no raw line feed and no
unescaped quote, so that line starts and field names can be found in the bytes.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from hexgen_vllm.router.endpoints import Endpoint

TAIL_BYTES: Final = 16 * 1024
# A longer event is passed on in parts: waiting for its end would only cost memory.
MAX_EVENT_BYTES: Final = 1024 * 1024
_MARK: Final = b"\ndata:"
_ERRORS: Final = (b'\ndata: {"error"', b"\nevent: error")
_NAME: Final = b'"usage"'
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_TRIES: Final = 8
_MAX_BRACES: Final = 32  # of one object that are looked at
_DECODER: Final = msgspec.json.Decoder(dict[str, Any])
_ODD_DECODER: Final = json.JSONDecoder()


@dataclass(init=False, slots=True)
class Usage:
    """Token counts that an engine reported; ``None`` means not said."""

    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None

    def __init__(
        self,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.output_tokens = output_tokens


class StreamWatch:
    """Cuts a byte stream after whole events and counts them.

    A client gets whole events only, so that an error event can follow wherever an engine stops.

    Attributes:
        events: events so far, the one that ends the stream included.
    """

    __slots__ = ("_endpoint", "_mark_tail", "_rest", "_tail", "_tail_bytes", "events")

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._rest = b""
        self._tail: deque[bytes] = deque((b"\n",))
        self._tail_bytes = 1
        self._mark_tail = b"\n"
        self.events = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take in ``chunk``; return the bytes to pass on now, which end with a whole event."""
        self._remember(chunk)
        if self._rest:
            chunk = self._rest + chunk
        if chunk.endswith(b"\n\n"):
            self._rest = b""
            return chunk
        end = _after_last_event(chunk)
        if not end and len(chunk) >= MAX_EVENT_BYTES:
            end = len(chunk)
        self._rest = chunk[end:]
        return chunk[:end]

    def _remember(self, chunk: bytes) -> None:
        seam = self._mark_tail + chunk
        self.events += seam.count(_MARK)
        self._mark_tail = seam[1 - len(_MARK) :]
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(self._tail[0]) >= TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())

    @property
    def rest(self) -> bytes:
        """Bytes kept back: the beginning of an event."""
        return self._rest

    def tail(self) -> bytes:
        """Return the last bytes of the stream, at least :data:`TAIL_BYTES` of a long one."""
        return b"".join(self._tail)

    def complete(self) -> bool:
        """Whether the stream has said that it is at its end."""
        tail = self.tail()
        return any(mark in tail for mark in self._endpoint.end_marks)

    def failed(self) -> bool:
        """Whether the stream ended with an error event of the engine."""
        tail = self.tail()
        return any(mark in tail for mark in _ERRORS)

    def tokens(self) -> int:
        """Return the output tokens so far, taking one event for one token."""
        return max(self.events - 1, 0)

    def usage(self) -> Usage:
        """Return the counts the stream ended with; output is counted where it was not said."""
        said = find_usage(self.tail())
        if said.output_tokens is not None:
            return said
        counted = max(self.events - self._endpoint.extra_events, 1)
        return Usage(said.prompt_tokens, said.cached_tokens, counted)


def _after_last_event(data: bytes) -> int:
    """Return where the last whole event of ``data`` ends, 0 when it holds none."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def find_usage(data: bytes) -> Usage:
    """Return the last usage object in the JSON text or events ``data``, empty if there is none."""
    usage = _last_usage(data)
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    cached = _count(usage, "cache_read_input_tokens")
    if cached is not None and prompt is not None:
        prompt += cached + (_count(usage, "cache_creation_input_tokens") or 0)
    for details in ("prompt_tokens_details", "input_tokens_details"):
        if isinstance(usage.get(details), dict):
            cached = _count(usage[details], "cached_tokens")
    return Usage(prompt, cached, _count(usage, "completion_tokens", "output_tokens"))


def _last_usage(data: bytes) -> dict[str, Any]:
    tries, end = 0, len(data)
    while tries < _TRIES and (end := data.rfind(_NAME, 0, end)) >= 0:
        match = _USAGE.match(data, end)
        if match is None:
            continue
        tries += 1
        found = _object(data, match.end())
        if found is not None:
            return found
    return {}


def _object(data: bytes, start: int) -> dict[str, Any] | None:
    """Return the JSON object that begins at ``start``, ``None`` if its end is not near."""
    end, most = start, start + TAIL_BYTES
    for _ in range(_MAX_BRACES):
        end = data.find(b"}", end, most) + 1
        if not end:
            break
        piece = data[start:end]
        if piece.count(b"{") == piece.count(b"}"):
            try:
                return _DECODER.decode(piece)
            except (ValueError, RecursionError):
                break  # a brace in a string, or nothing that is read twice
    return _odd_object(data[start:most].decode("utf-8", "replace"))


def _odd_object(text: str) -> dict[str, Any] | None:
    """Return the object at the start of ``text``, by a reader that is slower and takes more."""
    try:
        found, _ = _ODD_DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if type(value) is int and 0 <= value < 2**31:
            return value
    return None
