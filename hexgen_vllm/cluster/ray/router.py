"""The router in front of engines that come and go: a process beside the supervisor."""

from __future__ import annotations

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
from hexgen_vllm.cluster.health import wait_healthy
from hexgen_vllm.cluster.keeping import keep
from hexgen_vllm.cluster.ports import free_ports
from hexgen_vllm.cluster.process import Process
from hexgen_vllm.cluster.spec import ClusterSpec, RouterEntry
from hexgen_vllm.cluster.supervisor import ROUTER_EXIT_S, base_url

_VARIABLE: Final = "HEXGEN_ROUTER_ADMIN_API_KEY"
_ANY_ADDRESS: Final = ("0.0.0.0/0", "::/0")
_Options = Mapping[str, Any]


class RouterProcess:
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
