"""One client's connection: requests are read, served one after the other, and answered.

One task serves one request. What comes while a request is answered waits unread.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import web

from hexgen_vllm.router import answers, http_answer
from hexgen_vllm.router.http_reader import Reader
from hexgen_vllm.router.http_request import SENT, Request, Source

if TYPE_CHECKING:
    from hexgen_vllm.router.http_server import Server

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
_MAX_TOLD: Final = 16  # clients that are told at once why they are turned away


class Connection(Reader):
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
        super().__init__()
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
        text = "The router has as many connections as it may."
        refused = answers.refused(answers.Outcome.OUT_OF_CONNECTIONS, text)
        self._write_response(request, answers.from_error(refused, None))
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
            self._write_response(request, answers.error_response("The router failed.", 500))
        finally:
            self.buffered.size -= request.held
            request.held = 0
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
        self._write_response(request, answers.error_response(why, status))
        self._linger()

    def _write_response(self, request: Request, response: web.StreamResponse) -> None:
        if request.answering:  # too late for another answer
            self.abort()
            return
        request.reply(response.status, *http_answer.parts(response))

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
