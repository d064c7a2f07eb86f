"""Reads requests from a client's connection: what the parser finds, and what is too much."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

import httptools
from aiohttp import web

from hexgen_vllm.router.http_body import LateBody
from hexgen_vllm.router.http_request import Pairs, Request

if TYPE_CHECKING:
    from hexgen_vllm.router.http_connection import Connection

_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 8 * 1024
_MAX_HEADERS: Final = 512
_MAX_READY: Final = 512  # requests read ahead of the one that is answered


class Reader(asyncio.Protocol):
    """The half of a connection that reads."""

    def __init__(self) -> None:
        self._ready: list[Request] = []  # begun to be read, not to be served
        self._reading: Request | None = None  # its body is not complete
        self._refusal: tuple[str, int] | None = None  # for what follows the requests in _ready
        self._deaf = self._resuming = False
        self._quiet = 0  # sweeps since something of use came
        self._head_bytes = 0  # what came since the last head, piece of a body or end
        self._field_bytes = 0  # names and values of the present head, or trailer, so far
        self._too_long = False
        self._target, self._pairs = b"", cast(Pairs, [])
        self._parser = httptools.HttpRequestParser(self)

    def _parse(self, data: bytes) -> bytes:
        """Read requests, up to one that asks for an upgrade; return what follows it."""
        rest = b""
        if self._reading is None and not self._head_bytes:
            self._quiet = 0
        self._head_bytes += len(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
                self._stay()
        except httptools.HttpParserError:
            if self._too_long:
                self._refuse_rest("The headers are too long.", 431)
            else:
                self._refuse_rest("The request is not valid HTTP.", 400)
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse_rest("The headers are too long.", 431)
        return rest

    def _stay(self) -> None:
        """Go on as if no upgrade had been asked for; the parser has left out the body."""
        self._parser = httptools.HttpRequestParser(self)
        if self._reading is not None:
            self._resuming = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % self._reading.framing())
            self._resuming = False

    def _refuse_rest(self, why: str, status: int) -> None:
        """Answer what was read, then refuse what cannot be read, and read no more."""
        if self._deaf:
            return
        self._deaf, self._refusal = True, (why, status)
        if self._reading is not None:
            late = status == 408
            self._reading.fail(LateBody(why) if late else web.RequestPayloadError(why))
            self._reading = None

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._target, self._pairs, self._field_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        """Take in a piece of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in a header, or one that follows a body, which nobody gets.

        Raises:
            ValueError: it is too long, which the parser reports as its own error.
        """
        size = len(name) + len(value)
        self._field_bytes += size
        if size > _MAX_HEADER_BYTES or self._field_bytes > _MAX_HEAD_BYTES:
            self._too_long = True  # in one packet as in many
            raise ValueError
        self._pairs.append((name, value))

    def on_headers_complete(self) -> None:
        """Make the request; its body may still be on the way.

        Raises:
            ValueError: its end is not certain, its target is none, its head is too long, or too
                many requests were sent ahead.
        """
        if self._resuming:
            return
        target = self._target
        self._too_long = len(self._pairs) > _MAX_HEADERS or len(target) > _MAX_HEAD_BYTES
        if self._too_long:
            raise ValueError
        self._head_bytes = self._quiet = self._field_bytes = 0
        pairs, self._pairs = self._pairs, []
        can_chunk = self._parser.get_http_version() != "1.0"
        request = Request(
            cast("Connection", self),
            self._parser.get_method().decode("latin-1"),
            target.decode("utf-8", "surrogateescape"),
            pairs,
            persists=self._parser.should_keep_alive(),
            can_chunk=can_chunk,
        )
        if target[:1] != b"/" or b"%" in target or b"#" in target:
            request.aim(httptools.parse_url(target))
        old_and_chunked = not can_chunk and "transfer-encoding" in request.names
        if old_and_chunked or len(self._ready) == _MAX_READY:
            raise ValueError
        request.expect(int(request.names.get("content-length", 0)))
        self._reading = request
        self._ready.append(request)

    def on_body(self, piece: bytes) -> None:
        """Take in a piece of a body."""
        self._head_bytes = self._quiet = 0
        if self._reading is not None:
            self._reading.feed(piece)

    def on_message_complete(self) -> None:
        """End a request."""
        self._head_bytes = 0
        request = self._reading
        if request is not None and not (self._parser.should_upgrade() and request.framing()):
            request.feed_end()
            self._reading = None
