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
_IDLE_SWEEPS: Final = 15  # 75 s of silence
_HEAD_SWEEPS: Final = 6  # 30 s for the head of a request
_LINGER_S: Final = 1.0  # for a client to read an answer before it has sent its whole body


class Connection(Reader):
    """One client's connection.

    Attributes:
        loop: its event loop.
        transport: ``None`` when it is gone.
        max_body_bytes: largest body taken.
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
        self.max_body_bytes = server.max_body_bytes
        self.marking = server.mark is not None
        self.task: asyncio.Task[None] | None = None
        self._served: Request | None = None
        self._ahead = b""
        self._closing = self._full = False
        self._unsent = 0
        self._source: Source | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        self.peername = transport.get_extra_info("peername")
        self.sockname = transport.get_extra_info("sockname")
        self._server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request under way: nobody waits for its answer any more."""
        self.transport = None
        self._server.open.discard(self)
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
            self.transport.close()
        elif not self._full and (self._ready or self._ahead or self._refusal):
            self._go_on()  # if full, when the client has read the answer

    def _go_on(self) -> None:
        data = b""
        if not self._ready:
            data, self._ahead = self._ahead, data
        self._feed(data)

    def _linger(self) -> None:
        """Close after an answer that came before its request was complete."""
        self._deaf = self._closing = True
        if self.transport is not None:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.abort)

    def _write_refusal(self, why: str, status: int) -> None:
        self._deaf = self._closing = True
        request = Request(self, "GET", "/", [], persists=False, can_chunk=False)
        self._write_response(request, answers.error_response(why, status))
        if self.transport is not None:
            self.transport.close()

    def _write_response(self, request: Request, response: web.StreamResponse) -> None:
        if request.answering:  # too late for another answer
            self.abort()
            return
        request.reply(response.status, *http_answer.parts(response))

    # For requests and the server

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
        """Close it when it has been silent for too long; called every few seconds."""
        self._quiet += 1
        if self._reading is not None and self._reading is self._served:
            if self._quiet > _IDLE_SWEEPS:
                self._refuse_rest("The request did not arrive in time.", 408)
        elif self.task is None and self.transport is not None:
            self._sweep_idle(self.transport)

    def _sweep_idle(self, transport: asyncio.Transport) -> None:
        unsent = transport.get_write_buffer_size()
        if unsent != self._unsent:  # the client reads, if slowly
            self._unsent, self._quiet = unsent, 0
        elif self._head_bytes and self._quiet > _HEAD_SWEEPS:
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
