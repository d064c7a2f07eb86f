"""One engine's life as the supervisor sees it: placed by Ray, serving, lost, placed again.

The engines of one entry of the cluster file are a group: as many as are wanted, and those that
leave.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from hexgen_vllm.clock import Clock
from hexgen_vllm.cluster.processes import Backoff, ProcessFailed
from hexgen_vllm.cluster.ray import nodes
from hexgen_vllm.cluster.ray.nodes import (
    EngineHost,
    Library,
    Place,
    Started,
)
from hexgen_vllm.cluster.ray.router import Roster, Unlisted
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry

_PATIENCE_S: Final = 5.0  # until it is worth saying that an engine waits for a node
_AGAIN_S: Final = 0.5
_END_S: Final = 10.0
_STOP_EXTRA_S: Final = 5.0


class Listener(Protocol):
    """Who is told where engines serve."""

    def serving(self, name: str, url: str) -> None:
        """Take note of an engine that serves."""

    def lost(self, name: str) -> None:
        """Take note of an engine that does not serve any more."""


class Replica:
    """One engine.

    Attributes:
        name: its name in the router.
        url: where it serves, ``None`` while it does not.
        start_s: seconds its latest start took, once it was placed.
        ready: done when it serves for the first time; raises ProcessFailed if its start fails.
        leaving: whether it is to end when its calls have.
        placeless: whether it has waited for a node for so long that there is none.
    """

    def __init__(
        self,
        name: str,
        entry: EngineEntry,
        spec: ClusterSpec,
        library: Library,
        listener: Listener,
        *,
        clock: Clock,
        log_dir: str,
        report: Callable[[str], None],
    ) -> None:
        self.name = name
        self.url: str | None = None
        self.start_s: float | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(_seen)
        self.leaving = self.placeless = False
        self._entry, self._spec, self._library, self._listener = entry, spec, library, listener
        self._clock, self._report = clock, report
        self._backoff = Backoff(spec.restart_after_s)
        self._placed = False
        options = nodes.actor_options(entry.placement)
        self._host = library.ray.remote(EngineHost).options(**options, max_restarts=-1)
        self._arguments = (entry, name, log_dir, spec.start_timeout_s)
        self._actor = self._host.remote(*self._arguments)

    async def run(self) -> None:
        """Keep the engine serving until cancelled; Ray places it again when it was lost.

        One that is lost while it is leaving is not missed.
        """
        errors = self._library.ray.exceptions
        again: Callable[[], Awaitable[None]] = _nothing
        while True:
            since_s = self._clock.now()
            try:
                await again()
                why, again = await self._life(), self._place_anew
            except errors.ActorDiedError as error:  # Ray does not place this one again
                why, again = self._cannot_run(error), self._make_anew
            except errors.RayActorError:
                why, again = "was lost with its node, or with what ran it there", _nothing
            except Exception as error:  # whatever it was, an engine must not go unwatched
                why, again = self._cannot_run(error), self._place_anew
            served = self._lost(why)
            if self.leaving:  # who sees it off ends the rest
                return
            between_lives = again is _nothing and not served  # Ray is at it
            lived_s = self._clock.now() - since_s
            await asyncio.sleep(_AGAIN_S if between_lives else self._backoff.after(lived_s))

    def _lost(self, why: str) -> bool:
        """Note that the engine does not serve; return whether it did."""
        served, self.url, self._placed = self.url is not None, None, False
        if served:
            self._listener.lost(self.name)
            self._report(f"engine {self.name}: {why}")
        return served

    async def _place_anew(self) -> None:
        """End the actor, which Ray then places again; return when it has ended."""
        ended = self._actor.linger.remote()
        self._library.ray.kill(self._actor, no_restart=False)
        with contextlib.suppress(self._library.ray.exceptions.RayError, asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(ended), _END_S)

    async def _make_anew(self) -> None:
        self._actor = self._host.remote(*self._arguments)

    def _cannot_run(self, error: Exception) -> str:
        why = _last_line(error)
        self._failed(ProcessFailed(f"engine {self.name} cannot be run: {why}."))
        return why

    def _failed(self, error: ProcessFailed) -> None:
        """Note that a start failed; the first one is everybody's concern."""
        if not self.ready.done():
            self.ready.set_exception(error)
        elif self.url is None:
            self._report(str(error))

    async def _life(self) -> str:
        """Be placed, start and serve; return how the engine ended."""
        await self._place()
        began_s = self._clock.now()
        started: Started = await self._actor.start.remote()
        if started.failure:
            self._failed(ProcessFailed(started.failure))
            return "did not start"
        self.url, self.start_s = started.url, self._clock.now() - began_s
        self._report(f"engine {self.name}: healthy at {self.url}")
        self._listener.serving(self.name, self._entry.worker_url(self.url))
        if not self.ready.done():
            self.ready.set_result(None)
        return str(await self._actor.wait.remote())

    async def _place(self) -> None:
        """Wait until Ray has found a node."""
        placing = asyncio.ensure_future(_awaited(self._actor.place.remote()))
        try:
            done, _ = await asyncio.wait({placing}, timeout=_PATIENCE_S)
            if not done:
                self.placeless = True
                asked = nodes.resources_text(nodes.demand(self._entry.placement))
                self._report(f"engine {self.name}: waiting for a node with {asked} free")
            place: Place = await placing
        finally:
            self.placeless = False
            placing.cancel()
        self._placed = True
        self._report(f"engine {self.name}: starting on node {place.node_id[:8]} at {place.address}")

    async def stop(self) -> None:
        """End the engine and its actor."""
        grace_s = self._spec.stop_grace_s
        if self._placed:
            with contextlib.suppress(self._library.ray.exceptions.RayError, asyncio.TimeoutError):
                stopping = _awaited(self._actor.stop.remote(grace_s))
                await asyncio.wait_for(stopping, grace_s + _STOP_EXTRA_S)
        self._library.ray.kill(self._actor, no_restart=True)
        self.url = None

    def kill(self) -> None:
        """Kill the engine at once; whoever waits in :meth:`stop` need not wait."""
        if self._placed:
            self._actor.kill.remote()


