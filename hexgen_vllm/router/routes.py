"""The one table of what the router serves.

Dispatch, keys, the port for metrics, what router processes pass on to each other, the OpenAPI
document and the tests of the documentation all read it; a route that is added here is everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import unquote

from aiohttp import web

from hexgen_vllm.batches import api
from hexgen_vllm.router import errors
from hexgen_vllm.router.admin import Admin
from hexgen_vllm.router.batches import Batches
from hexgen_vllm.router.endpoints import ENDPOINTS, MORE_ENDPOINTS, OTHER, Endpoint
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.processes.shard import Shard
from hexgen_vllm.router.relay import Relay
from hexgen_vllm.router.route import (
    DATA_PATH,
    LOAD_PATH,
    PAGE_PATH,
    RESPONSE_PATH,
    Access,
    Handler,
    ProcessScope,
    Route,
    Topic,
)
from hexgen_vllm.router.status.pages import Pages

_PARAM: Final = re.compile(r"\{(\w+)\}")
_NO_PARAMS: Final[Mapping[str, str]] = MappingProxyType({})


class Parts(NamedTuple):
    """What a router's routes lead to.

    Attributes:
        pages: what the router says of itself.
        admin: what changes the engines.
        relay: answers calls.
        batches: files and batches.
        shard: this one of several processes, ``None`` when there is only one.
    """

    pages: Pages
    admin: Admin
    relay: Relay
    batches: Batches
    shard: Shard | None

    def need_shard(self) -> Shard:
        """Return the shard where there is one."""
        if self.shard is None:
            raise LookupError
        return self.shard


Bind = Callable[[Parts], Handler]
AnyRoute = Route[Parts]


def _bind_call(endpoint: Endpoint) -> Bind:
    return lambda at: partial(at.relay.answer, endpoint)


# fmt: off
def _table() -> Iterator[AnyRoute]:
    monitoring, status, calls, batches, admin = Topic
    opened, client, operator, process = Access
    here, owner, every = ProcessScope
    serves = "Whether a call that comes now would be served: 200 or 503."
    runs = "Whether the process runs."
    for path in ("/health", "/readiness", "/health/readiness"):
        yield Route("GET", path, lambda at: at.pages.readiness, opened, here, monitoring, serves,
                    content=None)
    for path in ("/liveness", "/health/liveness", "/ping"):
        yield Route("GET", path, lambda at: at.pages.liveness, opened, here, monitoring, runs,
                    content=None)
    # SageMaker asks with either method, and vLLM answers both.
    yield Route("POST", "/ping", lambda at: at.pages.liveness, opened, here, monitoring, runs,
                content=None)
    yield Route("GET", "/version", lambda at: at.pages.version, opened, here, monitoring,
                "Version of the router.")
    yield Route("GET", "/metrics", lambda at: at.pages.metrics, opened, every, monitoring,
                "Metrics in Prometheus' text format.", content="text/plain")

    yield Route("GET", "/", lambda at: at.pages.root, opened, here, status, "Leads to /ui.",
                content=None, statuses=(302,))
    yield Route("GET", PAGE_PATH, lambda at: at.pages.ui.page, opened, here, status,
                "A page that shows the router live.", content="text/html")
    yield Route("GET", DATA_PATH, lambda at: at.pages.ui.data, client, every, status,
                "What the page shows.", shows_tenants=True)
    yield Route("GET", "/v1/models", lambda at: at.pages.models, client, here, status,
                "The models of all engines.")
    yield Route("GET", "/workers", lambda at: at.pages.workers, client, here, status,
                "The engines.")
    yield Route("GET", "/load", lambda at: at.pages.load, client, here, status,
                "Number of open calls.")
    yield Route("GET", "/scheduling/diagnostics", lambda at: at.pages.diagnostics, client, here,
                status, "What decisions stand on, and the last ones.", shows_tenants=True)
    yield Route("GET", "/tuning", lambda at: at.pages.tuning, client, here, status,
                "What tuning did and suggests.")
    yield Route("GET", "/tuning/recent", lambda at: at.pages.recent, client, here, status,
                "Recent workflows, one JSON object a line.", content="application/x-ndjson",
                shows_tenants=True)
    yield Route("GET", "/tuning/fleet", lambda at: at.pages.engines_measured, client, here, status,
                "The measured engines, as a fleet file.", content="application/yaml")
    yield Route("GET", "/openapi.json", lambda at: at.pages.openapi, client, here, status,
                "This document.")

    for endpoint in (*ENDPOINTS, *MORE_ENDPOINTS):
        yield Route("POST", endpoint.path, _bind_call(endpoint), client, owner, calls,
                    "A call, placed on an engine." if endpoint.placed else
                    "Passed on to an engine that has the model.", endpoint=endpoint)
    yield Route("POST", "/finish_session", lambda at: at.pages.finish_session, client, owner,
                calls, "End a workflow.", query=("session_id*",))
    yield Route("GET", "/scaling", lambda at: at.pages.scaling, client, here, status,
                "How many engines there should be, for autoscalers.")
    yield Route("GET", "/explain", lambda at: at.pages.explain, client, owner, status,
                "Where the time of a workflow went.", query=("session_id*",))

    for method, path, summary in (
        ("POST", api.FILES, "Upload a file: requests of a batch."),
        ("GET", api.FILES, "The files of this tenant."),
        ("GET", f"{api.FILES}/{{name}}", "One file."),
        ("DELETE", f"{api.FILES}/{{name}}", "Delete a file."),
        ("GET", f"{api.FILES}/{{name}}/content", "What is in a file."),
        ("POST", api.BATCHES, "Have the requests in a file answered."),
        ("GET", api.BATCHES, "The batches of this tenant."),
        ("GET", f"{api.BATCHES}/{{name}}", "How far a batch is."),
        ("POST", f"{api.BATCHES}/{{name}}/cancel", "End a batch."),
    ):
        yield Route(method, path, lambda at: at.batches.answer, client, here, batches, summary,
                    content="application/octet-stream" if path.endswith("/content")
                    else "application/json")

    yield Route("POST", "/workers", lambda at: at.admin.register, operator, every, admin,
                "Take in an engine.", statuses=(201,))
    yield Route("POST", "/workers/{name}/drain", lambda at: at.admin.drain, operator, every, admin,
                "Give an engine no new calls.")
    yield Route("POST", "/workers/{name}/undrain", lambda at: at.admin.undrain, operator, every,
                admin, "Give an engine calls again.")
    yield Route("DELETE", "/workers/{name}", lambda at: at.admin.remove, operator, every, admin,
                "Drain an engine and forget it.", query=("force",), statuses=(200, 202))
    yield Route("POST", "/add_worker", lambda at: at.admin.add_worker, operator, every, admin,
                "Take in an engine.", query=("url",))
    yield Route("POST", "/remove_worker", lambda at: at.admin.remove_worker, operator, every,
                admin, "Drain an engine and forget it.", query=("url",), statuses=(200, 202))
    yield Route("GET", "/list_workers", lambda at: at.admin.list_workers, operator, here, admin,
                "Addresses of the engines.")

    yield Route("GET", LOAD_PATH, lambda at: at.need_shard().load, process, here, status,
                "What calls a process has placed.")
    yield Route("GET", RESPONSE_PATH, lambda at: at.need_shard().response, process, here, status,
                "Which engine has a stored response.", query=("id*",))


# fmt: on


ROUTES: Final = tuple(_table())
"""All routes."""
_REST: Final = Route("ANY", "/{path}", _bind_call(OTHER), Access.CLIENT, ProcessScope.OWNER,
                     Topic.CALLS, endpoint=OTHER, summary="Whatever else an engine has: "
                     "passed on to one that has the model.")  # fmt: skip
# What manages an engine is not for clients: vLLM's own routes, those of its development mode, and
# what other engines and versions call such things.
_MANAGES: Final = re.compile(
    r"sleep|is_sleeping|wake_?up|pause|pause_.*|is_paused|resume|resume_.*|continue_generation"
    r"|(?:start|stop)_profile|.*_rpc|(?:.*_)?weights?(?:_.*)?|(?:un)?load_lora.*|adapters"
    r"|(?:reset|flush|clear|release|abort|scale|shutdown|configure|freeze)_.*|is_scaling_.*"
    r"|(?:get_)?server_(?:info|args)|get_world_size|fault_tolerance|kv_event_sources"
    r"|(?:get|set)_internal_state|hexgen"
)
_PASSED: Final = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))


def manages(path: str) -> bool:
    """Whether a path, however it is written, is for who runs an engine."""
    for _ in range(3):  # an engine may stand behind something that decodes, too
        path = unquote(path)
    segments = [s.lower() for s in re.split(r"[/\\;?]+", path) if s and s != "."]
    return any(_MANAGES.fullmatch(segment.replace("-", "_")) for segment in segments)


def takes_batches(path: str) -> bool:
    """Whether the requests of a batch may be for ``path``: a call with a JSON body."""
    found = [route for route in ROUTES if route.path == path]
    if found:
        return any(route.endpoint is not None for route in found)
    ours = any(_pattern(route.path).fullmatch(path) for route in ROUTES)
    return not ours and not manages(path)


def public() -> Iterator[AnyRoute]:
    """Return the routes that others than this router's own processes may use."""
    return (route for route in ROUTES if route.access is not Access.PROCESS)


