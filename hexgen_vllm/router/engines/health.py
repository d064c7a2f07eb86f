"""Health of engines: each one is watched by a task, and those that stall are noticed.

A :class:`Watcher` probes an engine that is not up every second. Of one that is up it checks the
health and reads the telemetry at their intervals. What takes an engine down:

* a refused connection, at once
* answers that it is not well, ``health_failure_threshold`` in a row
* as many checks without an answer in time, unless the engine works or no other engine could take
  its calls (:func:`~hexgen_vllm.policy.liveness.deaf_is_down`)

It comes back after ``health_success_threshold`` good checks in a row.

:class:`Stalls` finds engines that have calls and do nothing: stopped, deadlocked, or cut off.
Connections to them stay open, and health checks may pass, since another process answers those.
The sign is silence, because an engine that runs moves all its sequences in every step. How long it
may be silent is decided in :mod:`~hexgen_vllm.policy.liveness`; its silence is measured here. It
cannot be measured while no answer has begun and the engine counts no steps, nor by answers that
their clients do not read: then nothing is concluded. An engine with several data-parallel ranks is
stalled when one of them is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hexgen_vllm.clock import Clock
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.liveness import Silence, borne_s, deaf_is_down
from hexgen_vllm.router.engines.attempt import Attempt, Guard
from hexgen_vllm.router.engines.fleet import Engine, Fleet
from hexgen_vllm.router.engines.probe import Found, Probe, Unreachable
from hexgen_vllm.router.engines.ranks import worker_of
from hexgen_vllm.router.engines.telemetry import Telemetry
from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.router.service import Service
from hexgen_vllm.tasks import woken
from hexgen_vllm.types import EngineKind, EngineReport, EngineState

_LOG = logging.getLogger(__name__)
_DOWN_INTERVAL_S = 1.0
_STOCK_INTERVAL_S = 2.0  # stock metrics are long texts
_STALE_S = 5.0


@dataclass(slots=True)
class _Pulse:
    """Signs of life of one target: an engine, or one of its data-parallel ranks."""

    since_s: float
    steps: int | None = None
    longest_s: float = 0.0
    seen: dict[Attempt, int] = field(default_factory=dict)


class Stalls:
    """Finds stalled engines; looks at all of them about once a second.

    Args:
        options: limits.
        fleet: is told of engines that stall and revive.
        guard: has the tries under way.
        coordinator: has the loads and rates of engines.
    """

    def __init__(
        self, options: RouterOptions, fleet: Fleet, guard: Guard, coordinator: Coordinator
    ) -> None:
        self._options, self._fleet, self._guard = options, fleet, guard
        self._loads = coordinator.engines
        self._pulses: dict[str, _Pulse] = {}

    def tick(self, now: float) -> None:
        """Find stalled engines, and end the answers that an engine which is down owes."""
        engines = list(self._fleet.engines.values())
        tries: dict[str, list[Attempt]] = {target: [] for e in engines for target in e.targets}
        for attempt in self._guard.attempts:
            if not attempt.client_is_slow():
                tries.setdefault(attempt.target, []).append(attempt)
        for engine in engines:
            for target in engine.targets:
                self._look(engine, target, tries[target], now)
        self._pulses = {n: p for n, p in self._pulses.items() if n in tries}
        self._give_up(tries, now)

    def _look(self, engine: Engine, target: str, tries: list[Attempt], now: float) -> None:
        pulse, steps = self._pulses.setdefault(target, _Pulse(now)), engine.steps.get(target)
        was_idle = not pulse.seen
        moved = any(a.progress > pulse.seen.get(a, 0) for a in tries)
        stepped = steps is not None and steps > (pulse.steps or 0)
        pulse.seen = {a: a.progress for a in tries}
        if steps is not None:
            pulse.steps = steps
        if moved or stepped:
            engine.worked(target, now)
            if not was_idle and target in engine.warm:
                pulse.longest_s = max(pulse.longest_s, now - pulse.since_s)
            self._fleet.revived(engine, target)
        if moved or stepped or was_idle or not tries:
            pulse.since_s = now
            engine.silent.pop(target, None)
            return
        engine.silent[target] = now - pulse.since_s
        if self._is_stalled(engine, target, tries, pulse, now):
            why = f"it has done nothing for {now - pulse.since_s:.0f} s"
            self._fleet.stalled(engine, target, why)

    def _is_stalled(
        self, engine: Engine, target: str, tries: list[Attempt], pulse: _Pulse, now: float
    ) -> bool:
        load = self._loads.get(target)
        if load is None or engine.state is EngineState.DOWN:
            return False
        if target not in engine.steps and not any(a.progress for a in tries):
            return False
        cost = load.cost() or UNMEASURED
        silence = Silence(
            warm=target in engine.warm,
            healthy=engine.failing_since_s is None,
            others=self._fleet.others(engine),
            step_s=load.token_s(cost),
            prefill_s=cost.prefill_s(load.queued_prefill_tokens()),
            longest_s=pulse.longest_s,
        )
        return now - pulse.since_s > borne_s(self._options.patience, silence)

    def _give_up(self, tries: dict[str, list[Attempt]], now: float) -> None:
        limit_s = self._options.lost_stream_timeout_secs
        for target, attempts in tries.items():
            engine = self._fleet.engines.get(worker_of(target))
            if engine is None or not engine.up or target in engine.stalled:
                _end_silent(attempts, limit_s, now)


def _end_silent(attempts: Iterable[Attempt], limit_s: float, now: float) -> None:
    for attempt in attempts:
        if attempt.silent_s(now) > limit_s:
            attempt.abort(Outcome.TIMEOUT)


class Watcher:
    """Watches one engine; :meth:`run` is its task."""

    def __init__(
        self,
        engine: Engine,
        fleet: Fleet,
        service: Service,
        probe: Probe,
        options: RouterOptions,
        clock: Clock,
    ) -> None:
        self._engine, self._fleet, self._service = engine, fleet, service
        self._probe, self._options, self._clock = probe, options, clock
        self._wake = asyncio.Event()
        self._passed = self._failed = 0
        self._check_at_s = self._read_at_s = 0.0
        self._heard_s = clock.now()

    def suspect(self) -> None:
        """Check the engine now: a call failed there."""
        self._check_at_s = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Watch until cancelled, or until the engine is no more.

        A cancellation that meets a timeout in a library can get lost.
        """
        while self._is_there():
            try:
                delay_s = await self.turn()
            except Exception:  # whatever it was, an engine must not go unwatched
                _LOG.exception("watching failed engine=%s", self._engine.name)
                delay_s = _DOWN_INTERVAL_S
            await woken(self._wake, delay_s)

    async def turn(self) -> float:
        """Do what is due; return the seconds until the next turn."""
        if self._down():
            await self._try_to_join()
            if self._down():
                return min(_DOWN_INTERVAL_S, self._options.health_check_interval_secs)
        now = self._clock.now()
        if now >= self._check_at_s:
            self._check_at_s = now + self._options.health_check_interval_secs
            await self._check()
        if now >= self._read_at_s and not self._down():
            self._read_at_s = now + self._read_interval_s()
            await self._read()
        return max(min(self._check_at_s, self._read_at_s) - self._clock.now(), 0.0)

    def _is_there(self) -> bool:
        return self._fleet.engines.get(self._engine.name) is self._engine

    def _down(self) -> bool:
        return not self._engine.up

    def _read_interval_s(self) -> float:
        interval_s = self._options.stats_interval_secs
        ours = self._engine.kind is EngineKind.HEXGEN
        return interval_s if ours else max(interval_s, _STOCK_INTERVAL_S)

    async def _try_to_join(self) -> None:
        try:
            await self._probe.healthy(self._engine.worker)
            self._passed += 1
            # An engine that was never up has nothing to be suspected of.
            needed = 1 if self._engine.spec is None else self._options.health_success_threshold
            if self._passed < needed:
                return
            found = await self._probe.find(self._engine.worker)
        except Unreachable as why:
            self._passed = 0
            reason = str(why)
            level = logging.DEBUG if reason == self._engine.why else logging.INFO
            self._engine.why = reason
            _LOG.log(level, "engine not up engine=%s reason=%r", self._engine.name, reason)
            return
        self._passed = self._failed = 0
        self._check_at_s = self._clock.now() + self._options.health_check_interval_secs
        self._read_at_s = 0.0
        self._engine.steps.clear()
        self._fleet.joined(self._engine.name, found)

    async def _check(self) -> None:
        engine, sent_s = self._engine, self._clock.now()
        try:
            await self._probe.healthy(engine.worker)
            self._failed = 0
            engine.failing_since_s = None
            await (self._look_again() if engine.front.mute else self._list_models())
        except Unreachable as why:
            if why.short:
                return
            self._failed += 1
            if engine.failing_since_s is None:
                engine.failing_since_s = sent_s
            if self._is_there() and self._is_lost(why):
                self._failed = self._passed = 0
                self._fleet.lost(engine.name, str(why))

    def _is_lost(self, why: Unreachable) -> bool:
        """Whether an engine whose health check failed gets no more calls."""
        engine, now = self._engine, self._clock.now()
        if why.refused or self._failed < self._options.health_failure_threshold:
            return why.refused
        if not why.silent:
            return True
        return deaf_is_down(
            self._options.patience,
            failing_s=0.0 if engine.failing_since_s is None else now - engine.failing_since_s,
            worked_s=now - engine.worked_s,
            others=self._fleet.others(engine),
            warm=len(engine.warm) == len(engine.targets),
        )

    async def _look_again(self) -> None:
        """Find out what an engine is that may not have had time to say so."""
        try:
            found = await self._probe.find(self._engine.worker)
        except Unreachable:
            return  # the health check decides
        if self._engine.up:
            self._fleet.described(self._engine.name, found)

    async def _list_models(self) -> None:
        try:
            cards = await self._probe.models(self._engine.worker)
        except Unreachable:
            return  # the health check decides
        if self._engine.up:
            self._fleet.listed(self._engine.name, cards)

    async def _read(self) -> None:
        try:
            engine = self._engine
            readings = await self._probe.telemetry(engine.worker, engine.kind, engine.front)
            if readings and len(readings) != len(engine.targets):  # it was scaled
                found = await self._probe.find(engine.worker)
                self._fleet.described(engine.name, found)
        except Unreachable as why:
            readings = ()
            if why.short:  # steps that nobody could read are not steps that were not made
                self._engine.steps = {}
            self._check_at_s = 0.0  # telemetry may be slow; the health check decides
        now = self._clock.now()
        targets = self._engine.targets
        if len(readings) == len(targets):
            self._heard_s = now
            self._take(dict(zip(targets, readings, strict=True)))
        elif now - self._heard_s > _STALE_S:  # an old picture is worse than none
            for target in targets:
                self._service.engine_reported(target, EngineReport())

    def _take(self, readings: Mapping[str, Telemetry]) -> None:
        before = self._engine.steps
        steps = {t: one.steps for t, one in readings.items() if one.steps is not None}
        self._engine.steps = steps
        if any(steps[target] < before.get(target, 0) for target in steps):
            self._fleet.restarted(self._engine.name)
        for target, reading in readings.items():
            self._service.engine_reported(target, reading.report)


class Watchers:
    """The watchers of all engines.

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
