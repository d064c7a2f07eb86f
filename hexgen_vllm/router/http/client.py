"""The router's own HTTP/1.1 client: kept-alive connections to engines, one call on each.

An engine's answer is not waited for piece by piece: what arrives is handed on in the same turn of
the event loop, and the task that serves the call sleeps until the end.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from ssl import SSLContext
from typing import Any, Final, Protocol, TypeVar, cast

import httptools
from yarl import URL

from hexgen_vllm.router.http.errors import (
    CannotConnect,
    ConnectTimeout,
    EngineBroke,
    NoSuchHost,
    RouterShort,
    is_short,
)
from hexgen_vllm.router.http.messages import Pairs

T = TypeVar("T")
# uvicorn closes idle connections after 5 s; one that it is about to close must not be used.
_KEEPALIVE_S: Final = 4.0
_LARGE_BODY_BYTES: Final = 64 * 1024
_PIECE_BYTES: Final = 256 * 1024  # of a large body: a transport copies what it cannot send at once
# What an engine may send that is no body: heads, also of 1xx, trailers, sizes of chunks.
_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_HEADERS: Final = 512
_HEAD_S: Final = 30.0  # from the first byte of a head to its last
_LENGTHS: Final = frozenset((b"content-length", b"transfer-encoding"))
_SPACE: Final = 32  # white space has no larger byte
Sink = Callable[[bytes], None]


async def in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of ``work`` if it is there within ``seconds``.

    Unlike :func:`asyncio.wait_for` before Python 3.12 it loses no cancellation that comes in the
    turn in which the work ends.

    Raises:
        asyncio.TimeoutError: it is not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        task.add_done_callback(_forget)
        task.cancel()
        raise
    if task.done():
        return task.result()
    task.add_done_callback(_forget)
    task.cancel()
    raise asyncio.TimeoutError


def _forget(task: asyncio.Task[Any]) -> None:
    """Take the result of work that nobody waits for, and close it if that can be done."""
    if not task.cancelled() and task.exception() is None:
        close = getattr(task.result(), "close", None)
        if close is not None:
            close()


class Line(Protocol):
    """The connection that an answer comes over."""

    def pause(self, paused: bool) -> None:
        """Read no more for now, or read on."""

    def abandon(self) -> None:
        """Close it."""


class Answer:
    """An engine's answer, from the head to the end of the body.

    Attributes:
        status: HTTP status, 0 until the head is here.
        pairs: header names and values as they came.
        fed: pieces of the body so far that are not white space.
    """

    __slots__ = (
        "_error", "_line", "_pieces", "_sink", "_size", "_waiter", "_whole", "fed", "pairs",
        "status",
    )  # fmt: skip

    def __init__(self, line: Line) -> None:
        self._line: Line | None = line
        self.status = self.fed = 0
        self.pairs: Pairs = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._sink: Sink | None = None
        self._whole = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> str:
        """Return the value of the header with this lower-case name, empty if there is none."""
        for one, value in self.pairs:
            if one.lower() == name:
                return value.decode("latin-1")
        return ""

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self._whole

    async def head(self) -> None:
        """Wait for the head; whoever is not there to take it wants none of the answer.

        Raises:
            EngineBroke: the connection broke first.
        """
        try:
            while not self.status:
                await self._change()
        except BaseException:
            self.close()
            raise

    async def body(self, most: int) -> bytes | None:
        """Return the body, or ``None`` as soon as more than ``most`` bytes of it are here.

        Raises:
            EngineBroke: the connection broke first.
        """
        while not self._whole:
            if self._size > most:
                self.pause()
                return None
            await self._change()
        if self._size > most:
            return None
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    async def pour(self, sink: Sink) -> None:
        """Hand all of the body to ``sink`` as it comes; return at its end.

        Raises:
            EngineBroke: the connection broke first; ``sink`` has had everything that came.
        """
        pieces, self._pieces = self._pieces, []
        if pieces:
            sink(b"".join(pieces))
        self._sink = sink
        while not self._whole:
            await self._change()

    def _change(self) -> asyncio.Future[None]:
        """Return what is done when something has come."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def pause(self) -> None:
        """Take no more from the engine for now."""
        if self._line is not None:
            self._line.pause(True)

    def resume(self) -> None:
        """Take more."""
        if self._line is not None:
            self._line.pause(False)

    def enough(self) -> None:
        """Take for its end what came so far: :meth:`pour` returns."""
        if self._sink is not None and not self._whole:
            self._whole = True
            self._wake()

    def close(self) -> None:
        """Want no more of it: close the connection unless the answer has ended."""
        line, self._line = self._line, None
        if line is not None:
            line.abandon()

    # For the connection

    def began(self, status: int, pairs: Pairs) -> None:
        """Take in the head."""
        self.status, self.pairs = status, pairs
        self._wake()

    def feed(self, data: bytes) -> None:
        """Take in a piece of the body."""
        if data[0] > _SPACE or not data.isspace():  # some proxies send it to keep connections open
            self.fed += 1
        if self._sink is None:
            self._pieces.append(data)
            self._size += len(data)
            self._wake()
            return
        try:
            self._sink(data)
        except Exception as error:  # it is the task's, not the event loop's
            self.close()
            self.broke(error)

    def ended(self) -> None:
        """Note the end."""
        self._whole, self._line = self._error is None, None
        self._wake()

    def broke(self, error: Exception) -> None:
        """Note that no more will come."""
        if not self._whole and self._error is None:
            self._error, self._line = error, None
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


