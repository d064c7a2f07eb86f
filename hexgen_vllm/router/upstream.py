"""Requests to engines that are not calls: health checks, telemetry, token counts."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from hexgen_vllm.router import tls
from hexgen_vllm.router.options import RouterOptions

# uvicorn closes idle connections after 5 s; one that it is about to close must not be used.
_KEEPALIVE_S: Final = 4.0
_LARGE_BODY_BYTES: Final = 2**20
_READ_BYTES: Final = 2**18


def new_session(options: RouterOptions) -> aiohttp.ClientSession:
    """Return the one client session: no limit, no cookies, nothing decoded or added."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=tls.for_engines(options)
        ),
        # The guard watches for silence; a timer per event would cost more than the event.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_secs),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=_READ_BYTES,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


async def send(
    session: aiohttp.ClientSession,
    method: str,
    url: URL,
    headers: CIMultiDict[str],
    body: bytes,
    timeout: aiohttp.ClientTimeout | None = None,
) -> aiohttp.ClientResponse:
    """Send a request and return the answer once its headers are here.

    A connection that was idle may have been closed at the other end just then: the request goes
    out once more on another one.

    Raises:
        aiohttp.ClientConnectorError: nobody listens there.
        aiohttp.ClientError: the connection broke.
    """
    extra: dict[str, Any] = {} if timeout is None else {"timeout": timeout}

    async def once() -> aiohttp.ClientResponse:
        # aiohttp wants to send large bodies in parts.
        data = BytesIO(body) if len(body) > _LARGE_BODY_BYTES else body
        return await session.request(
            method, url, data=data, headers=headers, allow_redirects=False, **extra
        )

    try:
        return await once()
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        return await once()
