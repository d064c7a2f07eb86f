"""``/v1/files`` and ``/v1/batches``: requests by file, sent through this router like any others.

A request of a batch comes in by the same parser, routes and relay as those of clients, over a
connection in memory. So it is placed, retried, counted and bounded alike, as a call of its
tenant, of class ``batch``: without a deadline, and behind everybody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import httptools
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.registry import Collector

from hexgen_vllm import wire
from hexgen_vllm.batches.api import (
    FILES,
    FORM_BYTES,
    ApiReply,
    Asked,
    BatchApi,
    BatchClient,
)
from hexgen_vllm.batches.lines import BatchRequest
from hexgen_vllm.batches.runner import OUTCOMES, LineAnswer, Runner
from hexgen_vllm.batches.store import BatchJob, Disk, StoreLimits
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.policy.claims import Ceiling
from hexgen_vllm.router import errors
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.http.messages import REQUEST_ID_HEADER, SENT, json_response
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.http.server import Handle, Server
from hexgen_vllm.router.observe.families import counter, gauge
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.tenants import DEFAULT_TENANT, Client
from hexgen_vllm.router.words import CLASSES

_PIECE_BYTES: Final = 2**18
_MOST_UNKNOWN: Final = 256  # calls in flight where engines do not say what they can run
_MOST_WAITING: Final = 4  # calls that wait in the router; with more, batches wait
_FREE_SHARE: Final = 10  # one in so many seats of an engine stays free for other calls
_BULK: Final = "bulk"
_TYPE: Final = "batch"
_OWN_TYPE: Final = b"hexgen_workflow_type"
_NAMED: Final = (
    f"host: localhost\r\ncontent-type: application/json\r\naccept-encoding: identity\r\n"
    f"{wire.header_name('service_class')}: {wire.BATCH}\r\nx-smg-priority: {_BULK}\r\n"
)
_NO_UPLOADS: Final[Mapping[str, int]] = {}


class Batches:
    """Files and batches of a router.

    Args:
        context: its parts.
        handle: answers requests of the router.
        takes: whether the requests of a batch may be for a path.

    Attributes:
        uploads: paths whose bodies are taken in pieces.
        runner: sends requests, ``None`` where batches are off.
    """

    def __init__(self, context: Context, handle: Handle, takes: Callable[[str], bool]) -> None:
        self._context, self._handle, self._takes = context, handle, takes
        self._limits = limits(context.options)
        self.uploads = _NO_UPLOADS
        if self._limits is not None:
            self.uploads = {FILES: self._limits.max_file_bytes + FORM_BYTES}
        self._disk: Disk | None = None
        self._api: BatchApi | None = None
        self.runner: Runner | None = None
        self._loopback: Loopback | None = None
        self._running: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the store.

        Raises:
            ConfigError: it cannot be used.
        """
        if self._limits is None:
            return
        self._disk = disk = await asyncio.to_thread(Disk, self._limits)
        self._loopback = Loopback(self._context, self._handle)
        self.runner = Runner(disk, self._loopback, self._takes)
        self._api = BatchApi(disk, self._takes, self.runner.wake)

    def start(self) -> list[asyncio.Task[None]]:
        """Begin to run batches, here or wherever the lock of the store is had."""
        if self.runner is not None:
            self._running = asyncio.create_task(self.runner.run())
        return [] if self._running is None else [self._running]

    async def pause(self) -> None:
        """Send no more requests: the router stops, and the next one sends them."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))

    async def close(self) -> None:
        """Close the store."""
        await self.pause()
        if self._loopback is not None:
            await self._loopback.close()
        if self._disk is not None:
            await asyncio.to_thread(self._disk.close)
            self._disk = None

    async def answer(self, request: Request) -> web.StreamResponse:
        """Answer a request about files or batches."""
        if self._api is None:
            text = "This router keeps no files and batches; --batch-dir DIR says where it can."
            return errors.error_response(text, 404, code="batches_off")
        pieces = _pieces(request)
        asked = Asked(
            request.method,
            request.path,
            request.query,
            request.names,
            self._owner(request),
            pieces,
        )
        try:
            reply = await self._api.answer(asked)
        except web.HTTPRequestEntityTooLarge:
            raise BadRequest("The body is too large.", status=413, code="body_too_large") from None
        except web.RequestPayloadError:
            raise BadRequest("The body could not be read.", code="bad_body") from None
        if reply.path is None:
            return json_response(reply.content)
        return await self._send_file(request, reply, reply.path)

    def _owner(self, request: Request) -> BatchClient:
        """Return whose files a request is about; without keys all are everybody's."""
        client: Client = request.client
        said = self._context.intake.tenant(request.names)
        tenant = client.acts_for(said)
        owner = DEFAULT_TENANT if client.tenant is None else tenant
        most = min(client.ceiling.max_priority, CLASSES[_BULK])
        return BatchClient(owner, tenant, client.scoped, most)

    async def _send_file(self, request: Request, reply: ApiReply, path: Path) -> web.StreamResponse:
        """Send a file as fast as the client reads."""
        disk, gate = self._disk, _Gate()
        if disk is None:
            return errors.hung_up(request)
        try:
            file: BinaryIO = await disk.with_file(path.open, "rb")
        except FileNotFoundError:
            raise BadRequest("The content of this file is gone.", status=404) from None
        try:
            request_id = self._context.intake.request_id(request.names)
            head = (
                f"content-type: application/octet-stream\r\n{REQUEST_ID_HEADER}: {request_id}\r\n"
            )
            request.begin(200, [head.encode()], reply.size, b"")
            request.draw_from(gate)
            left = 0 if request.method == "HEAD" else reply.size
            while left:
                await gate.opened.wait()
                data = await disk.with_file(file.read, min(left, _PIECE_BYTES))
                if not data:
                    return errors.hung_up(request)
                left -= len(data)
                request.send(data)
            request.end()
        finally:
            await disk.with_file(file.close)
        return SENT


