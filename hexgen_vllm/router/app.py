"""The router's HTTP server: routes, keys, errors, and its life from start to drained.

Metrics and health may have a port of their own, so that scrapers need not reach the one for calls.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from typing import Any, Final, cast

from aiohttp import web

from hexgen_vllm import descriptors
from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import BadRequest, ConfigError, HexgenError
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.recent import Ring
from hexgen_vllm.router import access, errors
from hexgen_vllm.router.access import Cors, Keys
from hexgen_vllm.router.addresses import ServedHosts, is_loopback
from hexgen_vllm.router.admin import Admin
from hexgen_vllm.router.batches import Batches, BatchMetrics
from hexgen_vllm.router.calls.intake import Intake
from hexgen_vllm.router.calls.keep_alive import KeepAlives
from hexgen_vllm.router.calls.prompt import TokenRatios
from hexgen_vllm.router.calls.retry import RetryPolicy
from hexgen_vllm.router.calls.stored import Stored
from hexgen_vllm.router.context import Context, shutting_down
from hexgen_vllm.router.engines.attempt import Guard
from hexgen_vllm.router.engines.discovery.discovery import Discovery, DiscoveryMetrics
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.engines.health import Stalls, Watchers
from hexgen_vllm.router.engines.kv_events import KvEvents
from hexgen_vllm.router.engines.probe import Probe
from hexgen_vllm.router.http.client import Pool
from hexgen_vllm.router.http.errors import why
from hexgen_vllm.router.http.messages import REQUEST_ID_HEADER, SENT
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.http.server import Handle, Server
from hexgen_vllm.router.metrics import Connections, Metrics, without_tenants
from hexgen_vllm.router.observe.ledger import Ledger
from hexgen_vllm.router.observe.tracing import Tracing
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.processes.router_process import PROCESS_HEADER, RouterProcess
from hexgen_vllm.router.processes.shard import Shard
from hexgen_vllm.router.relay import Relay
from hexgen_vllm.router.replicas import ReplicaMetrics, Replicas
from hexgen_vllm.router.routes import Parts, Routes, monitors, public, takes_batches
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.status.pages import Pages
from hexgen_vllm.router.tenants import ANYBODY, DEFAULT_TENANT, Client
from hexgen_vllm.router.tuning import Tuning

_MAX_BODY_BYTES: Final = 0
_CLOSE_METRICS_S: Final = 0.1
_SCRAPER: Final = Client(DEFAULT_TENANT)
_LOG = logging.getLogger(__name__)
METRICS_PATH: Final = "/metrics"
_TICK_S: Final = 0.5
_BACKLOG: Final = 2048  # a full one makes kernels reset connections
_CLOSE_S: Final = 0.5  # 0 would mean for ever
_LAST_WORDS_S: Final = 1.0  # for telling clients that their calls were cut off


def new_context(
    options: RouterOptions,
    dispatch: DispatchOptions,
    clock: Clock,
    pool: Pool,
) -> Context:
    """Make the parts of a router; nothing runs yet."""
    ledger, ratios = Ledger(), TokenRatios()
    service = Service(Coordinator(options.bounded(dispatch)), clock, ledger)
    tuning = None
    if options.tune != "off":
        ring = Ring(options.tune_ring)
        tuning = Tuning(options.tuning, service.coordinator, clock, ring, service.retune)
    guard = Guard(options.request_timeout_secs, options.stream_stall_timeout_secs)
    fleet = Fleet(options, service, guard)
    watchers = Watchers(fleet, service, Probe(pool, options), options, clock)
    discovery = Discovery(options, fleet, watchers, clock)
    metrics = Metrics(ledger, service, fleet, None if tuning is None else tuning.tuner)
    metrics.accounts.ring = None if tuning is None else tuning.recent
    metrics.add(DiscoveryMetrics(discovery))
    context = Context(
        options=options,
        clock=clock,
        epoch_s=clock.now(),
        ledger=ledger,
        service=service,
        guard=guard,
        stalls=Stalls(options, fleet, guard, service.coordinator),
        fleet=fleet,
        watchers=watchers,
        discovery=discovery,
        ratios=ratios,
        intake=Intake(ratios, dispatch.default_deadline_s, options.request_id_headers),
        retries=RetryPolicy(options, random.Random()),
        stored=Stored(),
        keep_alives=KeepAlives(options.sse_keep_alive_interval),
        metrics=metrics,
        tracing=open_tracing(options.otlp_traces_endpoint, dispatch.policy),
        kv_events=KvEvents(fleet, service, ledger.kv_events),
        pool=pool,
        tuning=tuning,
    )

    def traced(run: WorkflowRun) -> None:
        if context.tracing is not None:
            context.tracing.workflow_ended(run)

    metrics.on_workflow_end = traced
    return context


def open_tracing(endpoint: str | None, policy: str) -> Tracing | None:
    """Return what traces calls, ``None`` without an ``endpoint``.

    Raises:
        ConfigError: the packages that sending needs are missing, or the endpoint is wrong.
    """
    if endpoint is None:
        return None
    try:
        from hexgen_vllm.router.observe import otel
    except ImportError:
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry (pip install 'hexgen-vllm[otel]')."
        ) from None
    return otel.OtelTracing(otel.exporter(endpoint), policy)


class MetricsPort:
    """Serves what needs no key and is no call.

    Args:
        handle: answers requests of the router.
        host: address to listen on.
        port: port to listen on.
        shared: other processes listen there too, and answer alike.
    """

    def __init__(self, handle: Handle, host: str, port: int, *, shared: bool) -> None:
        self._handle, self._host, self._port, self._shared = handle, host, port, shared
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be had.
        """
        server = Server(
            self._answer,
            refuse=errors.error_response,
            turn_away=errors.too_many_connections,
            max_body_bytes=_MAX_BODY_BYTES,
        )
        self._runner = web.ServerRunner(cast(Any, server), shutdown_timeout=_CLOSE_METRICS_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, reuse_port=self._shared)
        try:
            await site.start()
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise ConfigError(f"cannot listen on {where} for metrics: {why(error)}.") from error

    async def stop(self) -> None:
        """Close everything."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: Request) -> web.StreamResponse:
        if monitors(request.path):
            request.client = _SCRAPER
            return await self._handle(request)
        return errors.from_error(BadRequest("There is no such endpoint.", status=404), None)


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
        process: which of several processes this is; ``None`` when it is the only one.

    Attributes:
        context: its parts, once started.
    """

    context: Context

    def __init__(
        self,
        options: RouterOptions,
        dispatch: DispatchOptions,
        clock: Clock | None = None,
        process: RouterProcess | None = None,
    ) -> None:
        self._keys, self._cors = Keys(options), Cors(options)
        weights = {**self._keys.weights, **dispatch.tenant_weights}
        self._dispatch = replace(dispatch, tenant_weights=weights)
        if dispatch.overload == "protect" and dispatch.policy != "slack":
            _LOG.warning("overload=protect does nothing with policy=%s", dispatch.policy)
        self._options, self._process = options, process
        self._shard: Shard | None = None
        self._clock = clock or SystemClock()
        self._tasks: list[asyncio.Task[None]] = []
        self._runner: web.ServerRunner | None = None
        self._metrics_port: MetricsPort | None = None
        self._tls = access.for_clients(options)
        # A browser would not take our certificate for another name, nor show it a key.
        open_here = self._tls is None and not self._keys.wanted and is_loopback(options.host)
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
        pool = Pool(self._options.connect_timeout_secs, access.for_engines(self._options))
        self.context = context = new_context(self._options, self._dispatch, self._clock, pool)
        if self._process is not None:
            self._shard = Shard(self._process, context)
        self._relay = Relay(context, None if self._shard is None else self._shard.engine_of)
        self._pages = Pages(
            context, tuple(public()), 1 if self._process is None else self._process.count
        )
        self._batches = Batches(context, self._handle, takes_batches)
        context.metrics.add(BatchMetrics(self._batches))
        parts = Parts(self._pages, Admin(context), self._relay, self._batches, self._shard)
        self._routes = Routes(parts)
        server = Server(
            self._handle,
            refuse=errors.error_response,
            turn_away=errors.too_many_connections,
            max_body_bytes=self._options.max_payload_size,
            max_buffered_bytes=self._options.max_buffered_bytes,
            max_connections=self._max_connections(),
            uploads=self._batches.uploads,
            tls=self._tls,
            mark=self._mark if self._cors.enabled or self._process is not None else None,
        )
        context.metrics.add(Connections(server))
        try:
            await self._batches.open()
        except ConfigError:
            pool.close()
            raise
        self._runner = web.ServerRunner(cast(Any, server), shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(
                self._runner,
                self._options.host,
                self.port,
                backlog=_BACKLOG,
                reuse_port=self._process is not None,
            ).start()
        except OSError:
            await self._batches.close()
            pool.close()
            raise
        self.port = self._runner.addresses[0][1]
        await self._open_metrics_port()
        if self._process is not None and self._shard is not None:
            await web.UnixSite(self._runner, self._process.socket(), backlog=_BACKLOG).start()
            self._tasks.append(asyncio.create_task(self._shard.run()))
        self._join_others()
        context.watchers.start()
        await self._look_for_engines()
        self._tasks.append(asyncio.create_task(self._beat()))
        self._tasks += self._batches.start()
        if context.tuning is not None:
            self._tasks.append(asyncio.create_task(context.tuning.run()))
        engines = ",".join(context.fleet.engines)
        _LOG.info("listening url=%s policy=%s engines=%s", self.url, self._dispatch.policy, engines)

    def _join_others(self) -> None:
        if self._options.replicas is not None:
            group = "" if self._process is None else self._process.folder
            replicas = Replicas(self._options, self.context.service, group)
            self.context.replicas = replicas
            self._tasks.append(asyncio.create_task(replicas.run()))
        self.context.metrics.add(ReplicaMetrics(self.context.replicas))

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
            shared = self._process is not None
            self._metrics_port = MetricsPort(self._handle, host, port, shared=shared)
            try:
                await self._metrics_port.start()
            except ConfigError:
                await self.stop()
                raise

    def _mark(self, request: Request, response: web.StreamResponse) -> None:
        if self._cors.enabled:
            self._cors.mark(request, response)
        if self._process is not None:
            response.headers[PROCESS_HEADER] = str(self._process.index)

    @property
    def engine_connections(self) -> int:
        """Connections that calls have to engines."""
        return self._relay.connections

    async def drain(self) -> None:
        """Refuse new calls and wait until those in flight have ended; then end the rest."""
        context = self.context
        context.draining = True
        await self._batches.pause()
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
        if self.context.replicas is not None:
            await self.context.replicas.close()
        if self._metrics_port is not None:
            await self._metrics_port.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        self._relay.close()
        await self._batches.close()
        await self.context.discovery.close()
        if self._shard is not None:
            self._shard.close()
        self.context.pool.close()
        if self.context.tracing is not None:
            await asyncio.to_thread(self.context.tracing.close)

    def _all_tasks(self) -> list[asyncio.Task[None]]:
        context = self.context
        looking = (*context.watchers.tasks(), *context.discovery.tasks())
        return [*self._tasks, *looking, *context.kv_events.tasks()]

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
                self._pages.demand.tick(self.context.clock.now())
            except Exception:  # whatever it was, time must go on
                _LOG.exception("tick failed")

    async def _handle(self, request: Request) -> web.StreamResponse:
        """Answer any request; errors become OpenAI error objects."""
        if request.client is None:
            request.client = ANYBODY
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
            return errors.from_error(error, None)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            _LOG.exception("request failed path=%s", request.path)
            return errors.from_error(HexgenError(), None)


def _wrong_host() -> web.Response:
    text = "This router does not go by that name; --allowed-hosts can allow it."
    return errors.error_response(text, 403, code="host_not_allowed")
