"""Nodes of a Ray cluster: what engines ask of them, and the host that runs an engine on one.

What an engine asks of a node is said in Ray's words, and compared with what any node can give. A
host runs in an actor that Ray places: one engine process, its health, its end. A cluster is joined
or started on this machine; only files in this folder import ray.

A cluster that is started here has no dashboard, listens on the loopback address only and tells
nobody of its use.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import aiohttp

from hexgen_vllm.cluster import commands
from hexgen_vllm.cluster.processes import Process, ProcessFailed, wait_healthy
from hexgen_vllm.cluster.ray_options import RayOptions, RayPlacement
from hexgen_vllm.cluster.spec import EngineEntry
from hexgen_vllm.cluster.supervisor import base_url
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports

_ACCELERATOR: Final = "accelerator_type:"
_SLIVER: Final = 0.001  # what Ray itself asks for of an accelerator's type
_BUILT_IN: Final = ("CPU", "GPU", "memory", "object_store_memory")
_EVERYWHERE: Final = ("0.0.0.0", "::", "")
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):\d+")
_ANSWER_S: Final = 5.0
_STORE_BYTES: Final = 100 * 2**20  # engines pass nothing through Ray's object store
# Ray reads these while it is imported. Without clusters of several machines, which is what the
# second one says no to, a node's address is 127.0.0.1, and nothing listens anywhere else.
_NO_REPORTS: Final = "RAY_USAGE_STATS_ENABLED"
_SEVERAL_MACHINES: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_TRIES: Final = "RAY_NUM_REDIS_GET_RETRIES"  # to join a cluster: 20 unless we say otherwise


@dataclass(frozen=True)
class Node:
    """A machine, or what counts as one, in a Ray cluster.

    Attributes:
        resources: all it has, whether in use or not.
    """

    node_id: str
    address: str
    resources: Mapping[str, float]


def demand(placement: RayPlacement) -> dict[str, float]:
    """Return the resources that one engine takes from its node."""
    asked = {"CPU": placement.num_cpus, "GPU": placement.gpus, **placement.resources}
    asked["memory"] = placement.memory_gib * 2**30
    if placement.accelerator_type is not None:
        asked[f"{_ACCELERATOR}{placement.accelerator_type}"] = _SLIVER
    return {name: float(amount) for name, amount in asked.items() if amount}


def actor_options(placement: RayPlacement) -> dict[str, Any]:
    """Return the same as options of a Ray actor."""
    asked = demand(placement)
    return {
        "num_cpus": asked.pop("CPU", 0.0),
        "num_gpus": asked.pop("GPU", 0.0),
        "memory": int(asked.pop("memory", 0)) or None,
        "resources": asked,
    }


def could_hold(asked: Mapping[str, float], node: Node) -> bool:
    """Whether an engine could be on ``node``, were that idle."""
    return all(node.resources.get(name, 0.0) >= amount for name, amount in asked.items())


def unmet(placement: RayPlacement, nodes: Iterable[Node]) -> str | None:
    """Return what no node has, as the end of a sentence; ``None`` if one has it all."""
    asked, found = demand(placement), list(nodes)
    if any(could_hold(asked, node) for node in found):
        return None
    return f"no node of the Ray cluster has {resources_text(asked)}; {_offered(found)}"


def resources_text(asked: Mapping[str, float]) -> str:
    """Return resources as people write them."""
    return " and ".join(_one(name, amount) for name, amount in asked.items()) or "anything"


def _one(name: str, amount: float) -> str:
    if name.startswith(_ACCELERATOR):
        return f"accelerator {name.removeprefix(_ACCELERATOR)}"
    if name == "memory":
        return f"{amount / 2**30:g} GiB of memory"
    return f"{amount:g} {name}"


def _offered(nodes: list[Node]) -> str:
    kinds = sorted({_of_node(node) for node in nodes})
    return f"there are nodes with {'; '.join(kinds)}" if kinds else "there are no nodes"


def _of_node(node: Node) -> str:
    names = sorted(n for n in node.resources if n not in _BUILT_IN and not n.startswith("node:"))
    plain = {n: node.resources[n] for n in ("CPU", "GPU", *names) if node.resources.get(n)}
    return resources_text(plain) if plain else "nothing to give"


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


class Library:
    """Ray, connected.

    Attributes:
        ray: the module.
        address: of the cluster.

    Args:
        options: which cluster.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be joined or started.
    """

    def __init__(self, options: RayOptions) -> None:
        address = options.address or os.environ.get("RAY_ADDRESS")
        here = address in (None, "local")
        os.environ.setdefault(_NO_REPORTS, "0")
        name, value = (_SEVERAL_MACHINES, "0") if here else (_TRIES, "1")
        os.environ.setdefault(name, value)
        self.ray = imported()
        self._ours = not self.ray.is_initialized()
        if self._ours:
            how = _local(options) if here else _existing(self.ray, str(address))
            _join(self.ray, how, address)
        self.address = str(self.ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        return [
            Node(str(n["NodeID"]), str(n["NodeManagerAddress"]), dict(n["Resources"]))
            for n in self.ray.nodes()
            if n["Alive"]
        ]

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._ours:
            self.ray.shutdown()


def imported() -> ModuleType:
    """Return the ray module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray

        if not hasattr(ray, "init"):  # a folder of that name, such as that of its logs in /tmp
            raise ImportError
    except ImportError:
        raise ConfigError(
            "backend ray needs Ray, which is not installed: pip install 'hexgen-vllm[ray]'."
        ) from None
    module: ModuleType = ray
    return module


def _local(options: RayOptions) -> dict[str, Any]:
    custom = dict(options.local_resources)
    named = {"num_cpus": custom.pop("CPU", None), "num_gpus": custom.pop("GPU", None)}
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "resources": custom,
        **{name: amount for name, amount in named.items() if amount is not None},
    }


def _existing(ray: ModuleType, address: str) -> dict[str, Any]:
    """Return how to join the cluster at ``address``, after a look whether anybody answers there."""
    if address != "auto" and not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"ray address must be host:port or auto, not {address!r}; a machine that is no node of "
            f"the cluster cannot start engines in it."
        )
    try:
        found = ray._private.services.canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError):
        raise ConfigError(
            "no Ray cluster was found on this machine: start one, or give its host:port."
        ) from None
    except OSError as error:  # its name
        raise ConfigError(f"no Ray cluster answers at {address}: {_reason(error)}.") from None
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        where = address if address == found else f"{address} ({found})"
        raise ConfigError(f"no Ray cluster answers at {where}: {_reason(error)}.") from None
    return {"address": address}


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()


def _join(ray: ModuleType, how: dict[str, Any], address: str | None) -> None:
    try:
        ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ray raises whatever its layers raise
        why = " ".join(str(error).split())
        first = why.partition(". ")[0].rstrip(".") or type(error).__name__
        if how["address"] == "local":
            raise ConfigError(f"a Ray cluster could not be started here: {first}.") from None
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {first}.") from None
