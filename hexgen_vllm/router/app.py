"""The router's HTTP server: routes, keys, errors, and its life from start to drained."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Final

from aiohttp import web

from hexgen_vllm import descriptors
from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.router import answers, tls
from hexgen_vllm.router.admin import Admin
from hexgen_vllm.router.context import Context, new_context, shutting_down
from hexgen_vllm.router.cors import Cors
from hexgen_vllm.router.hosts import ServedHosts, is_loopback
from hexgen_vllm.router.http_request import SENT, Request
from hexgen_vllm.router.http_server import Server
from hexgen_vllm.router.keys import Keys
from hexgen_vllm.router.metrics import without_tenants
from hexgen_vllm.router.metrics_port import MetricsPort
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.outbound import REQUEST_ID_HEADER
from hexgen_vllm.router.pages import Pages
from hexgen_vllm.router.relay import Relay
from hexgen_vllm.router.routes import Parts, Routes
from hexgen_vllm.router.shard import Shard
from hexgen_vllm.router.spot import PROCESS_HEADER, Spot
from hexgen_vllm.router.tenants import ANYBODY
from hexgen_vllm.router.upstream import new_session

_LOG = logging.getLogger(__name__)
METRICS_PATH: Final = "/metrics"
_TICK_S: Final = 0.5
_BACKLOG: Final = 2048  # a full one makes kernels reset connections
_CLOSE_S: Final = 0.5  # 0 would mean for ever
_LAST_WORDS_S: Final = 1.0  # for telling clients that their calls were cut off


def _for_everybody(response: web.StreamResponse) -> web.StreamResponse:
    """Return metrics as those see them who have no key of an admin."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        response.body = without_tenants(response.body)
    return response


