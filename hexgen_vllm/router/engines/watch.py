"""Looks at an answer on its way through: whole events, what they are, the usage at its end.

Nothing is decoded until the answer has ended. JSON strings hold no raw line feed and no
unescaped quote, so that line starts and field names can be found in the bytes.

| what comes | is |
|---|---|
| comments, events without data, ``ping`` | filler: no sign that the engine works |
| a role without text, ``response.created``, ``message_start``, ... | the first byte, no token |
| any other event | a token |
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from hexgen_vllm.router.endpoints import Endpoint

TAIL_BYTES: Final = 16 * 1024
# A longer event is passed on in parts: waiting for its end would only cost memory.
MAX_EVENT_BYTES: Final = 1024 * 1024
_MAX_REWRITTEN_BYTES: Final = 16 * MAX_EVENT_BYTES  # it may hold the token ids of a prompt
_MARK: Final = b"\ndata:"
_USUAL: Final = b'data: {"id"'
_LF: Final = 10
_SEAM_BYTES: Final = 64  # longer than what any mark matches
_FILLER: Final = re.compile(
    rb'\n(?:event: ?ping\r?\ndata:[^\n]*|data:[ \r]*(?=\n)|data: ?\{ ?"type": ?"ping")'
)
_OPENING: Final = re.compile(
    rb"\nevent: ?(?:message_start|content_block_start|response\.(?:created|queued|in_progress"
    rb"|output_item\.added|content_part\.added))\r?\ndata:"
    rb'|\ndata: ?\{(?:[^\n]*"delta": ?\{"role": ?"[a-z]+"(?:, ?"[a-z_]+": ?(?:null|""|\[\]))*\}'
    rb'(?:, ?"[a-z_]+": ?null)*\}|[^\n]{0,40}?"type": ?"(?:message_start|content_block_start'
    rb'|response\.(?:created|queued|in_progress|output_item\.added|content_part\.added))")'
)
_CANCELLED: Final = b"response.cancelled"
_FAILED: Final = b"response.failed"
_NAME: Final = b'"usage"'
_USAGE: Final = re.compile(rb'"usage"\s*:\s*(?=\{)')
_TRIES: Final = 8
_MAX_BRACES: Final = 32  # of one object that are looked at
_MOST_TOKENS: Final = 2**31
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


# What an engine says of usage, whatever types it says it in. No class of this module: compiled ones
# have no annotations for others to read.
_SAID: Final[Any] = msgspec.defstruct(
    "Said",
    [
        (name, Any, None)
        for name in (
            "prompt_tokens", "input_tokens", "completion_tokens", "output_tokens",
            "cache_read_input_tokens", "cache_creation_input_tokens", "prompt_tokens_details",
            "input_tokens_details",
        )
    ],
)  # fmt: skip
_DECODER: Final[Any] = msgspec.json.Decoder(_SAID)


class StreamWatch:
    """Cuts a byte stream after whole events and says what they are.

    A client gets whole events only, so that an error event can follow wherever an engine stops.
    What is seen is remembered, not looked for in the end: an event of any length, cut anywhere,
    counts as the same event in one piece.

    Args:
        endpoint: what the events are of.
        rewrite: returns whole events as the client is to get them; by default as they come.

    Attributes:
        events: events with data so far, the one that ends the stream included.
        opened: events of these that came before the first token and bring none.
        progress: pieces that brought more of an answer than filler.
        between: whether what was passed on so far ends with a whole event.
    """

    __slots__ = (
        "_end", "_endpoint", "_failed", "_most", "_near", "_parts", "_rewrite", "_seam", "_size",
        "_tail", "_tail_bytes", "between", "events", "opened", "progress",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, rewrite: Callable[[bytes], bytes] | None = None) -> None:
        self._endpoint, self._rewrite = endpoint, rewrite
        self._most = MAX_EVENT_BYTES if rewrite is None else _MAX_REWRITTEN_BYTES
        self._parts: list[bytes] = []
        self._size = 0
        self._near = b""  # the last bytes of an event that is not whole
        self._tail: deque[bytes] = deque((b"\n",))
        self._tail_bytes = 1
        self._seam = b"\n"
        self._end = b""
        self._failed = False
        self.events = self.opened = self.progress = 0
        self.between = True

    def feed(self, chunk: bytes) -> bytes:
        """Take in ``chunk``; return the bytes to pass on now, which end with a whole event."""
        if not self._parts and _ends_event(chunk):
            ready, self._near = chunk, b""
        else:
            ready = self._joined(chunk)
            if not ready:
                return b""
        if self._rewrite is not None and self.between:
            ready = self._rewrite(ready)
            if not ready:
                self.progress += 1
                return b""
        self._take(ready)
        return ready

    def _joined(self, chunk: bytes) -> bytes:
        """Keep ``chunk``; return what now is whole, or too long to be kept."""
        parts, near = self._parts, self._near
        end = _after_last_event(near + chunk) - len(near)
        if end <= 0:
            self._near = (near + chunk)[-2:]
            parts.append(chunk)
            self._size += len(chunk)
            if self._size >= self._most:
                return self._all_parts()
            if self._is_content():
                self.progress += 1
            return b""
        parts.append(chunk[:end])
        ready = self._all_parts()
        self._near = chunk[end:][-2:]
        if end < len(chunk):
            parts.append(chunk[end:])
            self._size = len(chunk) - end
        return ready

    def _is_content(self) -> bool:
        """Whether the event that has begun is more than a comment, as far as can be seen."""
        if not self.between:
            return True
        for part in self._parts:
            if not part.isspace():
                return not part.lstrip().startswith(b":")
        return False

    def _all_parts(self) -> bytes:
        ready = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return ready

    def _take(self, ready: bytes) -> None:
        """Look at what is passed on."""
        if self.opened < self.events and self._is_one_more(ready):
            self.progress += 1
            self.events += 1
            self._remember(ready)
            return
        text = self._seam + ready
        found = text.count(_MARK) - self._seam.count(_MARK)
        whole = text.endswith((b"\n\n", b"\n\r\n"))
        if found:
            fillers = _FILLER.findall(text) if self.between else ()
            found -= len(fillers)
            if found and self.opened == self.events:  # no token yet
                self.opened += min(len(_OPENING.findall(text)), found)
        if found or not self.between:
            self.progress += 1
        self.events += found
        mark = self._endpoint.marks.search(text)
        while mark is not None:
            kind = mark.lastgroup
            if kind == "error":
                self._failed = True
            else:
                self._end = mark.group()
                self._failed |= _FAILED in self._end
            mark = self._endpoint.marks.search(text, mark.end())
        self.between = whole
        # After a whole event a line begins; a mark that was found is not found again.
        self._seam = b"\n" if whole else text[-_SEAM_BYTES:]
        self._remember(ready)

    def _is_one_more(self, ready: bytes) -> bool:
        """Whether it is one event like those before, as nearly all of a stream are.

        No mark begins so: those of chats and completions have their id before all else.
        """
        return (
            self.between
            and _ends_event(ready)
            and ready.find(b"\n") == len(ready) - 2
            and ready.startswith(_USUAL)
        )

    def _remember(self, ready: bytes) -> None:
        self._tail.append(ready)
        self._tail_bytes += len(ready)
        while self._tail_bytes >= TAIL_BYTES:
            oldest = len(self._tail[0])
            if self._tail_bytes - oldest < TAIL_BYTES:
                break
            self._tail.popleft()
            self._tail_bytes -= oldest

    @property
    def rest(self) -> bytes:
        """Bytes kept back: the beginning of an event."""
        return b"".join(self._parts)

    def tail(self) -> bytes:
        """Return the last bytes passed on, at least :data:`TAIL_BYTES` of a long stream."""
        return b"".join(self._tail)

    def ended(self) -> bytes:
        """Take in that no more comes; return what is left to pass on.

        A last line that lacks only the empty line after it counts.
        """
        rest = self.rest
        if rest.strip() and b"data:" in rest and rest.endswith((b"\n", b"[DONE]")):
            self._all_parts()
            if self._rewrite is not None:
                rest = self._rewrite(rest)
            self._take(rest)
            self.between = True
            return rest
        return rest

    def complete(self) -> bool:
        """Whether the stream has said that it is at its end, with a whole event."""
        return self.between and bool(self._end)

    def failed(self) -> bool:
        """Whether the engine has said that it failed."""
        return self._failed

    def cancelled(self) -> bool:
        """Whether the engine has said that a client had the answer stopped."""
        return self._end.find(_CANCELLED) >= 0

    def tokens(self) -> int:
        """Return the output tokens so far, taking one event for one token."""
        return self.events - self.opened

    def usage(self) -> Usage:
        """Return the counts the stream ended with; output is counted where it was not said."""
        said = find_usage(self.tail())
        if said.output_tokens is not None:
            return said
        counted = max(self.events - self._endpoint.extra_events, 1)
        return Usage(said.prompt_tokens, said.cached_tokens, counted)


def _ends_event(data: bytes) -> bool:
    """Whether ``data`` ends with two line feeds; asked of every event, so nothing is called."""
    return len(data) > 1 and data[-1] == _LF and data[-2] == _LF


def _after_last_event(data: bytes) -> int:
    """Return where the last whole event of ``data`` ends, 0 when it holds none."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 3 if crlf >= 0 else 0)


