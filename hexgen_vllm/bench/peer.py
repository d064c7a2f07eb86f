"""vllm-router, the peer that can know of programs, as a process in front of given engines."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from hexgen_vllm.cluster.processes import Process, wait_healthy
from hexgen_vllm.cluster.supervisor import base_url
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports

_HOST: Final = "127.0.0.1"
_START_S: Final = 60.0
_STOP_S: Final = 5.0
MODES: Final[dict[str, tuple[str, ...]]] = {
    "vllm_router": (),
    "vllm_router_program": ("--enable-program-scheduling",),
}
"""Names of what is compared, and the options of vllm-router; its default is ``cache_aware``."""
# The queue is long enough that no call is refused for its length.
_OPTIONS: Final = ("--queue-size=100000", "--log-level=warning")


def find(program: str) -> str:
    """Return the path of ``program``, a file or a name on ``PATH``.

    Raises:
        ConfigError: there is no such program.
    """
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"vllm_router must be a program, not {program!r}.")
    return found


def peer_command(program: str, mode: str, port: int, engines: Sequence[str]) -> list[str]:
    """Return what starts vllm-router in a mode of :data:`MODES` before ``engines``."""
    listen = [f"--host={_HOST}", f"--port={port}", "--worker-urls", *engines]
    return [program, *listen, *MODES[mode], *_OPTIONS]


@asynccontextmanager
async def vllm_router(
    program: str, mode: str, engines: Sequence[str], log: Path
) -> AsyncIterator[str]:
    """Run vllm-router in a mode of :data:`MODES` before ``engines``; gives its URL.

    Raises:
        ConfigError: there is no such program.
        ProcessFailed: it died, or was not healthy in time.
    """
    port = free_ports(_HOST, 1)[0]
    url = base_url(_HOST, port)
    process = Process("vllm-router", url, peer_command(find(program), mode, port, engines), {}, log)
    try:
        await process.start()
        async with aiohttp.ClientSession() as session:
            await wait_healthy(session, "vllm-router", url, _START_S, process)
        yield url
    finally:
        await process.stop(_STOP_S)
