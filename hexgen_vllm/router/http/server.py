"""The router's own HTTP/1.1 server: as little work per request and per event as Python allows.

Of each client's connection, requests are read, served one after the other, and answered. One task
serves one request. What comes while a request is answered waits unread. Of a request nothing is
worked out before somebody asks for it: a call needs names and values as they came, the body, and
the methods that write the answer straight to the connection.

Everything around it (listening, TLS, shutting down) is aiohttp's; only the connections are ours.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

import httptools
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy, MultiDictProxy
from yarl import URL

from hexgen_vllm.errors import Refused
from hexgen_vllm.router.http.messages import (
    SENT,
    Buffered,
    HeaderMap,
    LateBody,
    Pairs,
    Source,
    in_the_clear,
    parts,
)

_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 8 * 1024
_MAX_HEADERS: Final = 512
_MAX_READY: Final = 512  # requests read ahead of the one that is answered
_LOG = logging.getLogger(__name__)
_MAX_AHEAD_BYTES: Final = 2**20  # of requests that came too early
SWEEP_S: Final = 5.0
"""Seconds between two looks at a connection."""
_IDLE_SWEEPS: Final = 15  # 75 s of silence
_HEAD_SWEEPS: Final = 6  # 30 s for the head of a request
# A body must come at a least rate, or many clients could keep much waiting with little effort. Both
# numbers are those of Apache's mod_reqtimeout.
_BODY_GRACE_S: Final = 20.0
_LEAST_BYTES_PER_S: Final = 500
_LEAST_READ_BYTES: Final = 2**14  # of an answer, within _IDLE_SWEEPS
# What a client still sends when it has been answered is read for a while: to close a connection
# with unread data resets it, and the client would not see the answer.
_LINGER_S: Final = 2.0
_MAX_LINGER_BYTES: Final = 2**24
_HANDSHAKE_S: Final = 10.0
_MAX_TOLD: Final = 16  # clients that are told at once why they are turned away
_MAX_BUFFERED_BYTES: Final = 2**30
_MAX_CONNECTIONS: Final = 64  # enough for who only reads metrics
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_KEYS: Final[dict[bytes, str]] = {}
_MOST_KEYS: Final = 512
_SMALL_BYTES: Final = 1024
_ONCE: Final = frozenset((
    "authorization", "content-encoding", "content-length", "host", "transfer-encoding", "x-api-key",
    "x-session-id", "x-vllm-priority",
))  # fmt: skip
_AHEAD_BYTES: Final = 2**20  # of a body that is taken in pieces, until its client has to wait


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


class Connection(asyncio.Protocol):
    """One client's connection.

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

    transport: asyncio.Transport | None = None
    peername: Any = None
    sockname: Any = None

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._ready: list[Request] = []  # begun to be read, not to be served
        self._reading: Request | None = None  # its body is not complete
        self._refusal: tuple[str, int] | None = None  # for what follows the requests in _ready
        self._deaf = self._resuming = False
        self._quiet = 0  # sweeps since something of use came
        self._head_bytes = 0  # what came since the last head, piece of a body or end
        self._field_bytes = 0  # names and values of the present head, or trailer, so far
        self._too_long = False
        self._why = ""  # the request is refused, where that is known better
        self._target, self._pairs = b"", cast(Pairs, [])
        self._parser = httptools.HttpRequestParser(self)
        self._server, self.loop = server, loop
        self.max_body_bytes, self.buffered = server.max_body_bytes, server.buffered
        self.marking = server.mark is not None
        self.task: asyncio.Task[None] | None = None
        self._served: Request | None = None
        self._ahead = b""
        self._closing = self._full = False
        self._linger_end: asyncio.TimerHandle | None = None
        self._dropped = 0  # bytes read while lingering
        self._unsent = 0
        self._source: Source | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        self.peername = transport.get_extra_info("peername")
        self.sockname = transport.get_extra_info("sockname")
        server = self._server
        server.open.add(self)
        # Other processes of this router must get through.
        if len(server.open) > server.max_connections and not isinstance(self.sockname, str):
            self._refuse(server)

    def _refuse(self, server: Server) -> None:
        """Turn a client away that is one too many."""
        server.refused += 1
        if len(server.open) > server.max_connections + _MAX_TOLD:
            self.abort()
            return
        self._deaf = self._closing = True
        request = Request(self, "GET", "/", [], persists=False, can_chunk=False)
        self._write_response(request, server.turn_away())
        self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request under way: nobody waits for its answer any more."""
        self.transport = None
        self._server.open.discard(self)
        if self._linger_end is not None:
            self._linger_end.cancel()
        for request in self._ready:
            request.release()
        if self._served is not None:
            self._served.release()
        if self.task is not None:
            self.task.cancel()

    def eof_received(self) -> None:
        """End the request under way now: closing would first wait for the client to read."""
        self._closing = True
        if self.task is not None:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Read on, unless a request that was read is being answered, or an answer not read."""
        if self._deaf:
            if self._linger_end is not None:
                self._dropped += len(data)
                if self._dropped > _MAX_LINGER_BYTES:
                    self.abort()
            return
        if self._full if self.task is None else self._reading is not self._served:
            self._ahead += data
            if len(self._ahead) > _MAX_AHEAD_BYTES:  # a paused one would not tell when it closes
                self.abort()
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        while data and not self._deaf:
            data = self._parse(data)
        if self.task is None:
            self._serve_next()

    # Serving

    def _serve_next(self) -> None:
        if self._ready:
            self._served = request = self._ready.pop(0)
            if not request.body_complete and request.awaits_word:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.task = self.loop.create_task(self._serve(request))
        elif self._refusal is not None:
            self._write_refusal(*self._refusal)

    async def _serve(self, request: Request) -> None:
        try:
            response = await self._server.handle(request)
            if response is not SENT:
                self._write_response(request, response)
        except web.HTTPException as error:
            self._write_response(request, error)
        except ConnectionError:
            self.abort()
        except Exception:
            _LOG.exception("request failed")
            self._write_response(request, self._server.refuse("The router failed.", 500))
        finally:
            request.release()
            request.flow()
            self.task = self._served = self._source = None
        self._after(request)

    def _after(self, request: Request) -> None:
        """Go on after an answer."""
        self._quiet = 0
        if self.transport is None:
            return
        if not request.body_complete:
            self._linger()
        elif self._closing or not request.persists:
            self._closing = True
            if self._deaf or self._ahead or self._ready:
                self._linger()
            else:
                self.transport.close()
        elif not self._full and (self._ready or self._ahead or self._refusal):
            self._go_on()  # if full, when the client has read the answer

    def _go_on(self) -> None:
        data = b""
        if not self._ready:
            data, self._ahead = self._ahead, data
        self._feed(data)

    def _linger(self) -> None:
        """Close after an answer to a client that may not have sent all that it wants to."""
        self._deaf = self._closing = True
        if self.transport is not None and self._linger_end is None:
            self._linger_end = self.loop.call_later(_LINGER_S, self._end_linger)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS reads on by itself until the other side is done
                self.transport.close()

    def _end_linger(self) -> None:
        if self.unsent:  # it reads, if slowly; the sweep ends what does not
            self._linger_end = self.loop.call_later(_LINGER_S, self._end_linger)
        else:
            self.abort()

    def _write_refusal(self, why: str, status: int) -> None:
        self._deaf = self._closing = True
        request = Request(self, "GET", "/", [], persists=False, can_chunk=False)
        self._write_response(request, self._server.refuse(why, status))
        self._linger()

    def _write_response(self, request: Request, response: web.StreamResponse) -> None:
        if request.answering:  # too late for another answer
            self.abort()
            return
        request.reply(response.status, *parts(response))

    def _upload_bytes(self, path: str) -> int | None:
        return self._server.uploads.get(path)

    # For requests and the server

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client to read."""
        # What an event loop calls a transport need not be one of asyncio's classes.
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def marks(self, request: Request) -> list[bytes]:
        """Return the header lines that every answer gets."""
        if self._server.mark is None:
            return []
        response = web.Response()
        before = set(response.headers)
        self._server.mark(request, response)
        added = ((k, v) for k, v in response.headers.items() if k not in before)
        return [f"{k}: {v}\r\n".encode() for k, v in added]

    def write(self, data: bytes) -> None:
        """Send ``data`` if the client is still there."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def hold(self, paused: bool) -> None:
        """Stop reading, or read on."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading() if paused else self.transport.resume_reading()

    def draw_from(self, source: Source) -> None:
        """Have ``source`` wait whenever the client does not read fast enough."""
        self._source = source
        if self._full:
            source.pause()

    def pause_writing(self) -> None:
        """Note that the client does not read fast enough."""
        self._full = True
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        """Note that it has caught up."""
        self._full = False
        if self._source is not None:
            self._source.resume()
        elif self.task is None and not self._closing:
            self._go_on()

    def sweep(self) -> None:
        """Close it when it has been silent or slow for too long; called every few seconds."""
        self._quiet += 1
        request = self._reading
        if request is not None and request is self._served:
            request.sweeps += 1
            due = (request.sweeps * SWEEP_S - _BODY_GRACE_S) * _LEAST_BYTES_PER_S
            if self._quiet > _IDLE_SWEEPS or request.size < due:
                self._refuse_rest("The request did not arrive in time.", 408)
        elif self.task is None and self.transport is not None:
            self._sweep_idle(self.transport)

    def _sweep_idle(self, transport: asyncio.Transport) -> None:
        unsent = self.unsent
        if unsent > self._unsent or self._unsent - unsent >= _LEAST_READ_BYTES:
            self._unsent, self._quiet = unsent, 0
        elif self._head_bytes and self._quiet > _HEAD_SWEEPS and not self._deaf:
            self._write_refusal("The request did not arrive in time.", 408)
        elif self._quiet > _IDLE_SWEEPS:
            self.abort() if unsent else transport.close()

    def close_when_idle(self) -> None:
        """Take no more requests."""
        self._closing = True
        if self.task is None and self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close it now."""
        if self.transport is not None:
            self.transport.abort()

    # What is read

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
                self._refuse_rest(self._why or "The request is not valid HTTP.", 400)
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
            self,
            self._parser.get_method().decode("latin-1"),
            target.decode("utf-8", "surrogateescape"),
            pairs,
            persists=self._parser.should_keep_alive(),
            can_chunk=can_chunk,
        )
        if target[:1] != b"/" or b"%" in target or b"#" in target:
            request.aim(httptools.parse_url(target))
        if request.method == "POST":
            most = self._upload_bytes(request.path)
            if most is not None:
                request.take_in_pieces(most)
        coding = request.names.get("transfer-encoding")
        read_alike = coding is None or (can_chunk and coding.strip(" \t").lower() == "chunked")
        if request.twice:
            self._why = f"The header {request.twice} comes twice."
        elif not read_alike:
            self._why = "The transfer coding of the body is not chunked alone, in HTTP/1.1."
        if self._why or len(self._ready) == _MAX_READY:
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


