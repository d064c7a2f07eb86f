"""Keeps the fleet's picture of one engine true: joins it, reads it, notices when it is gone.

States: not up yet or down (probed every second), up (health check and telemetry at their
intervals). A connection that is refused takes it down at once, an answer that it is not well
after ``health_failure_threshold`` in a row. No answer in time takes it down after as many, unless
it works, or nobody else could (:func:`~hexgen_vllm.policy.liveness.deaf_is_down`). It comes back
after ``health_success_threshold`` good checks in a row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from hexgen_vllm.clock import Clock
from hexgen_vllm.policy.liveness import deaf_is_down
from hexgen_vllm.router.fleet import Engine, Fleet
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.router.probe import Probe, Unreachable
from hexgen_vllm.router.reports import Telemetry
from hexgen_vllm.router.service import Service
from hexgen_vllm.types import EngineKind, EngineReport

_LOG = logging.getLogger(__name__)
_DOWN_INTERVAL_S = 1.0
_STOCK_INTERVAL_S = 2.0  # stock metrics are long texts
_STALE_S = 5.0


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
            self._wake.clear()
            try:
                delay_s = await self.turn()
            except Exception:  # whatever it was, an engine must not go unwatched
                _LOG.exception("watching failed engine=%s", self._engine.name)
                delay_s = _DOWN_INTERVAL_S
            await self._sleep(delay_s)

    async def _sleep(self, seconds: float) -> None:
        """Wait until ``seconds`` have passed or somebody suspects the engine."""
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

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
            await self._list_models()
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

    async def _list_models(self) -> None:
        try:
            cards = await self._probe.models(self._engine.worker)
        except Unreachable:
            return  # the health check decides
        if self._engine.up:
            self._fleet.listed(self._engine.name, cards)

    async def _read(self) -> None:
        try:
            readings = await self._probe.telemetry(self._engine.worker, self._engine.kind)
            if readings and len(readings) != len(self._engine.targets):  # it was scaled
                found = await self._probe.find(self._engine.worker)
                self._fleet.described(self._engine.name, found)
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
