"""How short of time the open calls are, and what waits, looked at when metrics are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm.router.families import gauge
from hexgen_vllm.router.margins import SLACK_BOUNDS_S, by_workflow, histogram, margins
from hexgen_vllm.router.service import Service


class Pressure(Collector):
    """Reads open calls."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield slack, workflows at risk, and the size and age of the queue."""
        coordinator, now = self._service.coordinator, self._service.clock.now()
        found = list(margins(coordinator, now))
        bounds = [*(f"{bound:g}" for bound in SLACK_BOUNDS_S), "+Inf"]
        counts = accumulate(histogram(found))
        yield gauge("slack_calls", "Open calls with at most le seconds of slack", ("le",),
                    (((b,), n) for b, n in zip(bounds, counts, strict=True)))  # fmt: skip
        risky = [one for one in by_workflow(found) if one.at_risk]
        late = sum(one.slack_s < 0 for one in risky)
        yield gauge("workflows_at_risk", "Open workflows short of time: tight ones may yet be on "
                    "time, late ones are not expected to", ("outlook",),
                    ((("late",), late), (("tight",), len(risky) - late)))  # fmt: skip
        waiting = [one.entry.demand for one in found if one.entry.engine is None]
        tokens = sum(d.call.prompt_tokens + d.output_tokens for d in waiting)
        oldest_s = max((now - d.call.arrived_s for d in waiting), default=0.0)
        yield gauge("held_tokens", "Prompt and expected output tokens of calls waiting in the "
                    "router", (), (((), tokens),))  # fmt: skip
        yield gauge("oldest_held_seconds", "Age of the call waiting longest in the router", (),
                    (((), oldest_s),))  # fmt: skip
