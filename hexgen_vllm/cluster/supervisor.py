"""Starts, watches and stops the processes of a cluster."""

from __future__ import annotations

import asyncio
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp

from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.cluster import commands
from hexgen_vllm.cluster.processes import Process, keep, wait_healthy
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry, RouterEntry
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports
from hexgen_vllm.tasks import together

ROUTER_EXIT_S: Final = 3.0
"""What a router gets on top of the grace, all of which it gives to calls in flight."""
RunningT = TypeVar("RunningT", bound="Running")


class Running(ABC):
    """A cluster that can be started and stopped; an async context manager that does both."""

    @abstractmethod
    def summary(self) -> str:
        """Return what serves where, in one line."""

    @abstractmethod
    async def start(self) -> None:
        """Start everything; whoever called stops it, also when this fails half-way."""

    @abstractmethod
    async def watch(self) -> None:
        """Run until something that is not started again dies."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop everything. May be called again."""

    @abstractmethod
    def kill(self) -> None:
        """Kill everything at once, for those who cannot wait for :meth:`stop`."""

    async def __aenter__(self: RunningT) -> RunningT:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class Cluster(Running):
    """The processes of one :class:`ClusterSpec`, as an async context manager.

    Entering it starts all engines at once, waits until they are healthy, then starts the router;
    leaving it stops everything. Nothing is started again unless :meth:`watch` runs.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        clock: Clock | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare a cluster of ``spec``.

        Args:
            spec: what to start.
            clock: tells how long a process lived; the system's by default.
            report: gets one line for each thing that happens.
        """
        self.spec = spec
        self._clock = clock or SystemClock()
        self._report = report
        self._engines: list[Process] = []
        self._urls: list[str] = []
        self._router: Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._log_dir: Path | None = None

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """Base URLs of the engines, in the order of the spec."""
        return tuple(self._urls)

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
    def log_dir(self) -> Path:
        """Directory of the logs, one file per process."""
        if self._log_dir is None:
            given = self.spec.log_dir
            self._log_dir = Path(given or tempfile.mkdtemp(prefix="hexgen-cluster-"))
            self._log_dir.mkdir(parents=True, exist_ok=True)
        return self._log_dir

    @property
    def processes(self) -> tuple[Process, ...]:
        """What was started, engines first."""
        return (*self._engines, *([] if self._router is None else [self._router]))

    def summary(self) -> str:
        """Return what serves where, in one line."""
        router = "no router" if self._router is None else f"router {self._router.url}"
        named = zip(self.spec.engines, self._urls, strict=True)
        engines = ", ".join(f"{entry.name} {url}" for entry, url in named)
        return f"{router}; engines {engines}; logs {self.log_dir}"

    async def start(self) -> None:
        """Start the engines, then the router.

        Raises:
            ProcessFailed: one died, or was not healthy in time.
        """
        self._session = aiohttp.ClientSession()
        waits = [self._start_engine(entry) for entry in self.spec.engines]
        await together(waits)
        if self.spec.router is not None:
            await self.replace_router(self.spec.router)

    def _start_engine(self, entry: EngineEntry) -> Coroutine[Any, Any, None]:
        if entry.url is not None:
            url = entry.url.rstrip("/")
            self._urls.append(url)
            return self._healthy(entry.name, url, None)
        port = entry.port or free_ports(entry.host, 1)[0]
        command = commands.engine_command(entry, port)
        env = commands.engine_env(entry)
        process = self._process(f"engine {entry.name}", entry.host, port, command, env)
        self._engines.append(process)
        self._urls.append(process.url)
        return self._bring_up(process)

    async def replace_router(self, entry: RouterEntry) -> None:
        """Start the router of ``entry`` in place of the one that runs, over the same engines.

        Raises:
            ProcessFailed: it died, or was not healthy in time.
        """
        await self._stop_router()
        port = entry.port or free_ports(entry.host, 1)[0]
        engines = list(zip(self.spec.engines, self._urls, strict=True))
        command = commands.router_command(entry, port, engines, self.spec.stop_grace_s)
        self._router = self._process("router", entry.host, port, command, {})
        await self._bring_up(self._router)

    def _process(
        self, name: str, host: str, port: int, command: list[str], env: dict[str, str]
    ) -> Process:
        log = self.log_dir / f"{name.removeprefix('engine ')}.log"
        return Process(name, base_url(host, port), command, env, log)

    async def _bring_up(self, process: Process) -> None:
        self._report(f"{process.name}: starting at {process.url}, log {process.log}")
        await process.start()
        await self._healthy(process.name, process.url, process)

    async def _healthy(self, name: str, url: str, process: Process | None) -> None:
        assert self._session is not None
        await wait_healthy(self._session, name, url, self.spec.start_timeout_s, process)
        self._report(f"{name}: healthy")

    async def watch(self) -> None:
        """Run until a process dies; with ``restart`` start it again, and run until cancelled.

        Raises:
            ProcessFailed: a process died and is not to be started again.
        """
        if not self.processes:  # only servers of others: there is nobody to watch
            await asyncio.Event().wait()
        await together(self._keep(process) for process in self.processes)

    async def _keep(self, process: Process) -> None:
        if self.spec.restart:
            start = partial(self._bring_up, process)
            await keep(process, start, self.spec, clock=self._clock, report=self._report)
        code = await process.wait()
        process.kill()  # what a crashed server left in its session
        raise process.failed(f"died with exit code {code}")

    async def stop(self) -> None:
        """Stop the router, then all engines at once. May be called again."""
        await self._stop_router()
        grace_s = self.spec.stop_grace_s
        await asyncio.gather(*(engine.stop(grace_s) for engine in self._engines))
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _stop_router(self) -> None:
        if self._router is not None:
            await self._router.stop(self.spec.stop_grace_s + ROUTER_EXIT_S)

    def kill(self) -> None:
        """Kill everything at once, for those who cannot wait for :meth:`stop`."""
        for process in self.processes:
            process.kill()


def base_url(host: str, port: int) -> str:
    """Return the URL of a server that listens on ``host``; one that listens on all is local."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