class RouteMatch(NamedTuple):
    """A route that was found for a request, what answers it, and what the path says."""

    route: AnyRoute
    handler: Handler
    params: Mapping[str, str] = _NO_PARAMS


class Routes:
    """The table, bound to the handlers of one router."""

    def __init__(self, parts: Parts) -> None:
        self._rest = RouteMatch(_REST, _REST.bind(parts))
        self._refused = RouteMatch(_REST, _refuse)
        self._fixed: dict[tuple[str, str], RouteMatch] = {}
        self._open: list[tuple[str, re.Pattern[str], RouteMatch]] = []
        self._paths: dict[str, list[AnyRoute]] = {}
        for route in ROUTES:
            if route.access is Access.PROCESS and parts.shard is None:
                continue
            match = RouteMatch(route, route.bind(parts))
            for method in route.methods:
                if "{" in route.path:
                    self._open.append((method, _pattern(route.path), match))
                else:
                    self._fixed[method, route.path] = match
            if route.access is not Access.PROCESS:
                self._paths.setdefault(route.path, []).append(route)

    def find(self, request: Request) -> RouteMatch | None:
        """Return the route of a request, ``None`` if there is none."""
        found = self._found(request.method, request.path)
        hidden = found is not None and found.route.access is Access.PROCESS
        return None if hidden and not request.came_from_here else found

    def rest(self, request: Request) -> RouteMatch:
        """Return what passes on a request that :meth:`find` and :meth:`refusal` do not know."""
        upgrades = request.names.get("upgrade", "").lower() == "websocket"
        passes = request.method in _PASSED and request.path.startswith("/") and not upgrades
        return self._rest if passes and not manages(request.path) else self._refused

    def _found(self, method: str, path: str) -> RouteMatch | None:
        found = self._fixed.get((method, path))
        if found is not None:
            return found
        for known, pattern, match in self._open:
            at = pattern.fullmatch(path) if known == method else None
            if at is not None:
                return match._replace(params=at.groupdict())
        return None

    def allowed(self, path: str) -> list[str]:
        """Return the methods with which there is a route for ``path``, in order."""
        found = {m for route in self._paths.get(path, ()) for m in route.methods}
        found |= {method for method, pattern, _ in self._open if pattern.fullmatch(path)}
        return sorted(found)

    def refusal(self, request: Request) -> web.Response | None:
        """Return the answer to a request without a route whose path is nearly right.

        As vLLM does it: another method is 405, one slash too many or too few at the end leads to
        the right path.
        """
        path = request.path
        allowed = self.allowed(path)
        if allowed:
            headers = {"Allow": ", ".join(allowed)}
            return errors.error_response("Method not allowed.", 405, headers=headers)
        other = path[:-1] if path.endswith("/") else f"{path}/"
        if path != "/" and self.allowed(other):  # never to a path of the client's making
            _, mark, query = request.path_qs.partition("?")
            target = f"{other}{mark}{query}"
            return web.Response(status=307, headers={"Location": target})
        return None


async def _refuse(request: Request) -> web.StreamResponse:
    """Say why a request is not passed on to an engine."""
    if request.names.get("upgrade", "").lower() == "websocket":
        return errors.error_response("WebSockets are not passed on to engines.", 501)
    if not request.path.startswith("/"):
        return errors.error_response("There is no such path.", 404)
    if request.method not in _PASSED:
        headers = {"Allow": ", ".join(sorted(_PASSED))}
        return errors.error_response("Method not allowed.", 405, headers=headers)
    text = "This endpoint manages an engine: it is not passed on. Ask the engine itself."
    return errors.error_response(text, 403, code="engine_endpoint")


def monitors(path: str) -> bool:
    """Whether ``path`` is served on the port for metrics."""
    return any(route.path == path for route in ROUTES if route.topic is Topic.MONITORING)


def _pattern(path: str) -> re.Pattern[str]:
    """Return what a path with parameters looks like."""
    pieces = _PARAM.split(path)
    texts = [f"(?P<{p}>[^/]+)" if i % 2 else re.escape(p) for i, p in enumerate(pieces)]
    return re.compile("".join(texts))
