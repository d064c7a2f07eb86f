"""How many engines the router would have, for autoscalers that are not ours.

Kubernetes' HPA multiplies the engines there are by a ratio; KEDA and scripts read numbers. Both get
what :mod:`hexgen_vllm.policy.scaling` makes of the load, without memory: whoever scales has its own
windows and pauses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.policy.scaling import EngineType, OfferedLoad, Scaler, ScalingOptions
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.observe.families import gauge
from hexgen_vllm.router.status.overview import Overview
from hexgen_vllm.router.status.readings import Readings

INTERVAL_S: Final = 2.0
"""Seconds between two looks at the load."""
_OPTIONS: Final = ScalingOptions(cooldown_s=0.0, down_after_s=0.0)
_TIMES: Final = 4  # engines are not asked for beyond so many times those there are


class DemandCollector(Collector):
    """Looks at the load now and then.

    Args:
        context: of the router.
        processes: of the router, of which this one sees its share of the calls.
    """

    def __init__(self, context: Context, processes: int = 1) -> None:
        self._context, self._processes = context, processes
        self._overview = Overview(context)
        self._readings = Readings(_OPTIONS.horizon_s)
        self._looked_s = -math.inf
        self._ready = self._wanted = 0

    def tick(self, now: float) -> None:
        """Look at the load if it is time."""
        if now - self._looked_s < INTERVAL_S:
            return
        self._looked_s = now
        self._readings.take(self._overview.data(now), self._overview.measured(), now)
        names = [engine.name for engine in self._context.fleet.ready()]
        self._ready = self._wanted = len(names)
        if names:
            kind = EngineType(
                name="engines",
                count=len(names),
                serving=len(names),
                least=1,
                most=_TIMES * len(names),
                calls_per_s=self._readings.calls_per_s(names),
            )
            self._wanted = Scaler(_OPTIONS).wanted([kind], self._traffic(), now)["engines"]

    def _traffic(self) -> OfferedLoad:
        found = self._readings.traffic(None)
        served = found.served_per_s
        return OfferedLoad(
            arrivals_per_s=self._processes * found.arrivals_per_s,
            waiting=self._processes * found.waiting,
            slack=found.slack,
            start_s=found.start_s,
            served_per_s=None if served is None else self._processes * served,
        )

    def view(self) -> dict[str, Any]:
        """Return it as JSON can say it."""
        return {"ready": self._ready, "wanted": self._wanted, "ratio": round(self._ratio(), 4)}

    def _ratio(self) -> float:
        return self._wanted / self._ready if self._ready else 1.0

    def collect(self) -> Iterator[Metric]:
        """Yield the engines wanted, and their ratio to those there are."""
        yield gauge("engines_wanted", "Engines that would keep what is predicted on time", (),
                    (((), self._wanted),))  # fmt: skip
        yield gauge("engine_demand_ratio", "Engines wanted, over those that get calls", (),
                    (((), self._ratio()),))  # fmt: skip
