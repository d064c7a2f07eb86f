"""Requests to engines that are not calls: health checks, telemetry, token counts."""

from __future__ import annotations

from typing import Final

import aiohttp

from hexgen_vllm.router import access
from hexgen_vllm.router.options import RouterOptions

# uvicorn closes idle connections after 5 s; one that it is about to close must not be used.
_KEEPALIVE_S: Final = 4.0
_LARGE_BODY_BYTES: Final = 2**20
_READ_BYTES: Final = 2**18


def new_session(options: RouterOptions) -> aiohttp.ClientSession:
    """Return the one client session: no limit, no cookies, nothing decoded or added."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=access.for_engines(options)
        ),
        # The guard watches for silence; a timer per event would cost more than the event.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_secs),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BYTES,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )
