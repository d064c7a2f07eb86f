"""An API server of a cluster that knows pods: lists in pages, watches, and the ways to fail."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

LABELS = {"app": "engine"}


def pod(name: str, port: int | str | None = None, **more: Any) -> dict[str, Any]:
    """Return a pod on 127.0.0.1 that is ready, with the port of its engine as annotation."""
    notes = {} if port is None else {"hexgen-vllm/port": str(port)}
    meta = {"name": name, "namespace": "llm", "labels": LABELS, "annotations": notes}
    ready = {"type": "Ready", "status": "True"}
    status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": [ready]}
    found: dict[str, Any] = {"kind": "Pod", "metadata": meta, "status": status}
    found["metadata"] |= more.pop("metadata", {})
    found["status"] |= more.pop("status", {})
    return found | more


@dataclass
class ApiServer:
    """Keeps pods and every change of them.

    Attributes:
        pods: by name.
        events: changes, the number of each is its resource version.
        oldest: changes before this one are forgotten.
        status: what every request is refused with, 0 for none.
        token: what clients must show.
        asked: requests, by what they wanted.
        queries: of all requests.
        page: most pods in one list.
    """

    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    oldest: int = 0
    status: int = 0
    token: str = "secret"
    asked: Counter[str] = field(default_factory=Counter)
    queries: list[dict[str, str]] = field(default_factory=list)
    page: int = 2
    url: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _watches: set[web.StreamResponse] = field(default_factory=set)

    def put(self, one: dict[str, Any]) -> None:
        """Add or change a pod."""
        name = one["metadata"]["name"]
        self._note("MODIFIED" if name in self.pods else "ADDED", one)
        self.pods[name] = one

    def delete(self, name: str) -> None:
        """Let a pod be gone."""
        self._note("DELETED", self.pods.pop(name))

    def change_unseen(self) -> None:
        """End all watches, and forget every change so far."""
        self.oldest = len(self.events) + 1
        self._note("ADDED", pod("other", status={"podIP": ""}))
        self.drop()

    def drop(self) -> None:
        """Break all connections of watches."""
        for watch in tuple(self._watches):
            transport = watch._req.transport if watch._req is not None else None
            if transport is not None:
                transport.abort()

    def _note(self, what: str, one: dict[str, Any]) -> None:
        version = {"resourceVersion": str(len(self.events) + 1)}
        thing = {**one, "metadata": one["metadata"] | version}
        self.events.append((what, thing))
        self._changed.set()
        self._changed = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        watching = "watch" in request.query
        self.asked["watch" if watching else "list"] += 1
        self.queries.append({"path": request.path, **request.query})
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401}, status=401)
        if self.status:
            return web.json_response({"kind": "Status", "code": self.status}, status=self.status)
        if request.path not in ("/api/v1/namespaces/llm/pods", "/api/v1/pods"):
            return web.json_response({"kind": "Status", "code": 404}, status=404)
        return await self._watch(request) if watching else self._list(request)

    def _list(self, request: web.BaseRequest) -> web.Response:
        first = int(request.query.get("continue", 0))
        names = sorted(self.pods)
        meta: dict[str, str] = {"resourceVersion": str(len(self.events))}
        if first + self.page < len(names):
            meta["continue"] = str(first + self.page)
        items = [self.pods[name] for name in names[first : first + self.page]]
        return web.json_response({"kind": "PodList", "metadata": meta, "items": items})

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        at = int(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        self._watches.add(response)
        try:
            await asyncio.wait_for(
                self._follow(response, at), float(request.query["timeoutSeconds"])
            )
        except (asyncio.TimeoutError, ConnectionError):
            pass
        finally:
            self._watches.discard(response)
        return response

    async def _follow(self, response: web.StreamResponse, at: int) -> None:
        if at < self.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired"}
            await self._send(response, "ERROR", gone)
            return
        while True:
            at = await self._send_since(response, at)

    async def _send_since(self, response: web.StreamResponse, at: int) -> int:
        changed = self._changed
        for what, thing in self.events[at:]:
            await self._send(response, what, thing)
        now = {"metadata": {"resourceVersion": str(len(self.events))}}
        await self._send(response, "BOOKMARK", now)
        at = len(self.events)
        await changed.wait()
        return at

    async def _send(self, response: web.StreamResponse, what: str, thing: Any) -> None:
        line = json.dumps({"type": what, "object": thing}).encode() + b"\n"
        await response.write(line[:7])  # a line may come in pieces
        await response.write(line[7:])

    def kubeconfig(self, folder: Path) -> str:
        """Write a file that leads here; return its path."""
        path = folder / "kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(yaml.safe_dump(content))
        return str(path)


@asynccontextmanager
async def api_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    """Run a server on a free port of 127.0.0.1."""
    server = ApiServer()
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.drop()
        with suppress(asyncio.TimeoutError):
            await runner.cleanup()
