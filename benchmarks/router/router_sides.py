"""The routers that are measured: started on a core of their own, watched from outside."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import hexgen_vllm
from benchmarks.router.router_load import PROGRAM
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports

OURS: Final = "hexgen"
ROUND_ROBIN: Final = "vllm_router_round_robin"
PROGRAM_MODE: Final = "vllm_router_program"
_CPUCLOCK_SCHED: Final = 2  # of Linux: a process's time by its scheduler, in nanoseconds
_VERSION: Final = re.compile(r"vllm[-_]router[^0-9]*([0-9]+(?:\.[0-9]+)+)")


@dataclass(slots=True)
class Side:
    """One router process.

    Attributes:
        name: of :data:`OURS`, :data:`ROUND_ROBIN`, :data:`PROGRAM_MODE`.
        port: where it listens.
        process: it.
        says: how it is told of workflows, for :class:`~benchmarks.router.router_load.Client`.
    """

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes] = field(repr=False)

    @property
    def says(self) -> str:
        """How its clients name workflows."""
        return PROGRAM if self.name == PROGRAM_MODE else ""

    def cpu_s(self) -> float:
        """Return the CPU time it has used, user and system, seconds.

        By its CPU clock, where /proc counts in ticks: a tick is the time of fifty calls.
        """
        return time.clock_gettime(~self.process.pid << 3 | _CPUCLOCK_SCHED)

    def rss_mib(self) -> float:
        """Return its resident memory, MiB."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def said(self) -> str:
        """Return the end of its log."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")[-400:].strip()

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def cores() -> tuple[int, int]:
    """Return the core for routers and the one for engines and clients.

    Raises:
        ConfigError: this process may use only one core.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise ConfigError("bench router needs two cores: one for routers, one for the load.")
    return usable[0], usable[1]


def find_peer(given: str | None) -> list[str] | None:
    """Return the command that starts vllm-router, ``None`` when it is not installed.

    Raises:
        ConfigError: ``given`` is no program.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise ConfigError(f"peer must be a program, not {given!r}.")
        return [found]
    on_path = shutil.which("vllm-router")
    return None if on_path is None else [on_path]


def peer_version(peer: Sequence[str]) -> str | None:
    """Return the version of the package that the program ``peer`` belongs to."""
    python = Path(peer[0]).with_name("python")
    code = "from importlib.metadata import version; print('vllm-router', version('vllm-router'))"
    try:
        said = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except OSError:
        return None
    found = _VERSION.search(said)
    return found[1] if found else None


def compiled() -> bool:
    """Return whether what a call passes through here is compiled (see ``setup.py``)."""
    found = importlib.util.find_spec("hexgen_vllm.router.relay")
    origin = "" if found is None else found.origin or ""
    return origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def start(name: str, engines: Sequence[str], core: int, peer: Sequence[str] | None) -> Side:
    """Start the router ``name`` before ``engines`` on ``core``."""
    (port, metrics_port), folder = free_ports("127.0.0.1", 2), None
    if name == OURS:
        folder = Path(hexgen_vllm.__file__).parents[1]  # to measure this copy and no other
        command = [
            sys.executable, "-m", "hexgen_vllm.router", "--port", str(port), "--policy", "slack",
            "--log-level", "warning", "--queue-size", "0", "--worker-urls", *engines,
        ]  # fmt: skip
    else:
        mode = ["--enable-program-scheduling"] if name == PROGRAM_MODE else []
        policy = [] if mode else ["--policy", "round_robin"]
        command = [
            *(peer or ()), "--host", "127.0.0.1", "--port", str(port), *mode, *policy,
            "--prometheus-port", str(metrics_port), "--log-level", "warning",
            "--worker-urls", *engines,
        ]  # fmt: skip
    log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log")  # noqa: SIM115 - its own
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # the child inherits it, before its threads begin
    try:
        environment = {**os.environ, "RUST_LOG": "warn"}  # or the peer logs every decision
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    finally:
        os.sched_setaffinity(0, before)
    return Side(name, port, process, log)
