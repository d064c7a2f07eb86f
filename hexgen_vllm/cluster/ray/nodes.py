"""Runs on a node, in an actor that Ray places: one engine process, its health, its end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp

from hexgen_vllm.cluster import commands
from hexgen_vllm.cluster.health import wait_healthy
from hexgen_vllm.cluster.ports import free_ports
from hexgen_vllm.cluster.process import Process, ProcessFailed
from hexgen_vllm.cluster.spec import EngineEntry
from hexgen_vllm.cluster.supervisor import base_url

_EVERYWHERE: Final = ("0.0.0.0", "::", "")


class Place(NamedTuple):
    """A node: its address, and the id that Ray gave it."""

    address: str
    node_id: str


class Started(NamedTuple):
    """How the start of an engine went.

    Attributes:
        url: where it serves, as other machines reach it.
        failure: why it does not, ``""`` if it does.
    """

    url: str
    failure: str = ""


class EngineHost:
    """The actor; its methods are called from elsewhere, several at a time.

    Args:
        entry: the engine.
        name: of this one of the entry's engines; also that of its log file.
        log_dir: directory on the node.
        start_timeout_s: time the engine has to become healthy.
    """

    def __init__(self, entry: EngineEntry, name: str, log_dir: str, start_timeout_s: float) -> None:
        self._entry, self._name, self._log_dir = entry, name, Path(log_dir)
        self._start_timeout_s = start_timeout_s
        self._process: Process | None = None

    async def place(self) -> Place:
        """Return the node it is on."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return Place(ray.util.get_node_ip_address(), node_id)

    async def start(self) -> Started:
        """Start the engine unless it runs, and wait until it is healthy."""
        process = self._process
        if process is None or process.exit_code is not None:
            process = self._process = self._made((await self.place()).address)
            await process.start()
        try:
            async with aiohttp.ClientSession() as session:
                await wait_healthy(
                    session, process.name, process.url, self._start_timeout_s, process
                )
        except ProcessFailed as error:
            process.kill()
            return Started(process.url, str(error))
        return Started(process.url)

    async def wait(self) -> str:
        """Wait for the engine's end and say how it ended."""
        assert self._process is not None
        code = await self._process.wait()
        self._process.kill()  # what a crashed server left in its session
        return f"died with exit code {code}"

    async def linger(self) -> None:
        """Never return: whoever waits for it learns of the actor's end."""
        await asyncio.Event().wait()

    async def stop(self, grace_s: float) -> None:
        """End the engine: SIGTERM, ``grace_s`` seconds, then SIGKILL."""
        if self._process is not None:
            await self._process.stop(grace_s)

    async def kill(self) -> None:
        """Kill the engine at once."""
        if self._process is not None:
            self._process.kill()

    def _made(self, node: str) -> Process:
        entry = self._entry
        host, reached = listening(entry.host, node)
        port = entry.port or free_ports(host, 1)[0]
        there = replace(entry, host=host)
        if entry.placement.gpus:  # Ray says which GPUs are ours
            there = replace(there, device=None)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return Process(
            f"engine {self._name}",
            base_url(reached, port),
            commands.engine_command(there, port),
            commands.engine_env(there),
            self._log_dir / f"{self._name}.log",
        )


def listening(host: str, node: str) -> tuple[str, str]:
    """Return where an engine listens and where it is reached.

    Args:
        host: of its entry; the default stands for the node's address.
        node: the node's address.
    """
    if host == EngineEntry().host:
        return node, node
    return host, node if host in _EVERYWHERE else host
