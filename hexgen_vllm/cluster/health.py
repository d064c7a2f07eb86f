"""Waits until a server answers ``GET /health``."""

from __future__ import annotations

import asyncio

import aiohttp

from hexgen_vllm.cluster.process import Process, ProcessFailed

POLL_S = 0.2
_TRY = aiohttp.ClientTimeout(total=5.0)


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
