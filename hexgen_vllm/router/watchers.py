"""The tasks that watch the engines, one each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.fleet import Engine, Fleet
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.router.probe import Found, Probe
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.watcher import Watcher


class Watchers:
    """Starts and stops watching.

    Attributes:
        probe: what they ask engines with.

    Args:
        fleet: whose picture is kept true.
        service: takes telemetry.
        probe: asks engines.
        options: intervals and thresholds.
        clock: their time.
    """

    def __init__(
        self, fleet: Fleet, service: Service, probe: Probe, options: RouterOptions, clock: Clock
    ) -> None:
        self.probe = probe
        self._fleet, self._service, self._options = fleet, service, options
        self._clock = clock
        self._watchers: dict[str, Watcher] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Watch every engine of the fleet."""
        for engine in self._fleet.engines.values():
            self._watch(engine)

    def add(self, worker: Worker, found: Found) -> None:
        """Take in an engine that was just looked at, and watch it."""
        engine = self._fleet.add(worker)
        self._fleet.joined(worker.name, found)
        self._watch(engine)

    def expect(self, worker: Worker) -> None:
        """Take in an engine that may not be up yet, and watch it."""
        self._watch(self._fleet.add(worker))

    def retire(self, name: str, why: str) -> None:
        """Give an engine no new calls; forget it once its calls have ended."""
        self._fleet.drain(name, why=why)
        self._fleet.engines[name].leaving = True
        self.sweep()

    def remove(self, name: str) -> None:
        """Forget an engine."""
        self._watchers.pop(name, None)
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
        self._fleet.remove(name)

    def sweep(self) -> None:
        """Forget the engines that were to leave and whose calls have ended."""
        loads = self._service.coordinator.engines
        for name, engine in list(self._fleet.engines.items()):
            busy = any(t in loads and loads[t].in_flight for t in engine.targets)
            if engine.leaving and not busy:
                self.remove(name)

    def suspect(self, name: str) -> None:
        """Check an engine now: something failed there."""
        watcher = self._watchers.get(name)
        if watcher is not None:
            watcher.suspect()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Return the tasks under way; who stops the router cancels them."""
        return tuple(self._tasks.values())

    def _watch(self, engine: Engine) -> None:
        watcher = Watcher(
            engine, self._fleet, self._service, self.probe, self._options, self._clock
        )
        self._watchers[engine.name] = watcher
        self._tasks[engine.name] = asyncio.create_task(watcher.run())
