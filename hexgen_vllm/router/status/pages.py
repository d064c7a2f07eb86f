"""The endpoints that ask about the router and its engines, and those that no policy sees.

One of them is an OpenAPI 3.1 document, made from the table of routes. Bodies and answers of calls
are the engines' business: it says what the router reads of them, and the form of everything that
the router says itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

from aiohttp import web

from hexgen_vllm import __version__, wire
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.http.messages import json_response
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.metrics import CONTENT_TYPE
from hexgen_vllm.router.route import PAGE_PATH, Access, Route, Topic
from hexgen_vllm.router.status.demand import DemandCollector
from hexgen_vllm.router.status.overview import Overview, UiPage, worker_view
from hexgen_vllm.router.tuning import SearchFailed, fleet_text
from hexgen_vllm.router.words import as_id

_OBJECT: Final[_Json] = {"type": "object"}
_NUMBER: Final[_Json] = {"type": "number", "exclusiveMinimum": 0}
_NAME: Final[_Json] = {"type": "string", "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,63}$"}
_DECISIONS_SHOWN: Final = 50
_Json = dict[str, Any]
HEADERS: Final[dict[str, tuple[_Json, str]]] = {
    "workflow_id": (
        {"type": "string", "pattern": r"^[\x21-\x7e]{1,128}$"},
        "The workflow that the call belongs to.",
    ),
    "workflow_type": (_NAME, "Name under which such workflows are learned."),
    "workflow_deadline_ms": (_NUMBER, "Milliseconds left for the whole workflow."),
    "stage": (_NAME, "Stage of this call."),
    "stages_left": ({"type": "integer", "minimum": 0}, "Stages after this one."),
    "expected_output_tokens": ({"type": "integer", "minimum": 1}, "Answer length, if known."),
    "workflow_final": ({"type": "boolean"}, "Nothing follows this call."),
    "tenant": (_NAME, "Who pays."),
    "service_class": (
        {"type": "string", "pattern": "^(batch|interactive)$"},
        "`batch` for a call that nobody waits for: served in what calls with deadlines leave.",
    ),
    "resume_ms": (
        {"type": "number", "minimum": 0},
        "Milliseconds until the next call of the workflow is expected; 0: none is.",
    ),
    "keep_ms": (_NUMBER, "Milliseconds for which the KV of this call should stay."),
}
_ERROR: Final[_Json] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_WORKER: Final[_Json] = {
    "type": "object",
    "required": ["name", "state", "is_healthy", "kind", "models", "load"],
    "properties": {
        "name": {"type": "string"},
        "state": {"type": "string"},
        "is_healthy": {"type": "boolean"},
        "kind": {"enum": ["hexgen", "priority", "fcfs", None]},
        "models": {"type": "array", "items": {"type": "string"}},
        "load": {"type": "integer", "minimum": 0},
    },
}


def openapi_document(routes: Iterable[Route[Any]]) -> _Json:
    """Return the document of ``routes``."""
    paths: dict[str, _Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "hexgen-vllm router", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR, "Worker": _WORKER},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "admin": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"key": []}, {}],
    }


def _content(kind: str | None, schema: _Json | None = None) -> _Json:
    if kind is None:
        return {"description": "Done."}
    return {"description": "Done.", "content": {kind: {"schema": schema or {}}}}


def _operation(route: Route[Any]) -> _Json:
    failed = _content("application/json", {"$ref": "#/components/schemas/Error"})
    refused = {**failed, "description": "Not done; the error object says why."}
    done = {str(status): _done(route) for status in route.statuses}
    answers = {**done, "4XX": refused, "5XX": refused}
    if route.content is None:
        answers["503"] = {"description": "Not ready."}
    operation: _Json = {"tags": [route.topic.value], "summary": route.summary, "responses": answers}
    parameters = _parameters(route)
    if parameters:
        operation["parameters"] = parameters
    body = _body(route)
    if body is not None:
        content = {"application/json": {"schema": body}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.access is Access.ADMIN:
        operation["security"] = [{"admin": []}]
    return operation


def _done(route: Route[Any]) -> _Json:
    if route.endpoint is not None:
        content: _Json = {"application/json": {}, "text/event-stream": {}}
        return {"description": "The engine's answer, byte for byte.", "content": content}
    if route.topic is Topic.ADMIN:
        listed = route.method == "GET"
        schema = _OBJECT if listed else {"$ref": "#/components/schemas/Worker"}
        return _content(route.content, schema)
    return _content(route.content)


def _parameters(route: Route[Any]) -> list[_Json]:
    given: list[_Json] = [
        {"in": "path", "name": name, "required": True, "schema": _NAME}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    for name in route.query:
        must = {"required": True} if name.endswith("*") else {}
        schema = {"type": "string"}
        given.append({"in": "query", "name": name.rstrip("*"), **must, "schema": schema})
    if route.endpoint is not None:
        given += (
            {"in": "header", "name": wire.header_name(name), "description": text, "schema": schema}
            for name, (schema, text) in HEADERS.items()
        )
    return given


def _body(route: Route[Any]) -> _Json | None:
    """Return the schema of the body, ``None`` if it has none."""
    if route.path == "/workers" and route.method == "POST":
        properties = {name: {"type": "string"} for name in ("url", "name", "model")}
        return {"type": "object", "required": ["url"], "properties": properties}
    if route.topic is not Topic.CALLS or route.query:
        return None
    known: _Json = {"model": {"type": "string"}}
    if route.endpoint is not None:
        known["stream"] = {"type": "boolean"}
        for name in route.endpoint.limit_fields:
            known[name] = {"type": "integer", "minimum": 1}
    return {"type": "object", "properties": known}


class Pages:
    """Handlers of what the router says of itself.

    Attributes:
        ui: handlers of the page for people.
        demand: how many engines there should be.
    """

    def __init__(self, context: Context, routes: Iterable[Route[Any]], processes: int = 1) -> None:
        self._context = context
        self._routes = routes
        self.ui = UiPage(context)
        self.demand = DemandCollector(context, processes)
        context.metrics.add(self.demand)

    async def root(self, request: Request) -> web.StreamResponse:
        """Lead whoever opens the router's address in a browser to its page."""
        return web.Response(status=302, headers={"Location": PAGE_PATH})

    async def liveness(self, request: Request) -> web.StreamResponse:
        """Say that the process runs."""
        return web.Response()

    async def readiness(self, request: Request) -> web.StreamResponse:
        """Say whether a call that comes now would be served: 200 or 503."""
        return web.Response(status=200 if self._context.ready else 503)

    async def version(self, request: Request) -> web.StreamResponse:
        """Say which version this is."""
        return json_response({"version": __version__, "router": "hexgen-vllm"})

    async def models(self, request: Request) -> web.StreamResponse:
        """List the models of all engines."""
        return json_response({"object": "list", "data": self._context.fleet.cards()})

    async def load(self, request: Request) -> web.StreamResponse:
        """Say how many calls are open, as vLLM does."""
        return json_response({"server_load": self._context.ledger.open})

    async def metrics(self, request: Request) -> web.StreamResponse:
        """Show the metrics."""
        body = self._context.metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> web.StreamResponse:
        """Describe the routes."""
        return json_response(openapi_document(self._routes))

    async def workers(self, request: Request) -> web.StreamResponse:
        """List the engines by name."""
        context = self._context
        engines = [worker_view(context, engine) for engine in context.fleet.engines.values()]
        return json_response({"workers": engines, "total": len(engines)})

    async def diagnostics(self, request: Request) -> web.StreamResponse:
        """Show what decisions stand on: rates, loads, learned stages, and the last decisions."""
        coordinator, replicas = self._context.service.coordinator, self._context.replicas
        return json_response(
            {
                "policy": coordinator.options.policy,
                "options": asdict(coordinator.options),
                "held": coordinator.held,
                "discovery": self._context.discovery.view(),
                "replicas": None if replicas is None else replicas.view(),
                "open_workflows": len(coordinator.workflows),
                "stages": coordinator.workflows.shapes.known_stages(),
                **Overview(self._context).measured(_DECISIONS_SHOWN),
            }
        )

    async def tuning(self, request: Request) -> web.StreamResponse:
        """Show what tuning did, suggests, and stands on; times are ages in seconds."""
        tuning = self._context.tuning
        if tuning is None:
            return json_response({"mode": "off"})
        return json_response(tuning.tuner.state(self._context.clock.now()))

    async def recent(self, request: Request) -> web.StreamResponse:
        """Return recent workflows, lengths and timings only, for ``hexgen-vllm tune --trace``.

        Raises:
            BadRequest: nothing is recorded.
        """
        tuning = self._context.tuning
        if tuning is None:
            raise BadRequest("Workflows are recorded with --tune suggest or auto.", status=404)
        text = await asyncio.to_thread(tuning.recent.text)
        return web.Response(text=text, content_type="application/x-ndjson")

    async def engines_measured(self, request: Request) -> web.StreamResponse:
        """Return the engines as a fleet file, for ``hexgen-vllm tune --fleet`` and ``sim``.

        Raises:
            BadRequest: one has not been measured yet.
        """
        try:
            text = fleet_text(list(self._context.service.coordinator.engines.values()))
        except SearchFailed as error:
            raise BadRequest(f"{str(error).capitalize()}.", status=404) from None
        return web.Response(text=text, content_type="application/yaml")

    async def scaling(self, request: Request) -> web.StreamResponse:
        """Say how many engines there should be."""
        return json_response(self.demand.view())

    async def explain(self, request: Request) -> web.StreamResponse:
        """Say where the time of the workflow went that the query names.

        Raises:
            BadRequest: nothing is known of it.
        """
        session_id = request.query.get("session_id", "")
        if not session_id:
            raise BadRequest("session_id must name a workflow.", param="session_id")
        client = request.client
        own_id = client.own_id(client.acts_for(self._context.intake.tenant(request.names)),
                               as_id(session_id))  # fmt: skip
        workflows = self._context.service.coordinator.workflows
        for name in (own_id, session_id) if client.sees_all else (own_id,):
            account = self._context.metrics.accounts.of(name, workflows.get(name))
            if account is not None:
                return json_response(account.view())
        text = "Nothing is known of such a workflow: it never came, or ended long ago."
        raise BadRequest(text, param="session_id", status=404, code="workflow_not_found")

    async def finish_session(self, request: Request) -> web.StreamResponse:
        """End the workflow that the query names, by vllm-router's convention.

        Of the tenant whose key is shown, or that the headers name where the key may act for it.
        """
        session_id = request.query.get("session_id", "")
        if not session_id:
            raise BadRequest("session_id must name a session.", param="session_id")
        client = request.client
        tenant = client.acts_for(self._context.intake.tenant(request.names))
        name = client.own_id(tenant, as_id(session_id))
        known = self._context.service.coordinator.workflows.get(name) is not None
        self._context.service.workflow_finished(name)
        return json_response({"session_id": session_id, "finished": known})
