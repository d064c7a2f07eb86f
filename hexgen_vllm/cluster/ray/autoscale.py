"""Asks the router how things are, and the policy how many engines there should be.

What the router says becomes numbers for :mod:`hexgen_vllm.policy.scaling` as it does for the
router's own signal to other autoscalers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from hexgen_vllm.clock import Clock
from hexgen_vllm.cluster.ray.engines import EngineGroup
from hexgen_vllm.cluster.ray.router import RouterAway, RouterClient
from hexgen_vllm.cluster.ray_options import RayOptions
from hexgen_vllm.policy.scaling import EngineType, Scaler
from hexgen_vllm.router.status.readings import Readings

_LOG = logging.getLogger(__name__)


class Autoscale:
    """Keeps the number of engines of each group where the policy wants it.

    Args:
        groups: the engines.
        router: says how things are.
        options: how often, and when.
        clock: its time.
        report: gets a line for each change.
    """

    def __init__(
        self,
        groups: Sequence[EngineGroup],
        router: RouterClient,
        options: RayOptions,
        clock: Clock,
        report: Callable[[str], None],
    ) -> None:
        self._groups, self._router, self._clock, self._report = groups, router, clock, report
        self._interval_s = options.interval_s
        scaling = options.scaling_options()
        self._scaler, self._readings = Scaler(scaling), Readings(scaling.horizon_s)

    async def keep(self) -> None:
        """Decide at intervals until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                overview = await self._router.overview()
                diagnostics = await self._router.diagnostics()
            except RouterAway as why:
                _LOG.debug("no decision: %s", why)
                continue
            self._readings.take(overview, diagnostics, self._clock.now())
            self._decide()

    def _decide(self) -> None:
        traffic = self._readings.traffic(self._start_s())
        types = [self._type(group) for group in self._groups]
        wanted = self._scaler.wanted(types, traffic, self._clock.now())
        for group, was in zip(self._groups, types, strict=True):
            count = wanted[was.name]
            if count != was.count:
                self._report(
                    f"engines {was.name}: {was.count} -> {count} "
                    f"({traffic.arrivals_per_s:.2g} calls/s come, {traffic.waiting:g} wait)"
                )
            group.resize(count, self._readings.load)

    def _type(self, group: EngineGroup) -> EngineType:
        placement = group.entry.placement
        return EngineType(
            name=group.entry.name,
            count=len(group.staying),
            serving=sum(replica.url is not None for replica in group.staying),
            least=placement.min_replicas,
            most=placement.most,
            calls_per_s=self._readings.calls_per_s(group.entry.replicas()),
            placeless=sum(replica.placeless for replica in group.staying),
        )

    def _start_s(self) -> float | None:
        """Return the longest of the engines' latest starts, seconds."""
        found = [one.start_s for group in self._groups for one in group.staying]
        return max((seconds for seconds in found if seconds is not None), default=None)
