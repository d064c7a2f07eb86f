"""The router's own HTTP/1.1 server: as little work per request and per event as Python allows.

Of each client's connection, requests are read, served one after the other, and answered. One task
serves one request. What comes while a request is answered waits unread.

Everything around it (listening, TLS, shutting down) is aiohttp's; only the connections are ours.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

import httptools
from aiohttp import web

from hexgen_vllm.router.http.messages import SENT, Buffered, LateBody, Pairs, Source, parts
from hexgen_vllm.router.http.request import Request

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


class Connection(asyncio.Protocol):
    """One client's connection, as a request needs it.

    Its attributes are those of :class:`~hexgen_vllm.router.http.request.ClientConnection`.
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
        path_qs = target.decode("utf-8", "surrogateescape")
        request = Request(
            self,
            self._parser.get_method().decode("latin-1"),
            path_qs,
            pairs,
            persists=self._parser.should_keep_alive(),
            can_chunk=can_chunk,
        )
        if not path_qs.startswith("/") or "%" in path_qs or "#" in path_qs:
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


class Server:
    """Serves connections with ``handle``, in the place of aiohttp's own server.

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
        self._loop = asyncio.get_running_loop()
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
