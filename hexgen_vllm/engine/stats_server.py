"""Telemetry from the engine process itself, where vLLM's HTTP server cannot carry it.

vLLM's Rust server has no middleware and no utility call of ours, so that nothing in front of the
engine can add ``/hexgen/stats``. A thread of the engine process answers instead, on a port of its
own: by default on the loopback interface, where whoever reads it runs beside the engine.

Elsewhere, if ``VLLM_API_KEY`` is set, it wants that key, as vLLM's own server does.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from hexgen_vllm.engine.server.middleware import exposition
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.keys import shows
from hexgen_vllm.wire import plain

LOOPBACK: Final = "127.0.0.1"
_ATTEMPTS: Final = 20


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class StatsServer:
    """Answers ``GET /hexgen/stats`` (JSON) and ``GET /metrics`` (our metrics alone).

    Args:
        snapshot: returns the telemetry; it may run while the engine steps.
        port: where to listen; 0 is any.
        rank: the engine's data-parallel rank, for the snapshot.
        size: data-parallel ranks there are; the others answer on the ports beside this one.
        host: address to listen on.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the port cannot be had.
    """

    def __init__(
        self,
        snapshot: Callable[[], dict[str, Any]],
        port: int,
        rank: int = 0,
        *,
        size: int = 1,
        host: str = LOOPBACK,
    ) -> None:
        self._snapshot = snapshot
        self._said = {"engine": rank, "data_parallel_size": size}
        self._key = None if _is_loopback(host) else os.environ.get("VLLM_API_KEY") or None
        try:
            self._server = (_IPv6Server if ":" in host else ThreadingHTTPServer)(
                (host, port), self._handler()
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(f"stats_port {port} cannot be used: {error}.") from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening; a second time changes nothing."""
        self._server.shutdown()
        self._server.server_close()

    def _read(self) -> dict[str, Any]:
        """Return a snapshot; calls may come and go while it is taken."""
        for _ in range(_ATTEMPTS):
            try:
                return {**self._said, **plain(self._snapshot())}
            except RuntimeError:  # a dictionary changed its size
                continue
        return {**self._said, **plain(self._snapshot())}

    def _page(self, path: str) -> tuple[str, bytes] | None:
        if path == "/hexgen/stats":
            return "application/json", json.dumps(self._read(), allow_nan=False).encode()
        if path == "/metrics":
            return "text/plain; version=0.0.4", exposition(self._read()).encode()
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        page, key = self._page, self._key

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0  # of a client that says nothing

            def do_GET(self) -> None:
                found = page(self.path.split("?", 1)[0])
                kind, body = found or ("text/plain", b"not found")
                status = 200 if found else 404
                shown = self.headers.get("Authorization", "").encode("latin-1", "replace")
                if key is not None and not shows(shown, (key,)):
                    kind, body, status = "text/plain", b"a key is needed", 401
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Say nothing: the engine's log is not for readers of its telemetry."""

        return Handler


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