_Address = tuple[str, str, int]


class EngineConnection(asyncio.Protocol):
    """One connection to an engine.

    Attributes:
        idle_since_s: when its last call ended, in the event loop's time.
        heard: whether any of the present answer is here.
    """

    def __init__(self, pool: Pool, address: _Address) -> None:
        self._pool, self._address = pool, address
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._pairs: Pairs = []
        self._pieces: list[bytes] = []
        self._ended = self._keep = self._paused = self._full = False
        self._unsent = memoryview(b"")  # of a large body
        self._in_head = False
        self._head_end: asyncio.TimerHandle | None = None
        self._field_bytes = 0  # names and values of the present answer so far
        self._head_bytes = 0  # what came since the last piece of a body or end of an answer
        self.idle_since_s = 0.0
        self.heard = False

    def send(self, head: bytes, body: bytes) -> Answer:
        """Send a request and return what its answer will be."""
        self.heard, answer = False, Answer(self)
        self._answer = answer
        if self._transport is None:
            self._break()
        elif len(body) < _LARGE_BODY_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._unsent = memoryview(body)
            self._send_on()
        return answer

    def _send_on(self) -> None:
        """Send more of a large body, as long as the engine takes it."""
        while self._unsent and not self._full and self._transport is not None:
            piece, self._unsent = self._unsent[:_PIECE_BYTES], self._unsent[_PIECE_BYTES:]
            self._transport.write(piece)

    def usable(self) -> bool:
        """Whether it is open."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.abort()

    # For asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        """Send no more for now."""
        self._full = True

    def resume_writing(self) -> None:
        """Send on."""
        self._full = False
        self._send_on()

    def data_received(self, data: bytes) -> None:
        """Take in what an engine sends; what comes together is handed on together."""
        answer, sound = self._answer, True
        if answer is None:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            sound = False
        pieces = self._pieces
        if not pieces and not self._ended:
            sound = sound and self._is_bounded(len(data))
        if pieces:
            self._pieces, self._head_bytes = [], 0
            answer.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._ended:
            self._finish(answer, sound and self._keep)
        elif not sound:
            self._break()

    def _is_bounded(self, size: int) -> bool:
        """Note that ``size`` bytes came and no body; return whether that may go on."""
        self._head_bytes += size
        if self._in_head and self._head_end is None:
            loop = asyncio.get_running_loop()
            self._head_end = loop.call_later(_HEAD_S, self._head_is_late)
        return self._head_bytes <= _MAX_HEAD_BYTES

    def _head_is_late(self) -> None:
        self._head_end = None
        self._break()

    def _finish(self, answer: Answer, keep: bool) -> None:
        self._answer, self._ended, self._head_bytes = None, False, 0
        answer.ended()
        if keep and self.usable() and self._all_sent():
            if self._paused:
                self.pause(False)
            self._pool.give_back(self, self._address)
        else:
            self.close()

    def _all_sent(self) -> bool:
        """Whether the engine did not answer before the end of the request."""
        if self._unsent or self._transport is None:
            return False
        return not self._transport.get_write_buffer_size()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer under way; without a length the end of the connection is its end."""
        self._transport, self._unsent = None, memoryview(b"")
        self._pool.forget(self, self._address)
        if self._head_end is not None:
            self._head_end.cancel()
        answer = self._answer
        if answer is None:
            return
        names = (name.lower() for name, _ in answer.pairs)
        if exc is None and answer.status and _LENGTHS.isdisjoint(names):
            self._answer = None
            answer.ended()
        else:
            self._break()

    def _break(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.broke(EngineBroke())
        self.close()

    # For the answer

    def abandon(self) -> None:
        """Close it: nobody wants the rest of the answer."""
        self._answer = None
        self.close()

    def pause(self, paused: bool) -> None:
        """Read no more for now, or read on."""
        if self._transport is not None and paused is not self._paused:
            self._paused = paused
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin an answer; a second one to the same request is nothing that was asked for."""
        self.heard, self._keep = True, not self._ended
        self._in_head, self._pairs, self._field_bytes = True, [], 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in a header, or one that follows a body, which nobody gets.

        Raises:
            ValueError: it is too much, which the parser reports as its own error.
        """
        self._pairs.append((name, value))
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > _MAX_HEAD_BYTES or len(self._pairs) > _MAX_HEADERS:
            raise ValueError

    def on_headers_complete(self) -> None:
        """Hand the head on; those of 1xx only announce another one."""
        pairs, self._pairs = self._pairs, []
        self._in_head = False
        if self._head_end is not None:
            self._head_end.cancel()
            self._head_end = None
        status = self._parser.get_status_code()
        if status >= 200 and self._answer is not None and not self._ended:
            self._answer.began(status, pairs)

    def on_body(self, piece: bytes) -> None:
        """Keep a piece of the body until all that came with it is read."""
        if not self._ended:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """Note the end of an answer."""
        self._ended = self._answer is not None and self._answer.status > 0
        self._keep = self._keep and self._parser.should_keep_alive()


class Pool:
    """Connections to engines.

    Args:
        connect_s: longest wait for a connection, seconds.
        ssl: what https engines are checked with; true for the system's authorities.
    """

    def __init__(self, connect_s: float, ssl: SSLContext | bool = True) -> None:
        self._connect_s, self._ssl = connect_s, ssl
        self._idle: dict[_Address, deque[EngineConnection]] = {}
        self._open: set[EngineConnection] = set()
        self._reaper: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Connections there are."""
        return len(self._open)

    def send(
        self, url: URL, head: bytes, body: bytes, *, once: bool = False
    ) -> Coroutine[Any, Any, Answer]:
        """Send a request and return the answer once its head is here.

        A connection that was idle may have been closed at the other end just then: the request
        goes out once more on another one.

        Args:
            url: of the engine.
            head: request line and headers, up to the empty line.
            body: of the request.
            once: do not send it again, and so not over a connection that was idle.

        Raises:
            CannotConnect: nobody listens there.
            RouterShort: there is nothing left here to connect with.
            EngineBroke: the connection broke.
        """
        return self._send((url.scheme, url.raw_host or "", url.port or 80), head, body, once=once)

    async def get(
        self, url: URL, headers: Mapping[str, str], *, most: int, within_s: float
    ) -> tuple[int, bytes]:
        """Ask for a page and return its status and body; a redirect is not followed.

        Args:
            url: of the page.
            headers: of the request.
            most: bytes of a body; a longer one is not read, and returned as empty.
            within_s: seconds until all of it must be here.

        Raises:
            asyncio.TimeoutError: it is not.
            OSError: as :meth:`send`.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        first = f"GET {url.raw_path_qs} HTTP/1.1\r\nhost: {url.host_port_subcomponent}\r\n"
        head = f"{first}{lines}\r\n".encode("utf-8", "surrogateescape")
        return await in_time(self._page(url, head, most), within_s)

    async def _page(self, url: URL, head: bytes, most: int) -> tuple[int, bytes]:
        answer = await self.send(url, head, b"")
        try:
            return answer.status, await answer.body(most) or b""
        finally:
            answer.close()  # nothing to close when it was read to its end

    async def _send(
        self, address: _Address, head: bytes, body: bytes, *, once: bool = False
    ) -> Answer:
        connection = None if once else self._idle_one(address)
        if connection is not None:
            answer = connection.send(head, body)
            try:
                await answer.head()
            except EngineBroke:
                if connection.heard:
                    raise
            else:
                return answer
        answer = (await self._connect(address)).send(head, body)
        await answer.head()
        return answer

    def _idle_one(self, address: _Address) -> EngineConnection | None:
        idle = self._idle.get(address)
        if idle:
            loop = asyncio.get_running_loop()
            connection = idle.pop()
            if connection.usable() and loop.time() - connection.idle_since_s < _KEEPALIVE_S:
                return connection
            connection.close()
        return None

    async def _connect(self, address: _Address) -> EngineConnection:
        try:
            connection = await in_time(self._make(address), self._connect_s)
        except asyncio.TimeoutError:
            raise ConnectTimeout(f"no connection within {self._connect_s} s") from None
        except OSError as error:
            if is_short(error):
                raise RouterShort(str(error)) from None
            unknown = isinstance(error, socket.gaierror)
            raise (NoSuchHost if unknown else CannotConnect)(str(error)) from None
        self._open.add(connection)
        return connection

    async def _make(self, address: _Address) -> EngineConnection:
        scheme, host, port = address
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: EngineConnection(self, address),
            host,
            port,
            ssl=self._ssl if scheme == "https" else None,
        )
        return connection

    def give_back(self, connection: EngineConnection, address: _Address) -> None:
        """Keep a connection for the next call."""
        loop = asyncio.get_running_loop()
        connection.idle_since_s = loop.time()
        idle = self._idle.get(address)
        if idle is None:
            idle = self._idle[address] = deque()
        idle.append(connection)
        if self._reaper is None:
            self._reaper = loop.call_later(_KEEPALIVE_S, self._reap)

    def forget(self, connection: EngineConnection, address: _Address) -> None:
        """Note that a connection is gone."""
        self._open.discard(connection)
        idle = self._idle.get(address, deque())
        if connection in idle:
            idle.remove(connection)
        if not idle:  # engines come and go, and addresses with them
            self._idle.pop(address, None)

    def _reap(self) -> None:
        """Close connections that were idle for long."""
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - _KEEPALIVE_S
        for idle in list(self._idle.values()):
            while idle and idle[0].idle_since_s <= oldest_s:
                idle.popleft().close()
        busy = any(self._idle.values())
        self._reaper = loop.call_later(_KEEPALIVE_S / 4, self._reap) if busy else None

    def close(self) -> None:
        """Close all connections."""
        if self._reaper is not None:
            self._reaper.cancel()
        for connection in list(self._open):
            connection.close()


class UnixPool(Pool):
    """Connections over Unix sockets."""

    def ask(self, path: str, head: bytes, body: bytes) -> Coroutine[Any, Any, Answer]:
        """Send a request to the server at ``path``, as :meth:`send` does."""
        return self._send(("unix", path, 0), head, body)

    async def _make(self, address: _Address) -> EngineConnection:
        _, connection = await asyncio.get_running_loop().create_unix_connection(
            lambda: EngineConnection(self, address), address[1]
        )
        return connection
