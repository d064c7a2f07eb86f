"""Telling a router that a workflow has ended, by vllm-router's convention.

``POST {base_url without /v1}/finish_session?session_id=…``. It only lets the router forget the
workflow sooner, so it is tried once, briefly, and its failure is nobody's concern.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any, Final, cast
from urllib.parse import quote

from hexgen_vllm import wire
from hexgen_vllm.client.scope import Via

TIMEOUT_S: Final = 2.0


def finish_url(base_url: str, workflow_id: str) -> str:
    """Return the URL that ends ``workflow_id`` at the router behind ``base_url``."""
    root = base_url.rstrip("/").removesuffix("/v1")
    return f"{root}/finish_session?session_id={quote(workflow_id, safe='')}"


def finish(client: object, workflow_id: str, tenant: str | None = None) -> None:
    """End the workflow through a synchronous client; never raises for what the server does.

    An asynchronous client cannot be awaited here: then nothing is sent.
    """
    with suppress(Exception):
        post = _post(client)
        if not iscoroutinefunction(post):
            post(finish_url(_base_url(client), workflow_id), **_said(tenant))


async def finish_async(client: object, workflow_id: str, tenant: str | None = None) -> None:
    """End the workflow through a client of either kind; never raises for what the server does."""
    with suppress(Exception):
        post = _post(client)
        if not iscoroutinefunction(post):
            await asyncio.to_thread(finish, client, workflow_id, tenant)
            return
        await cast(
            "Awaitable[object]",
            post(finish_url(_base_url(client), workflow_id), **_said(tenant)),
        )


def finish_via(via: Via | None) -> None:
    """End a workflow through the HTTP client of its last call, if that can be done here."""
    if via is not None and not via.is_async:
        with suppress(Exception):
            via.client.post(via.url, headers=via.headers, timeout=TIMEOUT_S)


async def finish_via_async(via: Via | None) -> None:
    """End a workflow through the HTTP client of its last call, of either kind."""
    if via is not None and via.is_async:
        with suppress(Exception):
            await via.client.post(via.url, headers=via.headers, timeout=TIMEOUT_S)
    else:
        await asyncio.to_thread(finish_via, via)


def _said(tenant: str | None) -> dict[str, Any]:
    """Return the arguments of the request: a workflow is its tenant's."""
    if tenant is None:
        return {"cast_to": object}
    return {"cast_to": object, "options": {"headers": {wire.header_name("tenant"): tenant}}}


def _base_url(client: object) -> str:
    return str(cast("Any", client).base_url)


def _post(client: object) -> Callable[..., object]:
    short = cast("Any", client).with_options(max_retries=0, timeout=TIMEOUT_S)
    return cast("Callable[..., object]", short.post)
