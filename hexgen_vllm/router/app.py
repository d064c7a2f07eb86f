"""The router's HTTP server: routes, keys, errors, and its life from start to drained."""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Any, Final

from aiohttp import web

from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import BadRequest, HexgenError
from hexgen_vllm.router import answers
from hexgen_vllm.router.context import Context, new_context, shutting_down
from hexgen_vllm.router.endpoints import ENDPOINTS, Endpoint
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.pages import Handler, Pages
from hexgen_vllm.router.probe import Probe
from hexgen_vllm.router.relay import Relay
from hexgen_vllm.router.upstream import new_session
from hexgen_vllm.router.watcher import Watcher

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 0.5
_BACKLOG: Final = 2048  # a full one makes kernels reset connections
_CLOSE_S: Final = 0.5  # 0 would mean for ever
_LAST_WORDS_S: Final = 1.0  # for telling clients that their calls were cut off
# Open without a key: load balancers and scrapers have none.
_OPEN: Final = frozenset(
    (
        "/health", "/readiness", "/health/readiness", "/liveness", "/health/liveness", "/ping",
        "/version", "/metrics", "/ui",
    )
)  # fmt: skip


class Router:
    """A router: ``async with Router(options, dispatch) as router`` serves on ``router.url``.

    Args:
        options: of the router.
        dispatch: of placement.
        clock: for tests.
    """

    def __init__(
        self, options: RouterOptions, dispatch: DispatchOptions, clock: Clock | None = None
    ) -> None:
        self._options, self._dispatch = options, dispatch
        self._clock = clock or SystemClock()
        self._watchers: dict[str, Watcher] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._runner: web.ServerRunner | None = None
        self._routes: dict[tuple[str, str], Handler] = {}
        self._keys = tuple(f"Bearer {key}".encode() for key in options.api_key)
        self.port = options.port

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://{self._options.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and begin to look for the engines.

        Raises:
            OSError: the address cannot be had.
        """
        session = new_session(self._options)
        self.context = context = new_context(
            self._options, self._dispatch, self._clock, session, self._suspect
        )
        self._routes = self._all_routes(context)
        server = _Server(
            self._handle, request_factory=self._request, handler_cancellation=True, access_log=None
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._options.host, self.port, backlog=_BACKLOG).start()
        except OSError:
            await session.close()
            raise
        self.port = self._runner.addresses[0][1]
        probe = Probe(session, self._options)
        for engine in context.fleet.engines.values():
            watcher = Watcher(
                engine, context.fleet, context.service, probe, self._options, self._clock
            )
            self._watchers[engine.name] = watcher
            self._tasks.append(asyncio.create_task(watcher.run()))
        self._tasks.append(asyncio.create_task(self._beat()))
        if context.tuning is not None:
            self._tasks.append(asyncio.create_task(context.tuning.run()))
        engines = ",".join(context.fleet.engines)
        _LOG.info("listening url=%s policy=%s engines=%s", self.url, self._dispatch.policy, engines)

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
        while self.context.ledger.open and self._clock.now() < give_up_s:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Close everything at once."""
        # More than once: a cancellation that meets a timeout in a library can get lost.
        while pending := [task for task in self._tasks if not task.done()]:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_CLOSE_S)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.context.session.close()

    async def __aenter__(self) -> Router:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()

    async def _beat(self) -> None:
        """Do twice a second what time alone causes."""
        context = self.context
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                context.service.tick()
                context.guard.tick(self._clock.now())
            except Exception:  # whatever it was, time must go on
                _LOG.exception("tick failed")

    def _suspect(self, engine: str) -> None:
        self._watchers[engine].suspect()

    def _all_routes(self, context: Context) -> dict[tuple[str, str], Handler]:
        relay = Relay(context)

        def generation(endpoint: Endpoint) -> Handler:
            return lambda request: relay.answer(request, endpoint)

        calls = {("POST", endpoint.path): generation(endpoint) for endpoint in ENDPOINTS}
        return calls | Pages(context).routes()

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        most = self._options.max_payload_size
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=most)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request; errors become OpenAI error objects."""
        handler = self._routes.get((request.method, request.path))
        if handler is None:
            return self._no_route(request)
        if self._keys and request.path not in _OPEN and not self._has_key(request):
            return answers.error_response("A valid API key is needed.", 401, code="invalid_api_key")
        try:
            return await handler(request)
        except HexgenError as error:
            return answers.from_error(error, None)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            _LOG.exception("request failed path=%s", request.path)
            return answers.from_error(HexgenError(), None)

    def _no_route(self, request: web.BaseRequest) -> web.Response:
        allowed = sorted(method for method, path in self._routes if path == request.path)
        if allowed:
            headers = {"Allow": ", ".join(allowed)}
            return answers.error_response("Method not allowed.", 405, headers=headers)
        return answers.from_error(BadRequest("There is no such endpoint.", status=404), None)

    def _has_key(self, request: web.BaseRequest) -> bool:
        shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        # Every key is compared: the time must not tell which one came close.
        return sum(hmac.compare_digest(shown, key) for key in self._keys) > 0


class _Server(web.Server):
    """A server whose connections answer what is not HTTP with an OpenAI error object."""

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that could not be read."""
        if status >= 500:
            _LOG.error("request failed", exc_info=exc)
        text = "The request is not valid HTTP." if status < 500 else "The router failed."
        response = answers.error_response(text, status)
        response.force_close()
        return response
