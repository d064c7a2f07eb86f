"""Tells the router which engines there are, again and again until it knows.

Engines come and go, and so may the router, which remembers nothing of what was registered before
it died. So the roster is compared with what the router says it has, and only differences are told.

    serving   registered; one that serves at a new address takes the place of the old one
    lost      drained, not removed: its model stays known, and calls for it get an honest 503
    leaving   removed, which drains it; gone once its calls have ended, or itself is lost

What an operator drained is not undone: only those drained here get calls again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from hexgen_vllm.cluster.ray.router_client import RouterAway, RouterClient

INTERVAL_S: Final = 0.5
_TAKES_CALLS: Final = ("ready", "trial")
_Workers = Mapping[str, Mapping[str, Any]]


class Unlisted:
    """A roster for nobody: there is no router."""

    settled: Final = True

    def serving(self, name: str, url: str) -> None:
        """Do nothing."""

    def lost(self, name: str) -> None:
        """Do nothing."""

    async def leave(self, name: str) -> None:
        """Return at once: nobody knows whether calls are open."""

    def stay(self, name: str, url: str) -> None:
        """Do nothing."""


class Roster:
    """The engines as they should stand in the router's list.

    Args:
        router: the router.
        report: gets a line when the router refuses something.
    """

    def __init__(self, router: RouterClient, report: Callable[[str], None]) -> None:
        self._router, self._report = router, report
        self._urls: dict[str, str] = {}  # of those that serve
        self._lost: set[str] = set()
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._told: dict[str, str] = {}  # where the router believes them
        self._drained: set[str] = set()  # by us
        self._dismissed: set[str] = set()  # the router has been told that they leave
        self._changed = asyncio.Event()
        self._refusals: dict[str, str] = {}

    def serving(self, name: str, url: str) -> None:
        """Have the router give calls to an engine, unless it is leaving."""
        if name in self._leaving:
            return
        self._urls[name] = url
        self._lost.discard(name)
        self._changed.set()

    def lost(self, name: str) -> None:
        """Have the router give no calls to an engine that is gone for now."""
        if name in self._leaving:
            return
        self._urls.pop(name, None)
        self._lost.add(name)
        self._changed.set()

    async def leave(self, name: str) -> None:
        """Return when the router has forgotten an engine: none of its calls is open."""
        self._urls.pop(name, None)
        self._lost.discard(name)
        gone = self._leaving.setdefault(name, asyncio.get_running_loop().create_future())
        self._changed.set()
        await gone

    def stay(self, name: str, url: str) -> None:
        """Have an engine stay that was to leave; it may be forgotten already."""
        self._leaving.pop(name, None)
        self._dismissed.discard(name)
        self._drained.add(name)  # as far as we know
        self.serving(name, url)

    @property
    def settled(self) -> bool:
        """Whether the router knows every engine that serves."""
        return self._urls.items() <= self._told.items()

    async def keep(self) -> None:
        """Keep the router informed until cancelled."""
        while True:
            self._changed.clear()
            with contextlib.suppress(RouterAway):
                await self.compare()
            wait = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({wait}, timeout=INTERVAL_S)
            wait.cancel()

    async def compare(self) -> None:
        """Tell the router what it has wrong.

        Raises:
            RouterAway: it does not say what it has.
        """
        leaving = dict(self._leaving)  # one that leaves later is not judged by this answer
        there = await self._router.workers()
        for name, url in list(self._urls.items()):
            if self._urls.get(name) == url:
                await self._tell(name, self._should_serve(name, url, there))
        for name in self._lost & there.keys() - self._drained:
            if there[name]["state"] != "draining":
                await self._tell(name, self._drain(name))
        for name, gone in leaving.items():
            await self._see_off(name, gone, there)

    async def _should_serve(self, name: str, url: str, there: _Workers) -> None:
        if name in there and self._told.get(name) == url:
            if name in self._drained:
                await self._router.undrain(name)
                self._drained.discard(name)
            return
        at_this_url = {n for n in self._lost if self._told.get(n) == url}
        for old in (at_this_url | {name}) & there.keys():
            await self._router.remove(old, force=True)
        await self._router.add(name, url)
        self._drained.discard(name)
        if self._urls.get(name) == url:
            self._told[name] = url

    async def _drain(self, name: str) -> None:
        await self._router.drain(name)
        self._drained.add(name)

    async def _see_off(self, name: str, gone: asyncio.Future[None], there: _Workers) -> None:
        if self._leaving.get(name) is not gone:  # it stays after all
            return
        if name in there:
            if name not in self._dismissed or there[name]["state"] in _TAKES_CALLS:
                await self._tell(name, self._dismiss(name))
            return
        del self._leaving[name]
        self._told.pop(name, None)
        self._drained.discard(name)
        self._dismissed.discard(name)
        if not gone.done():
            gone.set_result(None)

    async def _dismiss(self, name: str) -> None:
        await self._router.remove(name)
        self._dismissed.add(name)

    async def _tell(self, name: str, telling: Any) -> None:
        """Await ``telling``; a refusal is reported once, and tried again next time."""
        try:
            await telling
            self._refusals.pop(name, None)
        except RouterAway as why:
            if self._refusals.get(name) != str(why):
                self._refusals[name] = str(why)
                self._report(f"engine {name}: the router says: {why}")
