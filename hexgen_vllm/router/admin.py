"""Endpoints that change which engines there are. The keys they need are checked before.

    POST /workers {"url", "name"?, "model"?}  look at an engine and take it in  201 400 403 409
    POST /workers/{name}/drain                give it no new calls              200 404
    POST /workers/{name}/undrain              give it calls again               200 404
    DELETE /workers/{name}                    drain it, forget it when idle     200 202 404
    DELETE /workers/{name}?force=true         forget it now; its calls go elsewhere, or fail
    POST /add_worker?url=, POST /remove_worker?url=, GET /list_workers          as vllm-router

What was registered is not remembered across a restart of the router: engines, or what starts
them, register again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from yarl import URL

from hexgen_vllm.errors import BadRequest, ConfigError
from hexgen_vllm.router.addresses import AllowedHosts
from hexgen_vllm.router.calls.intake import fields
from hexgen_vllm.router.context import Context, read_body
from hexgen_vllm.router.engines.fleet import Engine
from hexgen_vllm.router.engines.probe import Found, Unreachable
from hexgen_vllm.router.http.messages import json_response
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.options import Worker, parse_worker
from hexgen_vllm.router.status.overview import worker_view

_FIELDS: Final = frozenset(("url", "name", "model", "model_id"))
_LOG = logging.getLogger(__name__)


class Admin:
    """Handlers of the admin endpoints."""

    def __init__(self, context: Context) -> None:
        self._context = context
        urls = [engine.worker.url for engine in context.fleet.engines.values()]
        self._hosts = AllowedHosts(context.options.worker_allowed_hosts, urls)
        self._numbers = itertools.count(len(urls))

    async def register(self, request: Request) -> web.StreamResponse:
        """Take in the engine that the body describes."""
        said = _texts(await fields(await read_body(request)))
        engine = await self._add(said, request)
        return json_response(worker_view(self._context, engine), 201)

    async def add_worker(self, request: Request) -> web.StreamResponse:
        """Take in the engine that the query names, by vllm-router's convention."""
        engine = await self._add(_texts(dict(request.query)), request)
        return json_response(worker_view(self._context, engine))

    async def remove_worker(self, request: Request) -> web.StreamResponse:
        """Drain and forget the engine whose URL the query names."""
        url = request.query.get("url", "")
        for engine in self._context.fleet.engines.values():
            if _same(engine.worker.url, url):
                return self._removed(engine, request)
        raise BadRequest("url must be that of an engine.", param="url", status=404)

    async def list_workers(self, request: Request) -> web.StreamResponse:
        """List the engines' URLs, by vllm-router's convention."""
        engines = self._context.fleet.engines.values()
        return json_response({"urls": [engine.worker.url for engine in engines]})

    async def drain(self, request: Request) -> web.StreamResponse:
        """Give the engine no new calls."""
        return self._drained(request, True)

    async def undrain(self, request: Request) -> web.StreamResponse:
        """Give the engine calls again; also one that was to be forgotten."""
        return self._drained(request, False)

    async def remove(self, request: Request) -> web.StreamResponse:
        """Drain and forget the engine, or forget it now."""
        return self._removed(self._named(request), request)

    def _drained(self, request: Request, draining: bool) -> web.StreamResponse:
        engine = self._named(request)
        self._context.fleet.drain(engine.name, draining)
        return json_response(worker_view(self._context, engine))

    def _removed(self, engine: Engine, request: Request) -> web.StreamResponse:
        context, forced = self._context, request.query.get("force", "").lower() in ("true", "1")
        _LOG.info("removal engine=%s forced=%s by=%s", engine.name, forced, request.remote)
        context.watchers.retire(engine.name, "removed by an operator")
        if forced and engine.name in context.fleet.engines:
            context.watchers.remove(engine.name)
        gone = engine.name not in context.fleet.engines
        return json_response(
            {**worker_view(context, engine), "removed": gone}, 200 if gone else 202
        )

    def _named(self, request: Request) -> Engine:
        engine = self._context.fleet.engines.get(request.params["name"])
        if engine is None:
            raise BadRequest("There is no such engine.", status=404, code="worker_not_found")
        return engine

    async def _add(self, said: Mapping[str, str], request: Request) -> Engine:
        worker = self._worker(said)
        self._check_new(worker)
        found = await self._look(worker)
        model = said.get("model", said.get("model_id"))
        if model is not None and found.spec.models and model not in found.spec.models:
            raise BadRequest("The engine does not serve this model.", param="model")
        self._check_new(worker)  # others may have come while it was looked at
        self._context.watchers.add(worker, found)
        _LOG.info("registration engine=%s url=%s by=%s", worker.name, worker.url, request.remote)
        return self._context.fleet.engines[worker.name]

    def _worker(self, said: Mapping[str, str]) -> Worker:
        url = said.get("url", "")
        try:
            worker = parse_worker(url if "name" not in said else f"{said['name']}={url}", "")
            inside = "@" in URL(worker.url).raw_authority
        except (ConfigError, ValueError):
            text = "url must be like http://host:8000, and name like engine-7."
            raise BadRequest(text, param="url", code="invalid_worker") from None
        if inside or not self._hosts.allow(worker.url):
            text = "Engines may not be registered on this host; see --worker-allowed-hosts."
            raise BadRequest(text, param="url", status=403, code="host_not_allowed")
        return worker if worker.name else worker._replace(name=self._free_name())

    def _free_name(self) -> str:
        engines = self._context.fleet.engines
        return next(n for i in self._numbers if (n := f"engine-{i}") not in engines)

    def _check_new(self, worker: Worker) -> None:
        for engine in self._context.fleet.engines.values():
            if engine.name == worker.name or _same(engine.worker.url, worker.url):
                text = f"The router has engine {engine.name!r} by this name or URL already."
                raise BadRequest(text, status=409, code="worker_exists")

    async def _look(self, worker: Worker) -> Found:
        probe = self._context.watchers.probe
        try:
            await probe.healthy(worker)
            return await probe.find(worker)
        except Unreachable as why:
            text = f"No engine was taken in: {why}."
            raise BadRequest(text, param="url", code="worker_unreachable") from None


def _texts(said: Mapping[str, Any]) -> Mapping[str, str]:
    for name, value in said.items():
        if name not in _FIELDS:
            raise BadRequest(f"unknown field {name[:100]!r}.", param=name[:100])
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be text.", param=name)
    return said


def _same(one: str, other: str) -> bool:
    try:
        return URL(one.rstrip("/")) == URL(other.rstrip("/"))
    except ValueError:
        return False
