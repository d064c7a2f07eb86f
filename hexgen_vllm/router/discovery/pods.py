"""Which pods are engines that may get calls, read from what the API server says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hexgen_vllm.router.discovery.names import Address, short_name
from hexgen_vllm.router.options import Worker

PORT: Final = "hexgen-vllm/port"
"""Annotation of a pod whose engine listens on another port than the rest."""

Pod = Mapping[str, Any]


def worker_of(pod: Pod, default_port: int, *, qualified: bool) -> Worker | None:
    """Return the engine in a pod, ``None`` while it is not to get calls.

    Args:
        pod: as the API server describes it.
        default_port: where engines listen.
        qualified: whether names of pods need that of their namespace.
    """
    meta, status = _part(pod, "metadata"), _part(pod, "status")
    host, port = status.get("podIP"), _port(meta, default_port)
    if not isinstance(host, str) or not host or port is None:
        return None
    if meta.get("deletionTimestamp") is not None or not _ready(status):
        return None
    name = str(meta.get("name", ""))
    full = f"{meta.get('namespace', '')}.{name}" if qualified else name
    return Worker(short_name(full), Address(host, port).url) if name else None


def wrong_port(pod: Pod) -> bool:
    """Whether the annotation of a pod names no port."""
    return _port(_part(pod, "metadata"), 1) is None


def _port(meta: Pod, default: int) -> int | None:
    said = _part(meta, "annotations").get(PORT)
    if said is None:
        return default
    usable = isinstance(said, str) and said.isascii() and said.isdigit() and len(said) <= 5
    return int(said) if usable and 0 < int(said) < 65536 else None


def _ready(status: Pod) -> bool:
    conditions = status.get("conditions")
    for one in conditions if isinstance(conditions, list) else ():
        if isinstance(one, Mapping) and one.get("type") == "Ready":
            return bool(one.get("status") == "True")
    return False


def _part(of: Pod, key: str) -> Pod:
    found = of.get(key)
    return found if isinstance(found, Mapping) else {}
