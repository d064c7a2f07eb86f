"""Joins a Ray cluster or starts one on this machine. Only files in this folder import ray.

A cluster that is started here has no dashboard, listens on the loopback address only and tells
nobody of its use.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from types import ModuleType
from typing import Any, Final

from hexgen_vllm.cluster.ray.demand import Node
from hexgen_vllm.cluster.ray.keys import RayOptions
from hexgen_vllm.errors import ConfigError

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):\d+")
_ANSWER_S: Final = 5.0
_STORE_BYTES: Final = 100 * 2**20  # engines pass nothing through Ray's object store
# Ray reads these while it is imported. Without clusters of several machines, which is what the
# second one says no to, a node's address is 127.0.0.1, and nothing listens anywhere else.
_NO_REPORTS: Final = "RAY_USAGE_STATS_ENABLED"
_SEVERAL_MACHINES: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_TRIES: Final = "RAY_NUM_REDIS_GET_RETRIES"  # to join a cluster: 20 unless we say otherwise


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