def limits(options: RouterOptions) -> StoreLimits | None:
    """Return the limits of the store, ``None`` where batches are off."""
    if options.batch_dir is None:
        return None
    return StoreLimits(
        Path(options.batch_dir),
        options.batch_max_file_bytes,
        options.batch_max_requests,
        options.batch_max_bytes,
        options.batch_max_tenant_bytes,
        options.max_payload_size,
    )


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield the body of a request; a short one comes whole."""
    if request.path != FILES:
        yield await request.read()
        return
    while piece := await request.piece():
        yield piece


class BatchMetrics(Collector):
    """Reads what became of requests of batches; nothing where batches are off.

    Args:
        batches: files and batches of the router.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of batches."""
        runner = self._batches.runner
        counts: Mapping[str, int] = {} if runner is None else runner.counts
        values = [((name,), counts.get(name, 0)) for name in OUTCOMES]
        text = "Requests of batches, by what became of them"
        yield counter("batch_requests", text, ("outcome",), values)
        in_flight = 0 if runner is None else runner.window.in_flight
        yield gauge("batch_calls", "Requests of batches in flight", (), (((), in_flight),))


class _Gate:
    """Stops a file while its client does not read."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.opened.set()

    def pause(self) -> None:
        """Send no more for now."""
        self.opened.clear()

    def resume(self) -> None:
        """Send on."""
        self.opened.set()


