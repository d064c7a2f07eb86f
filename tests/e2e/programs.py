"""Programs under test, and HTTP as their clients speak it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hexgen_vllm.ports import free_ports

START_S = 300.0
"""Time for a real server to start on a busy machine; only a hang is meant to meet it."""

ANSWER_S = 180.0
"""Time for an answer, or an end, on a busy machine; only a hang is meant to meet it."""


def environment() -> dict[str, str]:
    """Return the variables of a program under test: ours, but it logs as it does for users."""
    return {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}


class Program(Protocol):
    """A started program, however it was started."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""

    def wait(self, timeout_s: float = ANSWER_S) -> int:
        """Wait for the end and return the exit code."""

    def stop(self) -> int:
        """Ask it to stop and return its exit code."""

    def text(self) -> str:
        """Return what it has printed."""


class Spawned:
    """A program started as users start it: ``python -m module``."""

    def __init__(self, module: str, argv: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(),
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float = ANSWER_S) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """Ask it to stop and return its exit code; what it leaves behind is killed."""
        self._process.terminate()
        try:
            return self._process.wait(ANSWER_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def text(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(errors="replace")


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """Return the body as text."""
        return self.body.decode()


def wait_until(done: Callable[[], bool], program: Program) -> None:
    """Return when ``done`` says so; fail when ``program`` ends before or never gets there."""
    deadline = time.monotonic() + START_S
    while not done():
        assert program.poll() is None, program.text()[-4000:]
        assert time.monotonic() < deadline, program.text()[-4000:]
        time.sleep(0.1)


class Server:
    """A server that a program runs."""

    def __init__(self, program: Program, where: int | str) -> None:
        """Take the server that ``program`` runs at ``where``, its URL or its local port."""
        self.program = program
        self.url = where if isinstance(where, str) else f"http://127.0.0.1:{where}"

    def wait_healthy(self) -> Server:
        """Return when the server answers its health check."""
        wait_until(self.is_healthy, self.program)
        return self

    def is_healthy(self) -> bool:
        """Tell whether the server answers its health check."""
        with contextlib.suppress(OSError):
            return self.get("/health").status == 200
        return False

    def get(self, path: str) -> Answer:
        """Return the answer to a GET."""
        return _answer(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the answer to a POST of JSON, or of bytes as they are."""
        return _answer(_post(self.url + path, body, headers or {}))

    @contextmanager
    def in_flight(self, body: Any, headers: Mapping[str, str] | None = None) -> Iterator[None]:
        """Run the block while a long streamed completion has begun and not ended."""
        long = {**body, "max_tokens": 900, "ignore_eos": True, "stream": True}
        request = _post(f"{self.url}/v1/completions", long, headers or {})
        with urllib.request.urlopen(request, timeout=ANSWER_S) as stream:
            assert stream.readline().startswith(b"data: {")
            yield


def _post(url: str, body: Any, headers: Mapping[str, str]) -> urllib.request.Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.Request(url, data, {"content-type": "application/json", **headers})


def _answer(request: urllib.request.Request) -> Answer:
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return Answer(response.status, response.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read())


def free_port() -> int:
    """Return a port that nobody listens on."""
    return free_ports("127.0.0.1", 1)[0]


def small_engine(port: int) -> list[str]:
    """Return arguments of ``vllm serve`` for the tiny model on ``port``."""
    return [
        "--served-model-name=tiny",
        "--host=127.0.0.1",
        f"--port={port}",
        "--dtype=float32",
        "--max-model-len=1024",
        "--max-num-seqs=8",
        "--max-num-batched-tokens=512",
        "--block-size=32",
        "--num-gpu-blocks-override=256",
        "--enforce-eager",
        "--gpu-memory-utilization=0.2",
        "--distributed-executor-backend=uni",
    ]


LONG_CALLS = ("--max-model-len=8192", "--num-gpu-blocks-override=2304")
"""What lets all eight calls of a small engine be so long that a late client still meets them."""
LONG_TOKENS = 7000
"""Such a call."""