async def _awaited(reference: Awaitable[Any]) -> Any:
    return await reference


def _seen(future: asyncio.Future[None]) -> None:
    """Take note of a failure even where nobody waits for it any more."""
    if not future.cancelled():
        future.exception()


async def _nothing() -> None:
    """Ray places the actor again by itself."""


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


class EngineGroup:
    """Engines that are alike.

    Attributes:
        entry: what they are.
        replicas: those there are, by name, leaving ones too.

    Args:
        entry: what they are.
        make: makes the engine of a name.
        roster: sees off those that leave.
        report: gets a line for each that comes or goes.
    """

    def __init__(
        self,
        entry: EngineEntry,
        make: Callable[[str], Replica],
        roster: Roster | Unlisted,
        report: Callable[[str], None],
    ) -> None:
        self.entry = entry
        self.replicas: dict[str, Replica] = {}
        self._make, self._roster, self._report = make, roster, report
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._farewells: set[asyncio.Task[None]] = set()
        self._undecided: dict[str, asyncio.Task[None]] = {}  # those of engines that may stay yet

    @property
    def staying(self) -> list[Replica]:
        """Those that are not to leave."""
        return [replica for replica in self.replicas.values() if not replica.leaving]

    def resize(self, count: int, load: Callable[[str], int]) -> None:
        """Have ``count`` engines stay.

        Those that are leaving stay after all where more are wanted. A name is free again when its
        engine has gone, so that there may be fewer for a while.

        Args:
            count: within the bounds of the entry.
            load: tells how many calls an engine has; the idlest ones leave, newest first.
        """
        able = [name for name in self._undecided if self.replicas[name].url is not None]
        for name in able[: max(count - len(self.staying), 0)]:
            self._keep(name)
        free = [name for name in self.entry.replicas() if name not in self.replicas]
        for name in free[: max(count - len(self.staying), 0)]:
            self._add(name)
        spare = len(self.staying) - count
        newest_first = reversed(self.staying)
        by_load = sorted(newest_first, key=lambda one: (one.url is not None, load(one.name)))
        for replica in by_load[: max(spare, 0)]:
            replica.leaving = True
            farewell = asyncio.ensure_future(self._see_off(replica))
            self._undecided[replica.name] = farewell
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    def _keep(self, name: str) -> None:
        """Have an engine stay that was to leave and serves still."""
        replica = self.replicas[name]
        assert replica.url is not None
        self._undecided.pop(name).cancel()
        replica.leaving = False
        self._roster.stay(name, self.entry.worker_url(replica.url))
        self._report(f"engine {name}: stays after all")

    def _add(self, name: str) -> None:
        replica = self.replicas[name] = self._make(name)
        self._tasks[name] = asyncio.ensure_future(replica.run())

    async def _see_off(self, replica: Replica) -> None:
        self._report(f"engine {replica.name}: leaves when its calls have ended")
        await self._roster.leave(replica.name)
        del self._undecided[replica.name]
        await self._end(replica)
        self._report(f"engine {replica.name}: gone")

    async def _end(self, replica: Replica) -> None:
        task = self._tasks[replica.name]
        task.cancel()
        await asyncio.wait({task})
        await replica.stop()
        del self._tasks[replica.name]
        del self.replicas[replica.name]

    async def stop(self) -> None:
        """End all engines at once, whether they have calls or not."""
        for farewell in self._farewells:
            farewell.cancel()
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await asyncio.gather(*map(self._end, list(self.replicas.values())))
