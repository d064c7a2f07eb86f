"""A router and a scripted engine in a thread of their own, for tests that use plain sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions
from tests.router.fuzz.engine import OK_BODY, ScriptedEngine, whole

T = TypeVar("T")
CHAT: Final = "/v1/chat/completions"
HANG_S: Final = 10.0  # a healthy router answers in milliseconds
_PATIENCE_S: Final = 0.2  # for a router that rightly waits for the rest of a request


class Live:
    """The router, from another thread.

    Attributes:
        engine: behind it.
        router: itself; touch its parts in its own thread only, with :meth:`run`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.engine = ScriptedEngine()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        """Start both and wait until the engine has joined."""
        self._thread.start()
        self.run(self._start())

    def stop(self) -> None:
        """Stop both."""
        self.run(self.router.stop())
        self.run(self.engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` where the router runs."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(HANG_S)

    async def _start(self) -> None:
        await self.engine.start()
        options = RouterOptions(
            worker_urls=(f"http://127.0.0.1:{self.engine.port}",),
            port=0,
            retry_initial_backoff_ms=0.0,
            disable_retries=True,
            **self._options,
        )
        self.router = Router(options, DispatchOptions())
        await self.router.start()
        while not self.router.context.ready:
            await asyncio.sleep(0.005)

    def heal(self) -> None:
        """Let the engine answer well again."""
        self.engine.script, self.engine.hang_up = (whole(OK_BODY),), False

    def assert_well(self) -> None:
        """Check that a plain call is answered, nothing is left over, and nothing failed inside."""
        body = b'{"model": "tiny", "messages": []}'
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}"
        )
        (answer,) = self.exchange(head.encode() + b"\r\n\r\n" + body)
        assert (answer.status, answer.body) == (200, OK_BODY)
        self.run(self._settled())

    async def _settled(self) -> None:
        context = self.router.context
        while context.ledger.open or context.guard.attempts:
            await asyncio.sleep(0.002)
        assert "internal-error" not in context.ledger.failed()
        assert context.service.coordinator.held == 0
        assert all(not load.in_flight for load in context.service.coordinator.engines.values())

    def exchange(
        self, sent: bytes, cuts: tuple[int, ...] = (), *, complete: bool = True
    ) -> list[Answer]:
        """Send bytes on a connection of its own and return the answers.

        Args:
            sent: what is sent.
            cuts: where it is cut into pieces.
            complete: whether the router must answer and end the connection. If not, it may be
                waiting for the rest: the connection is half closed when nothing comes for a
                while, and must then end, soon.
        """
        with socket.create_connection(("127.0.0.1", self.router.port), HANG_S) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                for a, b in zip((0, *cuts), (*cuts, len(sent)), strict=True):
                    sock.sendall(sent[a:b])
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has heard enough
            return parsed(_read(sock, HANG_S if complete else _PATIENCE_S))


def _read(sock: socket.socket, patience_s: float) -> bytes:
    got = b""
    sock.settimeout(patience_s)
    while True:
        try:
            piece = sock.recv(65536)
        except TimeoutError:
            if sock.gettimeout() == HANG_S:
                raise AssertionError(f"the router hangs after {got!r}") from None
            sock.settimeout(HANG_S)
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                return got
            continue
        except ConnectionResetError:
            return got
        if not piece:
            return got
        got += piece


class Answer:
    """One answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def assert_fit_for_clients(self) -> None:
        """Check that it is no fault of the router, and that an error is an error object."""
        not_built = self.status == 501 and b"WebSockets" in self.body
        assert self.status < 500 or not_built, self.body
        if self.status >= 400 and self.body:
            error = json.loads(self.body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert isinstance(error["message"], str)


def parsed(data: bytes) -> list[Answer]:
    """Return the answers in ``data``; one that was cut off is left out."""
    found = []
    while b"\r\n\r\n" in data:
        head, _, data = data.partition(b"\r\n\r\n")
        start, *lines = head.decode("latin-1").split("\r\n")
        version, status = start.split(" ")[:2]
        assert version in ("HTTP/1.1", "HTTP/1.0"), start
        headers = {name.lower(): value.strip() for name, value in (x.split(":", 1) for x in lines)}
        if status == "100":
            continue
        body, data = _body(headers, data)
        if body is not None:
            found.append(Answer(int(status), headers, body))
    return found


def _body(headers: dict[str, str], data: bytes) -> tuple[bytes | None, bytes]:
    """Return the body, ``None`` if it was cut off, and what comes after it."""
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while b"\r\n" in data:
            size, _, data = data.partition(b"\r\n")
            n = int(size, 16)
            body, data = body + data[:n], data[n + 2 :]
            if n == 0:
                return body, data
        return None, b""
    length = int(headers.get("content-length", len(data)))
    return (data[:length], data[length:]) if len(data) >= length else (None, b"")
