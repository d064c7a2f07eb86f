"""The router's own HTTP/1.1 server: as little work per request and per event as Python allows.

Everything around it (listening, TLS, shutting down) is aiohttp's; only the connections are ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from aiohttp import web

from hexgen_vllm.router.http_connection import SWEEP_S, Connection
from hexgen_vllm.router.http_request import Buffered, Request

Handle = Callable[[Request], Awaitable[web.StreamResponse]]
Mark = Callable[[Request, web.StreamResponse], None]
_MAX_BUFFERED_BYTES: Final = 2**30
_MAX_CONNECTIONS: Final = 64  # enough for who only reads metrics


class Server(web.Server):
    """Serves connections with ``handle``.

    Args:
        handle: answers a request; it has to catch its own errors.
        max_body_bytes: largest body taken.
        mark: adds headers to every answer; ``None`` adds nothing.
        max_buffered_bytes: most bytes of bodies held at once.
        max_connections: most clients connected at once; more are told so and turned away.

    Attributes:
        open: connections there are.
        refused: connections that were one too many.
        buffered: bytes of bodies held.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        max_body_bytes: int,
        mark: Mark | None = None,
        max_buffered_bytes: int = _MAX_BUFFERED_BYTES,
        max_connections: int = _MAX_CONNECTIONS,
    ) -> None:
        super().__init__(cast(Any, handle))
        self.handle, self.max_body_bytes, self.mark = handle, max_body_bytes, mark
        self.buffered = Buffered(max_buffered_bytes)
        self.max_connections, self.refused = max_connections, 0
        self.open: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(self) -> Any:
        """Return the protocol for a new connection."""
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return Connection(self, self._loop)

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for connection in list(self.open):
            connection.sweep()

    def pre_shutdown(self) -> None:
        """Let no connection take another request."""
        for connection in list(self.open):
            connection.close_when_idle()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Wait up to ``timeout`` seconds for requests under way; close all connections."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [c.task for c in self.open if c.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for connection in list(self.open):
            connection.abort()