class Handshake(asyncio.Protocol):
    """A connection of a client before it is encrypted.

    It counts among the others from its first moment: nobody fills the router with connections that
    say nothing. Where there are too many, those go first that have been here longest; an honest
    client is through in milliseconds.
    """

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._loop = server, loop
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = made = cast(asyncio.Transport, transport)
        if isinstance(made.get_extra_info("sockname"), str):  # another process of this router
            connection = Connection(self._server, self._loop)
            made.set_protocol(connection)
            connection.connection_made(made)
            return
        self._timer = self._loop.call_later(_HANDSHAKE_S, self.abort)
        self._server.greet(self)

    def data_received(self, data: bytes) -> None:
        """Begin to encrypt; uvloop would read on if it were told to wait before this."""
        if self._transport is None or self._task is not None:
            return
        self._first = data
        self._transport.pause_reading()
        self._task = self._loop.create_task(self._encrypt(self._transport))
        # ``start_tls`` puts its protocol in place in its first turn, and lets it begin and read in
        # the second one.
        self._loop.call_soon(self._loop.call_soon, self._hand_on)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._forget()

    def abort(self) -> None:
        """Close it now."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._forget()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server.greeted(self)

    def _hand_on(self) -> None:
        """Hand what came first to the protocol that decrypts it."""
        if self._transport is None or self._transport.is_closing():
            return
        protocol: Any = self._transport.get_protocol()
        data, self._first = self._first, b""
        if not hasattr(protocol, "get_buffer"):
            protocol.data_received(data)
        while data and hasattr(protocol, "get_buffer"):
            room = memoryview(protocol.get_buffer(len(data)))
            n = min(len(room), len(data))
            room[:n] = data[:n]
            data = data[n:]
            protocol.buffer_updated(n)

    async def _encrypt(self, transport: asyncio.Transport) -> None:
        server, connection = self._server, Connection(self._server, self._loop)
        try:
            encrypted = await self._loop.start_tls(
                transport,
                connection,
                cast(ssl.SSLContext, server.tls),
                server_side=True,
                ssl_handshake_timeout=_HANDSHAKE_S,
            )
        except (OSError, asyncio.TimeoutError):
            transport.abort()
        else:
            self._forget()
            if encrypted is not None:
                connection.connection_made(encrypted)
        finally:
            self._forget()


Handle = Callable[[Request], Awaitable[web.StreamResponse]]
Mark = Callable[[Request, web.StreamResponse], None]
Refuse = Callable[[str, int], web.Response]
TurnAway = Callable[[], web.Response]


class Server(web.Server):
    """Serves connections with ``handle``.

    Args:
        handle: answers a request; it has to catch its own errors.
        refuse: makes the answer to what is no request, of a sentence and a status.
        turn_away: makes the answer to a client that is one too many.
        max_body_bytes: largest body taken.
        mark: adds headers to every answer; ``None`` adds nothing.
        max_buffered_bytes: most bytes of bodies held at once.
        max_connections: most clients connected at once; more are told so and turned away.
        uploads: most bytes of the bodies that are taken in pieces, by the path of the POST request.
        tls: what connections are encrypted with, but for those over Unix sockets.

    Attributes:
        open: connections there are.
        refused: connections that were one too many.
        buffered: bytes of bodies held.
    """

    def __init__(  # noqa: PLR0913 - what a server is made of
        self,
        handle: Handle,
        *,
        refuse: Refuse,
        turn_away: TurnAway,
        max_body_bytes: int,
        mark: Mark | None = None,
        max_buffered_bytes: int = _MAX_BUFFERED_BYTES,
        max_connections: int = _MAX_CONNECTIONS,
        uploads: Mapping[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(cast(Any, handle))
        self.handle, self.refuse, self.turn_away = handle, refuse, turn_away
        self.max_body_bytes, self.mark = max_body_bytes, mark
        self.buffered = Buffered(max_buffered_bytes)
        self.max_connections, self.refused = max_connections, 0
        self.uploads: Mapping[str, int] = uploads or {}
        self.open: set[Connection] = set()
        self.tls = tls
        self._greeting: dict[Handshake, None] = {}  # oldest first
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(self) -> Any:
        """Return the protocol for a new connection."""
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        if self.tls is not None:
            return Handshake(self, self._loop)
        return Connection(self, self._loop)

    def greet(self, one: Handshake) -> None:
        """Count a connection that is to be encrypted; if there are too many the oldest leaves."""
        self._greeting[one] = None
        if len(self.open) + len(self._greeting) > self.max_connections + _MAX_TOLD:
            oldest = next(iter(self._greeting))
            self.refused += 1
            self.greeted(oldest)
            oldest.abort()

    def greeted(self, one: Handshake) -> None:
        """Count it no more."""
        self._greeting.pop(one, None)

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for connection in list(self.open):
            connection.sweep()

    def pre_shutdown(self) -> None:
        """Let no connection take another request."""
        self._turn_away_greeting()
        for connection in list(self.open):
            connection.close_when_idle()

    def _turn_away_greeting(self) -> None:
        for one in list(self._greeting):
            one.abort()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Wait up to ``timeout`` seconds for requests under way; close all connections."""
        self._turn_away_greeting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [c.task for c in self.open if c.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for connection in list(self.open):
            connection.abort()
