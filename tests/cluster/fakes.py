"""Engines that are fake servers, and what the tests ask and tell them."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hexgen_vllm.cluster import ClusterSpec, EngineEntry

SERVER = str(Path(__file__).with_name("fake_server.py"))


def fake_engine(name: str, mode: str = "ok", **more: Any) -> EngineEntry:
    """Return an engine that is a fake server in ``mode``."""
    command = (sys.executable, "-S", SERVER, "{host}", "{port}", mode)
    return EngineEntry(name=name, command=command, **more)


def fake_cluster(log_dir: Path, *engines: EngineEntry, **more: Any) -> ClusterSpec:
    """Return a cluster of ``engines`` without a router."""
    return ClusterSpec(engines=engines, router=None, log_dir=str(log_dir), **more)


def ask(url: str) -> dict[str, Any]:
    """Return what a fake server says of itself."""
    with urllib.request.urlopen(f"{url}/", timeout=60) as response:
        return dict(json.load(response))


def make_die(url: str) -> None:
    """Have a fake server die with code 7."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(urllib.request.Request(f"{url}/die", b""), timeout=60)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended but was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def are_gone(pids: Iterable[int]) -> bool:
    """Tell whether no process runs, or none does soon: who is killed dies a moment later."""
    until = time.monotonic() + 5.0
    left = list(pids)
    while (left := [pid for pid in left if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.005)
    return not left