def find_usage(data: bytes) -> Usage:
    """Return the last usage object in the JSON text or events ``data``, empty if there is none."""
    said = _last_usage(data)
    if said is None:
        return Usage()
    prompt = _first(_count(said.prompt_tokens), _count(said.input_tokens))
    cached = _count(said.cache_read_input_tokens)
    if cached is not None and prompt is not None:
        prompt += cached + (_count(said.cache_creation_input_tokens) or 0)
    for details in (said.prompt_tokens_details, said.input_tokens_details):
        if isinstance(details, dict):
            cached = _count(details.get("cached_tokens"))
    return Usage(prompt, cached, _first(_count(said.completion_tokens), _count(said.output_tokens)))


def _last_usage(data: bytes) -> Any:
    tries, end = 0, len(data)
    if data.find(_NAME) < 0:  # of a long stream that says nothing in half the time
        return None
    while tries < _TRIES and (end := data.rfind(_NAME, 0, end)) >= 0:
        match = _USAGE.match(data, end)
        if match is None:
            continue
        tries += 1
        found = _object(data, match.end())
        if found is not None:
            return found
    return None


def _object(data: bytes, start: int) -> Any:
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


def _odd_object(text: str) -> Any:
    """Return the object at the start of ``text``, by a reader that is slower and takes more."""
    try:
        found, _ = _ODD_DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return msgspec.convert(found, _SAID) if isinstance(found, dict) else None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else None


def _first(one: int | None, other: int | None) -> int | None:
    return other if one is None else one
