"""The supervisor's side of the router's admin and diagnostic endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

_TIMEOUT: Final = aiohttp.ClientTimeout(total=20.0)
_GONE: Final = 404


class RouterAway(Exception):  # noqa: N818 - named after what happened
    """The router did not answer, or not with success; ``str()`` says what it said."""


class RouterClient:
    """Asks and tells the router at ``url``, with its admin key."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session, self._url = session, url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def workers(self) -> dict[str, Mapping[str, Any]]:
        """Return the engines that the router knows, by name."""
        found = await self._ask("GET", "/workers")
        return {worker["name"]: worker for worker in found["workers"]}

    async def overview(self) -> Mapping[str, Any]:
        """Return what the router's page shows."""
        return dict(await self._ask("GET", "/ui/data"))

    async def diagnostics(self) -> Mapping[str, Any]:
        """Return what its decisions stand on."""
        return dict(await self._ask("GET", "/scheduling/diagnostics"))

    async def add(self, name: str, url: str) -> None:
        """Register an engine."""
        await self._ask("POST", "/workers", json={"name": name, "url": url})

    async def drain(self, name: str) -> None:
        """Let an engine get no new calls."""
        await self._ask("POST", f"/workers/{name}/drain")

    async def undrain(self, name: str) -> None:
        """Let an engine get calls again."""
        await self._ask("POST", f"/workers/{name}/undrain")

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Have an engine forgotten when its calls have ended, or, with ``force``, now."""
        await self._ask("DELETE", f"/workers/{name}" + "?force=true" * force)

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        """Return the decoded answer; that there is no such engine is no error.

        Raises:
            RouterAway: there was none, or it was another error.
        """
        try:
            async with self._session.request(
                method, self._url + path, headers=self._headers, timeout=_TIMEOUT, **more
            ) as answer:
                said = await answer.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise RouterAway(f"the router does not answer: {error}") from None
        if answer.status >= 400 and answer.status != _GONE:
            raise RouterAway(str(said["error"]["message"]))
        return said
