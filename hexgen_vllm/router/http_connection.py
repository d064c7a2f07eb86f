"""One client's connection: requests are read, served one after the other, and answered.

One task serves one request. What comes while a request is answered waits unread.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

from hexgen_vllm.router import answers, outbound
from hexgen_vllm.router.http_request import SENT, Pairs, Request, Source

if TYPE_CHECKING:
    from hexgen_vllm.router.http_server import Server

_LOG = logging.getLogger(__name__)
_MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 8 * 1024
_MAX_AHEAD_BYTES: Final = 2**20  # of requests that came too early
_IDLE_SWEEPS: Final = 15  # 75 s of silence
_HEAD_SWEEPS: Final = 6  # 30 s for the head of a request
_LINGER_S: Final = 1.0  # for a client to read an answer before it has sent its whole body


class Connection(asyncio.Protocol):
    """One client's connection.

    Attributes:
        loop: its event loop.
        transport: ``None`` when it is gone.
        max_body_bytes: largest body taken.
        task: serves the request under way.
        peername: of the client; with ``sockname`` and ``ssl_context`` as aiohttp wants them.
    """

    transport: asyncio.Transport | None = None
    peername: Any = None
    sockname: Any = None
    ssl_context: Any = None

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self.loop = server, loop
        self.max_body_bytes = server.max_body_bytes
        self.task: asyncio.Task[None] | None = None
        self._ready: list[Request] = []  # begun to be read, not to be served
        self._served: Request | None = None
        self._reading: Request | None = None  # its body is not complete
        self._ahead = b""
        self._refusal: tuple[str, int] | None = None  # for what follows the requests in _ready
        self._deaf = self._closing = self._full = self._resuming = False
        self._quiet = self._head_bytes = 0
        self._source: Source | None = None
        self._target, self._pairs = b"", cast(Pairs, [])
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        self.peername = transport.get_extra_info("peername")
        self.sockname = transport.get_extra_info("sockname")
        self.ssl_context = transport.get_extra_info("sslcontext")
        self._server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request under way: nobody waits for its answer any more."""
        self.transport = None
        self._server.open.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on, unless a request that was read is being answered."""
        if self._deaf:
            return
        if self.task is not None and self._reading is not self._served:
            self._ahead += data
            if len(self._ahead) > _MAX_AHEAD_BYTES:  # a paused one would not tell when it closes
                self.abort()
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        if self._reading is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse_rest("The request is not valid HTTP.", 400)
        if self._reading is None and self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse_rest("The headers are too long.", 431)
        if self.task is None:
            self._serve_next()

    def _stay(self, rest: bytes) -> None:
        """Go on as if no upgrade had been asked for; the parser has left out the body."""
        self._parser = httptools.HttpRequestParser(self)
        if self._reading is not None:
            framing = self._reading.framing()
            self._resuming = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
            self._resuming = False
        if rest:
            self._feed(rest)

    def _refuse_rest(self, why: str, status: int) -> None:
        """Answer what was read, then refuse what cannot be read, and read no more."""
        self._deaf, self._refusal = True, (why, status)
        if self._reading is not None:
            self._reading.fail(web.RequestPayloadError(why))
            self._reading = None

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._target, self._pairs = b"", []

    def on_url(self, url: bytes) -> None:
        """Take in a piece of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in a header."""
        self._pairs.append((name, value))

    def on_headers_complete(self) -> None:
        """Make the request; its body may still be on the way.

        Raises:
            ValueError: a header is too long, which the parser reports as its own error.
        """
        if self._resuming:
            return
        most = _MAX_HEADER_BYTES
        if self._head_bytes > most and any(len(n) + len(v) > most for n, v in self._pairs):
            raise ValueError
        self._head_bytes = self._quiet = 0
        request = self._reading = Request(
            self,
            self._parser.get_method().decode("latin-1"),
            self._target.decode("utf-8", "surrogateescape"),
            self._pairs,
            persists=self._parser.should_keep_alive(),
            can_chunk=self._parser.get_http_version() != "1.0",
        )
        self._ready.append(request)
        if self.task is None and request.names.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        """Take in a piece of a body."""
        self._quiet = 0
        if self._reading is not None:
            self._reading.feed(piece)

    def on_message_complete(self) -> None:
        """End a request."""
        request = self._reading
        if request is not None and not (self._parser.should_upgrade() and request.framing()):
            request.feed_end()
            self._reading = None

    # Serving

    def _serve_next(self) -> None:
        if self._ready:
            self._served = request = self._ready.pop(0)
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
            self.transport.close()
        elif self._ready:
            self._serve_next()
        else:
            data, self._ahead = self._ahead, b""
            if self._deaf:
                self._serve_next()
            elif data:
                self._feed(data)

    def _linger(self) -> None:
        """Close after an answer that came before its request was complete."""
        self._deaf = True
        if self.transport is not None:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.abort)

    def _write_refusal(self, why: str, status: int) -> None:
        self._deaf = True
        request = Request(self, "GET", "/", [], persists=False, can_chunk=False)
        self._write_response(request, answers.error_response(why, status))
        if self.transport is not None:
            self.transport.close()

    def _write_response(self, request: Request, response: web.StreamResponse) -> None:
        if request.answering:  # too late for another answer
            self.abort()
            return
        body = response.body if isinstance(response, web.Response) else None
        content = bytes(body) if isinstance(body, bytes | bytearray) else b""
        headers = response.headers
        headers.setdefault("Server", outbound.SERVER)
        headers.setdefault("Date", rfc822_formatted_time())
        if content:
            headers.setdefault("Content-Type", "application/octet-stream")
        head = [f"{k}: {v}\r\n".encode("utf-8", "surrogateescape") for k, v in headers.items()
                if k.lower() not in ("content-length", "connection")]  # fmt: skip
        request.reply(response.status, head, content)

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

    def sweep(self) -> None:
        """Close it when it has been silent for too long; called every few seconds."""
        self._quiet += 1
        if self._reading is not None:
            if self._quiet > _IDLE_SWEEPS:
                self._refuse_rest("The request did not arrive in time.", 408)
        elif self.task is None and self.transport is not None:
            if self._head_bytes and self._quiet > _HEAD_SWEEPS:
                self._write_refusal("The request did not arrive in time.", 408)
            elif self._quiet > _IDLE_SWEEPS:
                self.transport.close()

    def close_when_idle(self) -> None:
        """Take no more requests."""
        self._closing = True
        if self.task is None and self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close it now."""
        if self.transport is not None:
            self.transport.abort()
