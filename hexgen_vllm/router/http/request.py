"""A client's request: what came in, and how it is answered.

Nothing of it is worked out before somebody asks for it: a call needs names and values as they came,
the body, and the methods that write the answer straight to the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy, MultiDictProxy
from yarl import URL

from hexgen_vllm.errors import Refused
from hexgen_vllm.router.http.messages import Buffered, HeaderMap, Pairs, Source, in_the_clear

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_KEYS: Final[dict[bytes, str]] = {}
_MOST_KEYS: Final = 512
_SMALL_BYTES: Final = 1024
_MOST_SIZES: Final = 1024
_SIZES: Final = [b"%x\r\n" % size for size in range(_MOST_SIZES)]  # how chunks begin
_ONCE: Final = frozenset((
    "authorization", "content-encoding", "content-length", "host", "transfer-encoding", "x-api-key",
    "x-session-id", "x-vllm-priority",
))  # fmt: skip
_AHEAD_BYTES: Final = 2**20  # of a body that is taken in pieces, until its client has to wait


class ClientConnection(Protocol):
    """What a request needs of the connection that it came over.

    Attributes:
        loop: its event loop.
        transport: ``None`` when it is gone.
        max_body_bytes: largest body taken.
        buffered: bytes of bodies that the server holds.
        marking: whether there are headers that every answer gets.
        task: serves the request under way.
        peername: address of the client.
        sockname: address it called, a path for a Unix socket.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport | None
    max_body_bytes: int
    buffered: Buffered
    marking: bool
    task: asyncio.Task[None] | None
    peername: Any
    sockname: Any

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client to read."""

    def marks(self, request: Request) -> list[bytes]:
        """Return the header lines that every answer gets."""

    def write(self, data: bytes) -> None:
        """Send ``data`` if the client is still there."""

    def hold(self, paused: bool) -> None:
        """Stop reading, or read on."""

    def draw_from(self, source: Source) -> None:
        """Have ``source`` wait whenever the client does not read fast enough."""

    def abort(self) -> None:
        """Close it now."""


class Request:
    """One request.

    Attributes:
        method: of it.
        path_qs: path and query as they came, without what stands before or behind them.
        path: the path in the clear, without a query.
        params: what stands in the path for the parameters of its route.
        client: who asks, for whoever handles it to say.
        pairs: header names and values as they came.
        names: the same by lower-case name.
        persists: whether another request may follow on its connection.
        answering: whether the head of the answer has been written.
        marked: whether the answer already has the headers that every answer gets.
        twice: a header that may come once and came twice, for others may heed the second one;
            ``""`` if none did.
        body_complete: whether all of the body is here.
        size: bytes of the body so far.
        held: bytes of it that count among those of the server.
        sweeps: times the connection was looked at while the body was on its way.
    """

    def __init__(
        self,
        connection: ClientConnection,
        method: str,
        target: str,
        pairs: Pairs,
        *,
        persists: bool,
        can_chunk: bool,
    ) -> None:
        self._connection = connection
        self.method, self.path_qs = method, target
        self.path = target.partition("?")[0]
        self.params: Mapping[str, str] = {}
        self.client: Any = None
        self.pairs = pairs
        self.persists, self._can_chunk = persists, can_chunk
        self.names = names = HeaderMap()
        self.twice = ""
        for name, value in pairs:
            key = _KEYS.get(name) or _key(name)
            if key not in names:
                names[key] = value.decode("utf-8", "surrogateescape")
            elif key in _ONCE:
                self.twice = key
        self._all: CIMultiDictProxy[str] | None = None
        self.answering = self.marked = False
        self._chunked = False
        self._pieces: list[bytes | bytearray] = []
        self.size = self.sweeps = 0
        self.held = 0
        self._most = connection.max_body_bytes
        self._in_pieces = self._paused = False
        self._whole: bytes | None = None
        self.body_complete = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    # What came in

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """All headers."""
        if self._all is None:
            pairs = ((n.decode("latin-1"), _text(v)) for n, v in self.pairs)
            self._all = CIMultiDictProxy(CIMultiDict(pairs))
        return self._all

    @property
    def query(self) -> MultiDictProxy[str]:
        """The query, decoded."""
        return URL(self.path_qs, encoded=True).query

    @property
    def remote(self) -> str:
        """The client's address."""
        name = self._connection.peername
        return str(name[0] if isinstance(name, tuple) else name)

    @property
    def transport(self) -> asyncio.Transport | None:
        """The client's connection, ``None`` when it is gone."""
        return self._connection.transport

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not read, beyond what the system keeps for it."""
        return self._connection.unsent

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What serves it, as long as it is served."""
        return self._connection.task

    @property
    def came_from_here(self) -> bool:
        """Whether it came over a Unix socket, from another process of this router."""
        return isinstance(self._connection.sockname, str)

    @property
    def whole(self) -> bytes | None:
        """The body if all of it is here and it came in the clear."""
        if self.body_complete and len(self._pieces) == 1 and "content-encoding" not in self.names:
            return cast(bytes, self._pieces[0])  # the first one is never put together
        return None

    @property
    def awaits_word(self) -> bool:
        """Whether the client may wait to be told before it sends the body."""
        if self.body_complete or self._failure is not None or not self._can_chunk:
            return False
        return self.names.get("expect", "").lower() == "100-continue"

    async def read(self) -> bytes:
        """Return the body in the clear.

        Raises:
            HTTPRequestEntityTooLarge: it is too long.
            RequestPayloadError: it broke off, or is not compressed as it says.
            LateBody: it did not arrive in time.
            Refused: the server holds too much already.
        """
        if not self.body_complete and self._failure is None:
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        if self._whole is None:
            encoding = self.names.get("content-encoding", "identity").lower()
            pieces, most = self._pieces, self._connection.max_body_bytes
            self._whole = whole = await in_the_clear(pieces, self.size, encoding, most)
            self._pieces = []
            self._hold(len(whole) - self.size)
        return self._whole

    async def piece(self) -> bytes:
        """Return what has come of a body that is taken in pieces, empty at its end.

        Raises:
            HTTPRequestEntityTooLarge: it is too long.
            RequestPayloadError: it broke off.
            LateBody: it did not arrive in time.
            Refused: the server holds too much already.
        """
        while self._failure is None and not self._pieces and not self.body_complete:
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        self.release()
        self.flow()
        return b"".join(pieces)

    # For the connection

    def take_in_pieces(self, most: int) -> None:
        """Let the body, of up to ``most`` bytes, be had by :meth:`piece` only."""
        self._in_pieces, self._most = True, most

    def flow(self) -> None:
        """Let the client go on sending."""
        if self._paused:
            self._paused = False
            self._connection.hold(False)

    def aim(self, url: Any) -> None:
        """Read a target that is no plain path as uvicorn does: an absolute one, or with escapes.

        Raises:
            ValueError: it has no path.
        """
        if url.path is None:
            raise ValueError
        query = b"" if url.query is None else b"?" + url.query
        self.path_qs = _text(url.path + query)
        self.path = unquote(_text(url.path), errors="surrogateescape")
        if url.host is not None:  # it outranks the header
            self.names["host"] = _text(url.host)

    def feed(self, piece: bytes) -> None:
        """Take in a piece of the body."""
        self.size += len(piece)
        buffered = self._connection.buffered
        buffered.size += len(piece)
        self.held += len(piece)
        if buffered.size > buffered.most:
            self.fail(_too_much())
        if self.size > self._most:
            self.expect(self.size)
        if self._failure is not None:
            return
        if self._in_pieces:
            self._pieces.append(piece)
            self._wake()
            if self.held > _AHEAD_BYTES and not self._paused:
                self._paused = True
                self._connection.hold(True)
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray):
            last += piece
        else:  # an object of its own costs more than a small piece
            small = last is not None and len(piece) < _SMALL_BYTES
            self._pieces.append(bytearray(piece) if small else piece)

    def _hold(self, size: int) -> None:
        self.held += size
        self._connection.buffered.size += size

    def release(self) -> None:
        """Count its body no more among what the server holds: nobody needs it now."""
        self._connection.buffered.size -= self.held
        self.held = 0

    def expect(self, size: int) -> None:
        """Fail if a body of ``size`` bytes is too long."""
        most = self._most
        if size > most:
            self.fail(web.HTTPRequestEntityTooLarge(most, size))

    def framing(self) -> bytes:
        """Return the header line that says where the body ends, empty if there is no body."""
        framing = (b"content-length", b"transfer-encoding")
        return next((b"%b: %b" % pair for pair in self.pairs if pair[0].lower() in framing), b"")

    def feed_end(self) -> None:
        """Note the end of the body."""
        self.body_complete = True
        if self._waiter is not None:
            self._wake()

    def fail(self, failure: Exception) -> None:
        """Let :meth:`read` raise ``failure``."""
        if not self.body_complete and self._failure is None:
            self._failure = failure
            self._pieces.clear()
            self._wake()
            self.flow()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The answer

    def reply(self, status: int, head: Iterable[bytes], body: bytes) -> None:
        """Answer with ``body``; ``head`` holds the header lines without a length."""
        self.answering = True
        pieces = self._head(status, head)
        if status == 204 or status < 200:
            pieces.append(b"\r\n")
        else:
            pieces.append(b"content-length: %d\r\n\r\n" % len(body))
            if self.method != "HEAD":
                pieces.append(body)
        self._connection.write(b"".join(pieces))

    def draw_from(self, source: Source) -> None:
        """Have ``source`` wait whenever the client does not read fast enough."""
        self._connection.draw_from(source)

    def begin(self, status: int, head: Iterable[bytes], length: int | None, data: bytes) -> None:
        """Begin an answer of ``length`` bytes, or of unknown length, with ``data``."""
        self.answering = True
        pieces = self._head(status, head)
        if length is not None:
            pieces.append(b"content-length: %d\r\n\r\n" % length)
        elif self._can_chunk:
            self._chunked = True
            pieces.append(b"transfer-encoding: chunked\r\n\r\n")
        else:
            self.persists = False
            pieces = [*self._head(status, head), b"\r\n"]
        pieces.append(self._framed(data))
        self._connection.write(b"".join(pieces))

    def send(self, data: bytes) -> None:
        """Send more of an answer that has begun."""
        self._connection.write(self._framed(data))

    def end(self, data: bytes = b"") -> None:
        """Send the last of an answer that has begun."""
        chunked = self._chunked and self.method != "HEAD"
        last = self._framed(data) + (b"0\r\n\r\n" if chunked else b"")
        if last:
            self._connection.write(last)

    def hang_up(self) -> None:
        """Close the client's connection now, whatever has been sent of the answer."""
        self._connection.abort()

    def _framed(self, data: bytes) -> bytes:
        if self.method == "HEAD":
            return b""
        if self._chunked and data:
            size = len(data)
            head = _SIZES[size] if size < _MOST_SIZES else b"%x\r\n" % size
            return head + data + b"\r\n"
        return data

    def _head(self, status: int, head: Iterable[bytes]) -> list[bytes]:
        reason = _REASONS.get(status, "").encode()
        pieces = [b"HTTP/1.1 %d %b\r\n" % (status, reason), *head]
        if self._connection.marking and not self.marked:
            pieces += self._connection.marks(self)
        if not self.body_complete:
            self.persists = False  # nobody reads the rest
        if not self.persists:
            pieces.append(b"connection: close\r\n")
        elif not self._can_chunk:
            pieces.append(b"connection: keep-alive\r\n")
        return pieces


def _too_much() -> Refused:
    text = "The router holds as many bytes of requests as it may."
    return Refused(text, reason="rejected-saturated", status=429)


def _key(name: bytes) -> str:
    """Return a header's lower-case name; names that come often are remembered."""
    key = name.decode("latin-1").lower()
    if len(_KEYS) < _MOST_KEYS:
        _KEYS[name] = key
    return key


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")
