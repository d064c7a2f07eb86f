"""Child processes: their logs, ports and health, their end, and starting them again.

A server is up once it answers ``GET /health``. One that died is started again after a wait that
grows with every death soon after a start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

import aiohttp

from hexgen_vllm.clock import Clock
from hexgen_vllm.cluster.spec import ClusterSpec
from hexgen_vllm.errors import HexgenError

LONGEST_S: Final = 30.0
STEADY_S: Final = 60.0
"""A process that ran this long starts as if it had never died."""
LOG_LINES: Final = 20
_LOG_TAIL_BYTES: Final = 16_384
_CHILD: Final = str(Path(__file__).with_name("child.py"))
POLL_S = 0.2
_TRY = aiohttp.ClientTimeout(total=5.0)


class Backoff:
    """Twice as long after each death, at most 30 s; from the start again after a long life."""

    def __init__(self, first_s: float) -> None:
        """Start with ``first_s`` seconds."""
        self._first_s = first_s
        self._deaths = 0

    def after(self, lived_s: float) -> float:
        """Return the seconds to wait after a life of ``lived_s`` seconds."""
        self._deaths = 1 if lived_s >= STEADY_S else self._deaths + 1
        return float(min(self._first_s * 2.0 ** min(self._deaths - 1, 16), LONGEST_S))


class ProcessFailed(HexgenError):  # noqa: N818 - what happened, not what went wrong in here
    """A process of the cluster died, or did not become healthy; ``str()`` ends in its log."""


class Process:
    """A program in a session of its own, writing to a log file.

    Attributes:
        name: what messages call it.
        url: where it listens.
        log: its log file; a program started again writes behind what is there.
    """

    def __init__(
        self, name: str, url: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.url = url
        self.log = log
        self._command = tuple(command)
        self._env = {**os.environ, **env}
        self._running: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the latest start."""
        return None if self._running is None else self._running.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the latest start, negative for a signal; ``None`` while it runs."""
        return None if self._running is None else self._running.returncode

    async def start(self) -> None:
        """Start the program.

        It gets SIGTERM when this process dies, or, as the kernel has it, when the thread that
        called this ends.
        """
        with self.log.open("ab") as log:
            self._running = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", _CHILD, str(os.getpid())),
                *self._command,
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait for the program's end and return its exit code."""
        assert self._running is not None
        return await self._running.wait()

    async def stop(self, grace_s: float) -> None:
        """End the program: SIGTERM, ``grace_s`` seconds, then SIGKILL; and what it left behind."""
        if self._running is None:
            return
        if self._running.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._running.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._running.wait(), grace_s)
        self.kill()
        await self._running.wait()

    def kill(self) -> None:
        """Kill the program and all of its session at once."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._running.pid, signal.SIGKILL)

    def failed(self, what: str) -> ProcessFailed:
        """Return the error that says ``what`` happened to this process, with its last lines."""
        tail = "\n".join(f"  {line}" for line in self.last_lines() or ["(nothing)"])
        return ProcessFailed(f"{self.name} {what}; the end of {self.log}:\n{tail}")

    def last_lines(self, count: int = LOG_LINES) -> list[str]:
        """Return the last ``count`` lines of the log."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(size - _LOG_TAIL_BYTES, 0))
            return log.read().decode(errors="replace").splitlines()[-count:]


async def is_healthy(session: aiohttp.ClientSession, url: str, path: str = "/health") -> bool:
    """Tell whether the server at ``url`` answers its health check with success."""
    try:
        async with session.get(f"{url}{path}", timeout=_TRY) as response:
            return response.status == 200
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return False


async def wait_healthy(
    session: aiohttp.ClientSession,
    name: str,
    url: str,
    timeout_s: float,
    process: Process | None,
    *,
    path: str = "/health",
) -> None:
    """Wait until the server at ``url`` is healthy.

    Args:
        session: asks.
        name: what errors call the server.
        url: its base URL.
        timeout_s: seconds to wait at most.
        process: what runs it, ``None`` for a server that somebody else started.
        path: of the health check.

    Raises:
        ProcessFailed: the process died, or the time is over.
    """

    async def poll() -> None:
        while not await is_healthy(session, url, path):
            if process is not None and process.exit_code is not None:
                raise process.failed(f"ended with exit code {process.exit_code} while starting")
            await asyncio.sleep(POLL_S)

    try:
        await asyncio.wait_for(poll(), timeout_s)
    except asyncio.TimeoutError:
        what = f"was not healthy after {timeout_s:g} s"
        if process is None:
            raise ProcessFailed(f"{name} at {url} {what}.") from None
        raise process.failed(what) from None


async def keep(
    process: Process,
    start: Callable[[], Awaitable[None]],
    spec: ClusterSpec,
    *,
    clock: Clock,
    report: Callable[[str], None],
) -> NoReturn:
    """Start ``process`` again whenever it dies, until cancelled.

    Args:
        process: what runs now.
        start: starts it and waits until it is healthy; raises ``ProcessFailed`` where it cannot.
        spec: how long to wait before a start, and for the end of one that failed.
        clock: tells how long it lived.
        report: gets one line for each death and each start that failed.
    """
    backoff = Backoff(spec.restart_after_s)
    while True:
        since_s = clock.now()
        code = await process.wait()
        process.kill()  # what a crashed server left in its session
        delay_s = backoff.after(clock.now() - since_s)
        report(f"{process.name}: died with exit code {code}, again in {delay_s:g} s")
        await asyncio.sleep(delay_s)
        try:
            await start()
        except ProcessFailed as error:
            report(str(error))
            await process.stop(spec.stop_grace_s)
