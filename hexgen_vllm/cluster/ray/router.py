"""The router in front of engines that come and go: a process beside the supervisor.

It is told which engines there are through its admin endpoints, again and again until it knows.

Engines come and go, and so may the router, which remembers nothing of what was registered before
it died. So the roster is compared with what the router says it has, and only differences are told.

    serving   registered; one that serves at a new address takes the place of the old one
    lost      drained, not removed: its model stays known, and calls for it get an honest 503
    leaving   removed, which drains it; gone once its calls have ended, or itself is lost

What an operator drained is not undone: only those drained here get calls again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from hexgen_vllm.clock import Clock
from hexgen_vllm.cluster import commands
from hexgen_vllm.cluster.processes import Process, keep, wait_healthy
from hexgen_vllm.cluster.spec import ClusterSpec, RouterEntry
from hexgen_vllm.cluster.supervisor import ROUTER_EXIT_S, base_url
from hexgen_vllm.ports import free_ports
from hexgen_vllm.tasks import woken

_TIMEOUT: Final = aiohttp.ClientTimeout(total=20.0)
_GONE: Final = 404
INTERVAL_S: Final = 0.5
_TAKES_CALLS: Final = ("ready", "trial")
_VARIABLE: Final = "HEXGEN_ROUTER_ADMIN_API_KEY"
_ANY_ADDRESS: Final = ("0.0.0.0/0", "::/0")


class RouterAway(Exception):  # noqa: N818 - named after what happened
    """The router did not answer, or not with success; ``str()`` says what it said."""


class RouterClient:
    """Asks and tells the router at ``url``, with its admin key."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session, self._url = session, url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def workers(self) -> dict[str, Mapping[str, Any]]:
        """Return the engines that the router knows, by name."""
        found = await self._ask("GET", "/workers")
        return {worker["name"]: worker for worker in found["workers"]}

    async def overview(self) -> Mapping[str, Any]:
        """Return what the router's page shows."""
        return dict(await self._ask("GET", "/ui/data"))

    async def diagnostics(self) -> Mapping[str, Any]:
        """Return what its decisions stand on."""
        return dict(await self._ask("GET", "/scheduling/diagnostics"))

    async def add(self, name: str, url: str) -> None:
        """Register an engine."""
        await self._ask("POST", "/workers", json={"name": name, "url": url})

    async def drain(self, name: str) -> None:
        """Let an engine get no new calls."""
        await self._ask("POST", f"/workers/{name}/drain")

    async def undrain(self, name: str) -> None:
        """Let an engine get calls again."""
        await self._ask("POST", f"/workers/{name}/undrain")

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Have an engine forgotten when its calls have ended, or, with ``force``, now."""
        await self._ask("DELETE", f"/workers/{name}" + "?force=true" * force)

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        """Return the decoded answer; that there is no such engine is no error.

        Raises:
            RouterAway: there was none, or it was another error.
        """
        try:
            async with self._session.request(
                method, self._url + path, headers=self._headers, timeout=_TIMEOUT, **more
            ) as answer:
                said = await answer.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise RouterAway(f"the router does not answer: {error}") from None
        if answer.status >= 400 and answer.status != _GONE:
            raise RouterAway(str(said["error"]["message"]))
        return said


_Workers = Mapping[str, Mapping[str, Any]]


class Unlisted:
    """A roster for nobody: there is no router."""

    settled: Final = True

    def serving(self, name: str, url: str) -> None:
        """Do nothing."""

    def lost(self, name: str) -> None:
        """Do nothing."""

    async def leave(self, name: str) -> None:
        """Return at once: nobody knows whether calls are open."""

    def stay(self, name: str, url: str) -> None:
        """Do nothing."""


class Roster:
    """The engines as they should stand in the router's list.

    Args:
        router: the router.
        report: gets a line when the router refuses something.
    """

    def __init__(self, router: RouterClient, report: Callable[[str], None]) -> None:
        self._router, self._report = router, report
        self._urls: dict[str, str] = {}  # of those that serve
        self._lost: set[str] = set()
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._told: dict[str, str] = {}  # where the router believes them
        self._drained: set[str] = set()  # by us
        self._dismissed: set[str] = set()  # the router has been told that they leave
        self._changed = asyncio.Event()
        self._refusals: dict[str, str] = {}

    def serving(self, name: str, url: str) -> None:
        """Have the router give calls to an engine, unless it is leaving."""
        if name in self._leaving:
            return
        self._urls[name] = url
        self._lost.discard(name)
        self._changed.set()

    def lost(self, name: str) -> None:
        """Have the router give no calls to an engine that is gone for now."""
        if name in self._leaving:
            return
        self._urls.pop(name, None)
        self._lost.add(name)
        self._changed.set()

    async def leave(self, name: str) -> None:
        """Return when the router has forgotten an engine: none of its calls is open."""
        self._urls.pop(name, None)
        self._lost.discard(name)
        gone = self._leaving.setdefault(name, asyncio.get_running_loop().create_future())
        self._changed.set()
        await gone

    def stay(self, name: str, url: str) -> None:
        """Have an engine stay that was to leave; it may be forgotten already."""
        self._leaving.pop(name, None)
        self._dismissed.discard(name)
        self._drained.add(name)  # as far as we know
        self.serving(name, url)

    @property
    def settled(self) -> bool:
        """Whether the router knows every engine that serves."""
        return self._urls.items() <= self._told.items()

    async def keep(self) -> None:
        """Keep the router informed until cancelled."""
        while True:
            with contextlib.suppress(RouterAway):
                await self.compare()
            await woken(self._changed, INTERVAL_S)

    async def compare(self) -> None:
        """Tell the router what it has wrong.

        Raises:
            RouterAway: it does not say what it has.
        """
        leaving = dict(self._leaving)  # one that leaves later is not judged by this answer
        there = await self._router.workers()
        for name, url in list(self._urls.items()):
            if self._urls.get(name) == url:
                await self._tell(name, self._should_serve(name, url, there))
        for name in self._lost & there.keys() - self._drained:
            if there[name]["state"] != "draining":
                await self._tell(name, self._drain(name))
        for name, gone in leaving.items():
            await self._see_off(name, gone, there)

    async def _should_serve(self, name: str, url: str, there: _Workers) -> None:
        if name in there and self._told.get(name) == url:
            if name in self._drained:
                await self._router.undrain(name)
                self._drained.discard(name)
            return
        at_this_url = {n for n in self._lost if self._told.get(n) == url}
        for old in (at_this_url | {name}) & there.keys():
            await self._router.remove(old, force=True)
        await self._router.add(name, url)
        self._drained.discard(name)
        if self._urls.get(name) == url:
            self._told[name] = url

    async def _drain(self, name: str) -> None:
        await self._router.drain(name)
        self._drained.add(name)

    async def _see_off(self, name: str, gone: asyncio.Future[None], there: _Workers) -> None:
        if self._leaving.get(name) is not gone:  # it stays after all
            return
        if name in there:
            if name not in self._dismissed or there[name]["state"] in _TAKES_CALLS:
                await self._tell(name, self._dismiss(name))
            return
        del self._leaving[name]
        self._told.pop(name, None)
        self._drained.discard(name)
        self._dismissed.discard(name)
        if not gone.done():
            gone.set_result(None)

    async def _dismiss(self, name: str) -> None:
        await self._router.remove(name)
        self._dismissed.add(name)

    async def _tell(self, name: str, telling: Any) -> None:
        """Await ``telling``; a refusal is reported once, and tried again next time."""
        try:
            await telling
            self._refusals.pop(name, None)
        except RouterAway as why:
            if self._refusals.get(name) != str(why):
                self._refusals[name] = str(why)
                self._report(f"engine {name}: the router says: {why}")


_Options = Mapping[str, Any]


class RayRouter:
    """The router of a cluster file.

    Attributes:
        key: its admin key, that of the file or environment if there is one.
    """

    def __init__(
        self,
        entry: RouterEntry,
        spec: ClusterSpec,
        log_dir: Path,
        *,
        clock: Clock,
        report: Callable[[str], None],
    ) -> None:
        given = {name.replace("-", "_"): value for name, value in entry.options.items()}
        self.key = admin_key(given, os.environ)
        self._spec, self._clock, self._report = spec, clock, report
        port = entry.port or free_ports(entry.host, 1)[0]
        static = [(e, e.url.rstrip("/")) for e in spec.engines if e.url is not None]
        known = {"worker_allowed_hosts": _ANY_ADDRESS, **commands.stock_scheduling(spec.engines)}
        entry = replace(entry, options={**known, **given})
        self._process = Process(
            "router",
            base_url(entry.host, port),
            commands.router_command(entry, port, static, spec.stop_grace_s),
            {_VARIABLE: self.key},
            log_dir / "router.log",
        )

    @property
    def url(self) -> str:
        """Its base URL."""
        return self._process.url

    async def start(self, session: aiohttp.ClientSession) -> None:
        """Start it, and wait until it answers; it need not have engines by then.

        Raises:
            ProcessFailed: it died, or did not answer in time.
        """
        process = self._process
        self._report(f"router: starting at {process.url}, log {process.log}")
        await process.start()
        timeout_s = self._spec.start_timeout_s
        await wait_healthy(session, process.name, process.url, timeout_s, process, path="/liveness")
        self._report("router: up")

    async def keep(self, session: aiohttp.ClientSession) -> None:
        """Start it again whenever it dies, until cancelled."""
        start = partial(self.start, session)
        await keep(self._process, start, self._spec, clock=self._clock, report=self._report)

    async def stop(self) -> None:
        """Stop it; calls in flight have the file's ``stop_grace_s`` to end."""
        await self._process.stop(self._spec.stop_grace_s + ROUTER_EXIT_S)

    def kill(self) -> None:
        """Kill it at once."""
        self._process.kill()


def admin_key(options: _Options, environment: Mapping[str, str]) -> str:
    """Return the router's admin key: that of its options, of the environment, or a new one."""
    given = options.get("admin_api_key") or environment.get(_VARIABLE)
    if isinstance(given, list | tuple):
        given = given[0]
    return str(given) if given else secrets.token_urlsafe(32)
