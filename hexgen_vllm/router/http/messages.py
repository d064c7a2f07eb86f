"""Requests as the router's own server reads them, and the way back to their clients.

Nothing is worked out before somebody asks for it: a call needs names and values as they came, the
body, and the methods that write the answer straight to the connection.

Bodies are put together, and what was compressed is put in the clear.

The event loop serves all clients, so it does nothing for one of them that takes long. Work on more
than :data:`LARGE_BYTES` goes to :func:`aside`.
"""

from __future__ import annotations

import asyncio
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast
from urllib.parse import unquote

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict, CIMultiDictProxy, MultiDictProxy
from yarl import URL

from hexgen_vllm.errors import Refused

if TYPE_CHECKING:
    from hexgen_vllm.router.http.server import Connection


REQUEST_ID_HEADER: Final = "x-request-id"
SERVER: Final = "hexgen-vllm"
_FRAMING = frozenset(("content-length", "connection"))
LARGE_BYTES: Final = 32 * 1024
"""Size from which a body is worked on beside the event loop.

The worst JSON of this size, lists of nothing, takes 5 ms to decode and to look through (Python
3.11, 2 GHz); text takes 0.1 ms. To change threads costs 0.1 ms.
"""
MOST_INFLATED: Final = 64 * 2**20
"""Bytes that a compressed body may grow to, whatever may be sent in the clear."""
_MOST_RATIO: Final = 200  # JSON of real calls has 3 to 20, of one prompt many times over 100
_NO_RATIO_BYTES: Final = 2**20  # up to here any ratio is good
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 47}
_RAW_DEFLATE: Final = -15
# One that works while another one waits for memory; more would only take turns.
_THREADS: Final = ThreadPoolExecutor(2, thread_name_prefix="hexgen-body")
SENT: Final = web.Response()
"""What a handler returns that has written the answer itself."""
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_KEYS: Final[dict[bytes, str]] = {}
_MOST_KEYS: Final = 512
_SMALL_BYTES: Final = 1024
_ONCE: Final = frozenset((
    "authorization", "content-encoding", "content-length", "host", "transfer-encoding", "x-api-key",
    "x-session-id", "x-vllm-priority",
))  # fmt: skip
_AHEAD_BYTES: Final = 2**20  # of a body that is taken in pieces, until its client has to wait


def parts(response: web.StreamResponse) -> tuple[list[bytes], bytes]:
    """Return the header lines of ``response``, without a length, and its body."""
    body = response.body if isinstance(response, web.Response) else None
    content = bytes(body) if isinstance(body, bytes | bytearray) else b""
    headers = response.headers
    headers.setdefault("Server", SERVER)
    headers.setdefault("Date", rfc822_formatted_time())
    if content:
        headers.setdefault("Content-Type", "application/octet-stream")
    kept = ((k, v) for k, v in headers.items() if k.lower() not in _FRAMING)
    return [f"{k}: {v}\r\n".encode("utf-8", "surrogateescape") for k, v in kept], content


_Result = TypeVar("_Result")
Pieces = Sequence[bytes | bytearray]


class LateBody(Exception):  # noqa: N818 - named after what happened
    """A body did not arrive in time."""


async def aside(work: Callable[..., _Result], *args: object) -> _Result:
    """Return ``work(*args)``, done beside the event loop; it must touch nothing that is shared."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, _work, work, args)


def _work(work: Callable[..., _Result], args: tuple[object, ...]) -> _Result:
    try:
        return work(*args)
    except Exception as error:
        # What the frames hold ends here, too: the event loop would free it with the error.
        found: BaseException | None = error
        while found is not None:
            traceback.clear_frames(found.__traceback__)
            found = found.__context__
        raise


async def in_the_clear(pieces: Pieces, size: int, encoding: str, most: int) -> bytes:
    """Return the body that came in ``pieces``.

    Args:
        pieces: all of it.
        size: bytes of all pieces.
        encoding: how it is compressed, as ``Content-Encoding`` says it.
        most: bytes that it may hold, up to :data:`MOST_INFLATED` if it is compressed.

    Raises:
        HTTPRequestEntityTooLarge: it holds more.
        RequestPayloadError: it is not compressed as it says.
    """
    if size > LARGE_BYTES:
        return await aside(_clear, pieces, encoding, most)
    if encoding == "identity" or not size:
        return b"".join(pieces)
    try:
        return _clear(pieces, encoding, min(most, LARGE_BYTES))
    except web.HTTPRequestEntityTooLarge:
        if most <= LARGE_BYTES:
            raise
        return await aside(_clear, pieces, encoding, most)


def _clear(pieces: Pieces, encoding: str, most: int) -> bytes:
    raw = b"".join(pieces)
    if encoding == "identity":
        return raw
    window = _WINDOWS.get(encoding)
    if window is None:
        raise web.RequestPayloadError(f"no such encoding: {encoding}")
    most = min(most, MOST_INFLATED, max(_MOST_RATIO * len(raw), _NO_RATIO_BYTES))
    for bits in (window, _RAW_DEFLATE) if encoding == "deflate" else (window,):
        tool = zlib.decompressobj(bits)
        try:
            found = tool.decompress(raw, most + 1)
        except zlib.error:
            continue
        if len(found) > most:
            raise web.HTTPRequestEntityTooLarge(most, len(found))
        if tool.eof:
            return found
    raise web.RequestPayloadError("the body is not compressed as it says")


Pairs = list[tuple[bytes, bytes]]


class HeaderMap(dict[str, str]):
    """Header values by lower-case name, the first one of each."""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> HeaderMap:
        """Return the names of ``headers``."""
        return cls((name.lower(), headers[name]) for name in headers)


class Buffered:
    """Bytes of requests' bodies that a server holds at once.

    Attributes:
        size: bytes there are.
        most: bytes there may be.
    """

    def __init__(self, most: int) -> None:
        self.size, self.most = 0, most


class Source(Protocol):
    """What an answer comes from; it can be told to wait."""

    def pause(self) -> None:
        """Read no more for now."""

    def resume(self) -> None:
        """Read on."""


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
        connection: Connection,
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
            return b"%x\r\n%b\r\n" % (len(data), data)
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