class Loopback:
    """Sends requests to the router that it is in.

    Args:
        context: parts of the router.
        handle: answers its requests.
    """

    def __init__(self, context: Context, handle: Handle) -> None:
        self._context, self._handle = context, handle
        self._id_header = (*context.options.request_id_headers, REQUEST_ID_HEADER)[0]
        self._sent = 0  # requests that have no answer yet
        self._server = Server(
            self._answer,
            refuse=errors.error_response,
            turn_away=errors.too_many_connections,
            max_body_bytes=context.options.max_payload_size,
            max_buffered_bytes=context.options.max_buffered_bytes,
            max_connections=2**30,
        )

    async def _answer(self, request: Request) -> web.StreamResponse:
        wire_ = request.transport
        request.client = wire_.client if isinstance(wire_, _Wire) else None
        return await self._handle(request)

    async def send(self, batch: BatchJob, request: BatchRequest, request_id: str) -> LineAnswer:
        """Return the answer to a request of a batch.

        Raises:
            OSError: it broke off.
        """
        client = Client(
            batch.tenant, ceiling=Ceiling(batch.max_priority), sees_all=False, scoped=batch.scoped
        )
        one = _Wire(client, request_id)
        named = "" if _OWN_TYPE in request.body else f"x-hexgen-workflow-type: {_TYPE}\r\n"
        head = (
            f"POST {request.url} HTTP/1.1\r\n{_NAMED}{named}{self._id_header}: {request_id}\r\n"
            f"content-length: {len(request.body)}\r\n\r\n"
        )
        connection = self._server()
        one.attach(connection)
        connection.data_received(head.encode() + request.body)
        self._sent += 1
        try:
            return await one.answer
        finally:
            self._sent -= 1
            one.abort()

    def has_room(self, in_flight: int) -> bool:
        """Whether an engine and the router have room that no other call needs."""
        context = self._context
        if context.draining or context.service.waiting >= _MOST_WAITING:
            return False
        taken = max(context.ledger.open - self._sent, 0) + in_flight
        limit = context.options.max_concurrent_requests
        if limit and taken >= _seats(limit):
            return False
        found = context.service.coordinator.engines.values()
        return not found or taken < sum(_seats(one.slots) for one in found if one.answers)

    def most(self) -> int:
        """Return how many calls may be in flight at most."""
        wanted = self._context.options.batch_concurrency
        if wanted:
            return wanted
        found = self._context.service.coordinator.engines.values()
        return sum(_seats(one.slots) for one in found if one.answers) or _MOST_UNKNOWN

    async def close(self) -> None:
        """Close all connections."""
        await self._server.shutdown(0.0)


def _seats(slots: int) -> int:
    return slots - slots // _FREE_SHARE


class _Wire(asyncio.Transport):
    """A connection in memory that brings one answer.

    Args:
        client: who asks.
        request_id: of the request.

    Attributes:
        client: who asks.
        answer: the answer.
    """

    def __init__(self, client: Client, request_id: str) -> None:
        super().__init__()
        self.client = client
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.answer: asyncio.Future[LineAnswer] = loop.create_future()
        self._connection: Any = None
        self._closing = False
        self._parser = httptools.HttpResponseParser(self)
        self._said: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._request_id = request_id

    def attach(self, connection: Any) -> None:
        """Begin."""
        self._connection = connection
        connection.connection_made(self)

    # For the server

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Say that it comes from within: a path instead of an address."""
        return "batches" if name in ("sockname", "peername") else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take in a piece of the answer."""
        if not self._closing:
            self._parser.feed_data(bytes(data))

    def get_write_buffer_size(self) -> int:
        """Return 0: all is read."""
        return 0

    def is_closing(self) -> bool:
        """Whether it has been closed."""
        return self._closing

    def can_write_eof(self) -> bool:
        """Return that it cannot be half closed."""
        return False

    def pause_reading(self) -> None:
        """Do nothing: all has been sent."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close it."""
        self.abort()

    def abort(self) -> None:
        """Close it now; what has no answer yet has none."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._connection.connection_lost, None)
            if not self.answer.done():
                self.answer.set_exception(ConnectionResetError("the answer broke off"))

    # For the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in a header."""
        self._said[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        """Take in a piece of the body."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self.answer.done():
            return
        status, body = self._parser.get_status_code(), b"".join(self._pieces)
        self.answer.set_result(LineAnswer.of(status, self._said, body, self._request_id))