class Router:
    """A router: ``async with Router(options, dispatch) as router`` serves on ``router.url``.

    Args:
        options: of the router.
        dispatch: of placement.
        clock: for tests.
        spot: which of several processes this is; ``None`` when it is the only one.

    Attributes:
        context: its parts, once started.
    """

    context: Context

    def __init__(
        self,
        options: RouterOptions,
        dispatch: DispatchOptions,
        clock: Clock | None = None,
        spot: Spot | None = None,
    ) -> None:
        self._keys, self._cors = Keys(options), Cors(options)
        weights = {**self._keys.weights, **dispatch.tenant_weights}
        self._dispatch = replace(dispatch, tenant_weights=weights)
        self._options, self._spot = options, spot
        self._shard: Shard | None = None
        self._clock = clock or SystemClock()
        self._tasks: list[asyncio.Task[None]] = []
        self._runner: web.ServerRunner | None = None
        self._metrics_port: MetricsPort | None = None
        self._tls = tls.for_clients(options)
        # A browser would not take our certificate for another name, nor show it a key.
        open_here = self._tls is None and not options.api_key and is_loopback(options.host)
        self._hosts = ServedHosts(options.allowed_hosts) if open_here else None
        self.port = options.port

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{self._options.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and begin to look for the engines.

        Raises:
            OSError: the address cannot be had.
            ConfigError: that for metrics cannot be had, engines cannot be looked for, or what
                sends traces is not installed.
        """
        session = new_session(self._options)
        try:
            context = new_context(self._options, self._dispatch, self._clock, session)
        except ConfigError:
            await session.close()
            raise
        self.context = context
        self._relay = Relay(context)
        if self._spot is not None:
            self._shard = Shard(self._spot, context)
        parts = Parts(Pages(context), Admin(context), self._relay, self._shard)
        self._routes = Routes(parts)
        server = Server(
            self._handle,
            max_body_bytes=self._options.max_payload_size,
            max_buffered_bytes=self._options.max_buffered_bytes,
            max_connections=self._max_connections(),
            mark=self._mark if self._cors.enabled or self._spot is not None else None,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(
                self._runner,
                self._options.host,
                self.port,
                backlog=_BACKLOG,
                ssl_context=self._tls,
                reuse_port=self._spot is not None,
            ).start()
        except OSError:
            await session.close()
            raise
        self.port = self._runner.addresses[0][1]
        await self._open_metrics_port()
        if self._spot is not None and self._shard is not None:
            await web.UnixSite(self._runner, self._spot.socket(), backlog=_BACKLOG).start()
            self._tasks.append(asyncio.create_task(self._shard.run()))
        context.watchers.start()
        await self._look_for_engines()
        self._tasks.append(asyncio.create_task(self._beat()))
        if context.tuning is not None:
            self._tasks.append(asyncio.create_task(context.tuning.run()))
        engines = ",".join(context.fleet.engines)
        _LOG.info("listening url=%s policy=%s engines=%s", self.url, self._dispatch.policy, engines)

    def _max_connections(self) -> int:
        """Return how many clients may be connected."""
        most = descriptors.connections_for(descriptors.raise_limit())
        wanted = self._options.max_connections
        if wanted > most:
            _LOG.warning("max_connections=%d needs more file descriptors (ulimit -n)", wanted)
        return wanted or most

    async def _look_for_engines(self) -> None:
        try:
            await self.context.discovery.start()
        except ConfigError:
            await self.stop()
            raise

    async def _open_metrics_port(self) -> None:
        host, port = self._options.prometheus_host, self._options.prometheus_port
        if port:
            shared = self._spot is not None
            self._metrics_port = MetricsPort(self._handle, host, port, shared=shared)
            try:
                await self._metrics_port.start()
            except ConfigError:
                await self.stop()
                raise

    def _mark(self, request: Request, response: web.StreamResponse) -> None:
        if self._cors.enabled:
            self._cors.mark(request, response)
        if self._spot is not None:
            response.headers[PROCESS_HEADER] = str(self._spot.index)

    @property
    def engine_connections(self) -> int:
        """Connections that calls have to engines."""
        return self._relay.connections

    async def drain(self) -> None:
        """Refuse new calls and wait until those in flight have ended; then end the rest."""
        context = self.context
        context.draining = True
        _LOG.info("draining open_calls=%d", context.ledger.open)
        await self._wait_settled(self._options.shutdown_timeout)
        if context.ledger.open:
            await self.hang_up()

    async def hang_up(self) -> None:
        """End all calls, and tell their clients why."""
        context = self.context
        _LOG.warning("calls cut off open_calls=%d", context.ledger.open)
        context.service.refuse_waiting(shutting_down())
        context.guard.end_all()
        await self._wait_settled(_LAST_WORDS_S)

    async def _wait_settled(self, seconds: float) -> None:
        give_up_s = self._clock.now() + seconds
        while self._open_calls() and self._clock.now() < give_up_s:
            await asyncio.sleep(0.02)

    def _open_calls(self) -> int:
        passing = 0 if self._shard is None else self._shard.passing
        return self.context.ledger.open + passing

    async def stop(self) -> None:
        """Close everything at once."""
        # More than once: a cancellation that meets a timeout in a library can get lost.
        while pending := [task for task in self._all_tasks() if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_CLOSE_S)
        if self._metrics_port is not None:
            await self._metrics_port.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        self._relay.close()
        await self.context.discovery.close()
        if self._shard is not None:
            self._shard.close()
        await self.context.session.close()
        await asyncio.to_thread(self.context.tracing.close)

    def _all_tasks(self) -> list[asyncio.Task[None]]:
        context = self.context
        return [*self._tasks, *context.watchers.tasks(), *context.discovery.tasks()]

    async def __aenter__(self) -> Router:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()

    async def _beat(self) -> None:
        """Do twice a second what time alone causes."""
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.context.tick()
            except Exception:  # whatever it was, time must go on
                _LOG.exception("tick failed")

    async def _handle(self, request: Request) -> web.StreamResponse:
        """Answer any request; errors become OpenAI error objects."""
        response = await self._answer(request)
        if request.path == METRICS_PATH and not (request.client.sees_all or request.came_from_here):
            response = _for_everybody(response)
        if response is not SENT and REQUEST_ID_HEADER not in response.headers:
            response.headers[REQUEST_ID_HEADER] = self.context.intake.request_id(request.names)
        return response

    async def _answer(self, request: Request) -> web.StreamResponse:
        hosts = self._hosts
        if hosts is not None:
            host = request.names.get("host", "")
            if host not in hosts.known and not hosts.allow(host):
                return _wrong_host()
        found = self._routes.find(request)
        if found is None:
            refused = self._cors.preflight(request) or self._routes.refusal(request)
            if refused is not None:
                return refused
            found = self._routes.rest(request)
        route, handler, request.params = found
        if request.client is ANYBODY:
            request.client = self._keys.client(request)
        # What another process passes on has been looked at there.
        if not request.came_from_here:
            refusal = self._keys.refusal(request, route)
            if refusal is not None:
                return refusal
        try:
            if self._shard is not None:
                taken = await self._shard.take(request, route)
                if taken is not None:
                    return taken
            return await handler(request)
        except HexgenError as error:
            return answers.from_error(error, None)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            _LOG.exception("request failed path=%s", request.path)
            return answers.from_error(HexgenError(), None)


def _wrong_host() -> web.Response:
    text = "This router does not go by that name; --allowed-hosts can allow it."
    return answers.error_response(text, 403, code="host_not_allowed")
