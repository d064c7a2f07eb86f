"""The router here, its engines where Ray puts them, kept together until they are stopped."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.cluster.processes import wait_healthy
from hexgen_vllm.cluster.ray import nodes as demand
from hexgen_vllm.cluster.ray.autoscale import Autoscale
from hexgen_vllm.cluster.ray.engines import EngineGroup, Replica
from hexgen_vllm.cluster.ray.nodes import Library
from hexgen_vllm.cluster.ray.router import RayRouter, Roster, RouterClient, Unlisted
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry
from hexgen_vllm.cluster.supervisor import Running
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.tasks import together

_LOOK_S: Final = 0.2
_NODES_S: Final = 1.0


class RayCluster(Running):
    """The same as :class:`~hexgen_vllm.cluster.supervisor.Cluster`, with engines placed by Ray.

    Made in the main thread, outside of an event loop if signals are to be handled there: joining
    a Ray cluster sets a handler of SIGTERM.

    Args:
        spec: what to start.
        clock: tells how long things last; the system's by default.
        report: gets one line for each thing that happens.

    Raises:
        ConfigError: no engine or no router of ``spec`` could be kept, Ray is not installed, or its
            cluster cannot be joined or started.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        clock: Clock | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        _check(spec)
        self.spec = spec
        self.log_dir = Path(spec.log_dir or tempfile.mkdtemp(prefix="hexgen-cluster-")).absolute()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._clock, self._report = clock or SystemClock(), report
        self._options = spec.ray_options
        self._library = Library(self._options)
        self._session: aiohttp.ClientSession | None = None
        self._router: RayRouter | None = None
        self._roster: Roster | Unlisted = Unlisted()
        self._groups: list[EngineGroup] = []
        self._jobs: list[asyncio.Task[None]] = []

    @property
    def router_url(self) -> str:
        """Base URL of the router.

        Raises:
            ConfigError: there is none.
        """
        if self._router is None:
            raise ConfigError("router is not running in this cluster.")
        return self._router.url

    @property
    def engine_urls(self) -> dict[str, str]:
        """Base URLs of the engines that serve, by name."""
        static = [(entry.name, entry.url) for entry in self.spec.engines]
        placed = [(r.name, r.url) for group in self._groups for r in group.replicas.values()]
        return {name: url for name, url in (*placed, *static) if url is not None}

    def summary(self) -> str:
        """Return what serves where, in one line."""
        router = "no router" if self._router is None else f"router {self._router.url}"
        engines = ", ".join(f"{name} {url}" for name, url in self.engine_urls.items())
        return f"{router}; engines {engines}; logs {self.log_dir}; Ray {self._library.address}"

    async def start(self) -> None:
        """Start the fewest engines and the router; return when the router has all of them.

        Raises:
            ConfigError: no node can ever hold one of the engines.
            ProcessFailed: an engine or the router died, or was not healthy in time.
        """
        await self._find_nodes()
        self._session = aiohttp.ClientSession()
        client = await self._start_router(self._session)
        placed = [entry for entry in self.spec.engines if entry.url is None]
        self._groups = [
            EngineGroup(entry, partial(self._replica, entry), self._roster, self._report)
            for entry in placed
        ]
        for group in self._groups:
            group.resize(group.entry.placement.min_replicas, lambda name: 0)
        waits = [_done(r.ready) for group in self._groups for r in group.staying]
        others = [self._healthy(entry) for entry in self.spec.engines if entry.url is not None]
        await together([*waits, *others])
        while not self._roster.settled:
            await asyncio.sleep(_LOOK_S)
        if client is not None and self._options.autoscale and self._bounds_differ():
            if len({group.entry.model for group in self._groups}) > 1:
                self._report(
                    "scaling takes all engines for alike, but their models differ: set autoscale "
                    "to false, or run a router for each model"
                )
            scaling = Autoscale(self._groups, client, self._options, self._clock, self._report)
            self._job(scaling.keep())

    async def _find_nodes(self) -> None:
        """Wait, as long as the file says, until each entry has a node that can hold its engine."""
        until_s, said = self._clock.now() + self._options.wait_for_nodes_s, ("", "")
        while problem := self._unplaceable():
            if self._clock.now() >= until_s:
                raise ConfigError(f"engine {problem[0]} cannot be placed: {problem[1]}.")
            if problem != said:
                self._report(f"engine {problem[0]}: waiting for a node: {problem[1]}")
                said = problem
            await asyncio.sleep(_NODES_S)

    def _unplaceable(self) -> tuple[str, str] | None:
        """Return the name of an entry that no node can hold, and why."""
        nodes = self._library.nodes()
        for entry in self.spec.engines:
            lacking = None if entry.url is not None else demand.unmet(entry.placement, nodes)
            if lacking is not None:
                return entry.name, lacking
        return None

    async def _start_router(self, session: aiohttp.ClientSession) -> RouterClient | None:
        if self.spec.router is None:
            return None
        self._router = RayRouter(
            self.spec.router, self.spec, self.log_dir, clock=self._clock, report=self._report
        )
        await self._router.start(session)
        client = RouterClient(session, self._router.url, self._router.key)
        self._roster = roster = Roster(client, self._report)
        self._job(self._router.keep(session))
        self._job(roster.keep())
        return client

    def _replica(self, entry: EngineEntry, name: str) -> Replica:
        return Replica(
            name,
            entry,
            self.spec,
            self._library,
            self._roster,
            clock=self._clock,
            log_dir=str(self.log_dir),
            report=self._report,
        )

    async def _healthy(self, entry: EngineEntry) -> None:
        assert self._session is not None
        assert entry.url is not None
        url = entry.url.rstrip("/")
        await wait_healthy(self._session, entry.name, url, self.spec.start_timeout_s, None)

    def _bounds_differ(self) -> bool:
        placements = [group.entry.placement for group in self._groups]
        return any(placement.most > placement.min_replicas for placement in placements)

    def _job(self, job: Coroutine[Any, Any, None]) -> None:
        self._jobs.append(asyncio.ensure_future(job))

    async def watch(self) -> None:
        """Run until cancelled: what dies is started again, here by us and on the nodes by Ray."""
        await asyncio.gather(*self._jobs, asyncio.Event().wait())

    async def stop(self) -> None:
        """Stop the router, then all engines at once, and leave Ray. May be called again."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        try:
            if self._router is not None:
                await self._router.stop()
            await asyncio.gather(*(group.stop() for group in self._groups))
        finally:
            if self._session is not None:
                await self._session.close()
                self._session = None
            self._library.close()

    def kill(self) -> None:
        """Kill everything at once, for those who cannot wait for :meth:`stop`."""
        if self._router is not None:
            self._router.kill()
        for group in self._groups:
            for replica in group.replicas.values():
                replica.kill()


def _check(spec: ClusterSpec) -> None:
    if all(entry.url is None and not entry.placement.min_replicas for entry in spec.engines):
        raise ConfigError("min_replicas must be above 0 for at least one engine.")
    given = {} if spec.router is None else spec.router.options
    if any(name.replace("-", "_") == "router_workers" and n > 1 for name, n in given.items()):
        raise ConfigError(
            "router_workers must be 1 with backend ray: engines come and go, and one process is "
            "told of it."
        )


async def _done(future: asyncio.Future[None]) -> None:
    await asyncio.shield(future)
