"""A port of its own for metrics and health, so that scrapers need not reach the one for calls."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from hexgen_vllm.errors import BadRequest, ConfigError
from hexgen_vllm.router import answers
from hexgen_vllm.router.broken import why
from hexgen_vllm.router.http_request import Request
from hexgen_vllm.router.http_server import Handle, Server
from hexgen_vllm.router.routes import monitors
from hexgen_vllm.router.tenants import DEFAULT_TENANT, Client

_MAX_BODY_BYTES: Final = 0
_CLOSE_S: Final = 0.1
_SCRAPER: Final = Client(DEFAULT_TENANT)


class MetricsPort:
    """Serves what needs no key and is no call.

    Args:
        handle: answers requests of the router.
        host: address to listen on.
        port: port to listen on.
        shared: other processes listen there too, and answer alike.
    """

    def __init__(self, handle: Handle, host: str, port: int, *, shared: bool) -> None:
        self._handle, self._host, self._port, self._shared = handle, host, port, shared
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be had.
        """
        server = Server(self._answer, max_body_bytes=_MAX_BODY_BYTES)
        self._runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, reuse_port=self._shared)
        try:
            await site.start()
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise ConfigError(f"cannot listen on {where} for metrics: {why(error)}.") from error

    async def stop(self) -> None:
        """Close everything."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: Request) -> web.StreamResponse:
        if monitors(request.path):
            request.client = _SCRAPER
            return await self._handle(request)
        return answers.from_error(BadRequest("There is no such endpoint.", status=404), None)
