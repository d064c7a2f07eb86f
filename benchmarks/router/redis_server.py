"""A real Redis or Valkey server for tests and benchmarks, out of the distribution's packages."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from typing import Final

from hexgen_vllm.ports import free_ports

PASSWORD: Final = "s3cret"
HINT: Final = "no Redis here: the distribution's package redis-server or valkey-server has it"


def program() -> str | None:
    """Return the server's program, ``None`` if there is none."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


class RedisServer:
    """A server that wants a password and keeps nothing on disk: ``with RedisServer() as server``.

    Attributes:
        url: of it, with the password.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hexgen-redis-")
        (self.port,) = free_ports("127.0.0.1", 1)
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start it, empty."""
        found = program()
        assert found is not None, HINT
        self._process = subprocess.Popen(
            [found, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--requirepass", PASSWORD],
            cwd=self._folder.name, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            assert self._process.poll() is None, "the server ended"
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                threading.Event().wait(0.02)

    def stall(self) -> None:
        """Let it answer nothing until :meth:`go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a stall."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; it forgets everything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
