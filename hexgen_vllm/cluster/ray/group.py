"""The engines of one entry of the cluster file: as many as are wanted, and those that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hexgen_vllm.cluster.ray.replica import Replica
from hexgen_vllm.cluster.ray.roster import Roster, Unlisted
from hexgen_vllm.cluster.spec import EngineEntry


class Group:
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
        self._roster.stay(name, replica.url)
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
