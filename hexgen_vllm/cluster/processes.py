"""One child process: its log, its health, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from hexgen_vllm.errors import HexgenError

LOG_LINES: Final = 20
_LOG_TAIL_BYTES: Final = 16_384
_CHILD: Final = str(Path(__file__).with_name("child.py"))


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
