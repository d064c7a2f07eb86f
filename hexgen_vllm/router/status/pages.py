"""The endpoints that ask about the router and its engines, and those that no policy sees."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any, Final

from aiohttp import web

from hexgen_vllm import __version__
from hexgen_vllm.errors import BadRequest
from hexgen_vllm.router import openapi
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.conventions import as_id
from hexgen_vllm.router.fleet import Engine
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.metrics import CONTENT_TYPE
from hexgen_vllm.router.overview import decision
from hexgen_vllm.router.tuning import SearchFailed, fleet_text
from hexgen_vllm.router.ui_page import PATH, UiPage
from hexgen_vllm.router.workers import target_view, worker_view

_DECISIONS_SHOWN: Final = 50


class Pages:
    """Handlers of what the router says of itself.

    Attributes:
        ui: handlers of the page for people.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.ui = UiPage(context)

    async def root(self, request: Request) -> web.StreamResponse:
        """Lead whoever opens the router's address in a browser to its page."""
        return web.Response(status=302, headers={"Location": PATH})

    async def liveness(self, request: Request) -> web.StreamResponse:
        """Say that the process runs."""
        return web.Response()

    async def readiness(self, request: Request) -> web.StreamResponse:
        """Say whether a call that comes now would be served: 200 or 503."""
        return web.Response(status=200 if self._context.ready else 503)

    async def version(self, request: Request) -> web.StreamResponse:
        """Say which version this is."""
        return _json({"version": __version__, "router": "hexgen-vllm"})

    async def models(self, request: Request) -> web.StreamResponse:
        """List the models of all engines."""
        return _json({"object": "list", "data": self._context.fleet.cards()})

    async def load(self, request: Request) -> web.StreamResponse:
        """Say how many calls are open, as vLLM does."""
        return _json({"server_load": self._context.ledger.open})

    async def metrics(self, request: Request) -> web.StreamResponse:
        """Show the metrics."""
        body = self._context.metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> web.StreamResponse:
        """Describe the routes."""
        return _json(openapi.document())

    async def workers(self, request: Request) -> web.StreamResponse:
        """List the engines by name."""
        context = self._context
        engines = [worker_view(context, engine) for engine in context.fleet.engines.values()]
        return _json({"workers": engines, "total": len(engines)})

    async def diagnostics(self, request: Request) -> web.StreamResponse:
        """Show what decisions stand on: rates, loads, learned stages, and the last decisions."""
        coordinator, now = self._context.service.coordinator, self._context.clock.now()
        recent = list(coordinator.log)[-_DECISIONS_SHOWN:]
        return _json(
            {
                "policy": coordinator.options.policy,
                "options": asdict(coordinator.options),
                "held": coordinator.held,
                "discovery": self._context.discovery.view(),
                "open_workflows": len(coordinator.workflows),
                "engines": [
                    self._rates(engine, target)
                    for engine in self._context.fleet.engines.values()
                    for target in engine.targets
                ],
                "stages": coordinator.workflows.shapes.known_stages(),
                "decisions": [decision(at, one, now) for at, one in reversed(recent)],
            }
        )

    def _rates(self, engine: Engine, target: str) -> dict[str, Any]:
        shown = target_view(self._context, engine, target)
        load = self._context.service.coordinator.engines.get(target)
        if load is not None:
            cost = load.cost()
            measured = load.report.cost is not None
            shown["cost"] = None if cost is None else asdict(cost)
            shown["cost_from"] = "telemetry" if measured else "traffic" if cost else None
            error = load.report.fit_error if measured else load.traffic_fit.error()
            shown["fit_error"] = error
            shown["queued_prefill_tokens"] = load.queued_prefill_tokens()
            shown["outstanding_tokens"] = load.outstanding_tokens()
            report = asdict(load.report)
            shown["report"] = {k: report[k] for k in report if k not in ("cost", "fit_error")}
        return shown

    async def tuning(self, request: Request) -> web.StreamResponse:
        """Show what tuning did, suggests, and stands on; times are ages in seconds."""
        tuning = self._context.tuning
        if tuning is None:
            return _json({"mode": "off"})
        return _json(tuning.tuner.state(self._context.clock.now()))

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
        return _json({"session_id": session_id, "finished": known})


def _json(content: Any) -> web.Response:
    body = json.dumps(content).encode()
    return web.Response(body=body, content_type="application/json")
