"""The router's metrics in Prometheus form, ``hexgen_router_*``.

Counters are read from the :class:`~hexgen_vllm.router.ledger.Ledger` and the coordinator when they
are asked for, so that a call pays for a few integer additions. Labels are bounded: endpoints,
engines and reason words, never workflows or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hexgen_vllm.policy.load import EngineLoad
from hexgen_vllm.router.fleet import Fleet
from hexgen_vllm.router.ledger import Ledger
from hexgen_vllm.router.outcomes import Outcomes
from hexgen_vllm.router.service import Service
from hexgen_vllm.tune.online import OnlineTuner
from hexgen_vllm.types import EngineState

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "hexgen_router_"
_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Metrics:
    """Histograms, and everything else at the time of asking.

    Attributes:
        call_s: time from receipt to the end of calls that were answered, by endpoint.
        held_s: time from receipt to the first placement.
    """

    def __init__(
        self, ledger: Ledger, service: Service, fleet: Fleet, tuner: OnlineTuner | None = None
    ) -> None:
        self.outcomes = Outcomes()
        service.coordinator.workflows.on_end = self.outcomes.add
        self._registry = CollectorRegistry()
        self._registry.register(_State(ledger, service, fleet))
        if tuner is not None:
            self._registry.register(_Tuning(tuner))
        self.call_s = Histogram(
            f"{_PREFIX}call_seconds",
            "Time from receipt to the end of answered calls",
            ("endpoint",),
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.held_s = Histogram(
            f"{_PREFIX}held_seconds",
            "Time from receipt of a call to its first placement",
            registry=self._registry,
            buckets=(0.001, 0.01, *_SECONDS),
        )

    def exposition(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)


class _State(Collector):
    """Reads counters and gauges where they are kept."""

    def __init__(self, ledger: Ledger, service: Service, fleet: Fleet) -> None:
        self._ledger, self._service, self._fleet = ledger, service, fleet

    def collect(self) -> Iterator[Metric]:
        """Yield every metric but the histograms."""
        yield from self._calls()
        yield from self._engines()

    def _calls(self) -> Iterator[Metric]:
        book, coordinator = self._ledger, self._service.coordinator
        yield _counter("calls_received", "Calls that came in", ("endpoint",),
                       (((name,), n) for name, n in book.arrived.items()))  # fmt: skip
        yield _counter("calls", "Calls that ended", ("endpoint", "outcome"), book.ended.items())
        yield _counter("retries", "Calls sent again", ("reason",),
                       (((name,), n) for name, n in book.retries.items()))  # fmt: skip
        yield _counter("placements", "Calls placed", ("engine", "reason"), book.placements.items())
        yield _counter("overdue_calls", "Calls answered after they were due", (),
                       (((), book.overdue),))  # fmt: skip
        yield _gauge("open_calls", "Calls that have not ended", (), (((), book.open),))
        yield _gauge("held_calls", "Calls waiting in the router", (), (((), coordinator.held),))
        yield _gauge("open_workflows", "Workflows that have begun and not ended", (),
                     (((), len(coordinator.workflows)),))  # fmt: skip

    def _engines(self) -> Iterator[Metric]:
        engines = self._fleet.engines.values()
        yield _gauge("engine_up", "Whether an engine gets calls", ("engine", "kind"),
                     (((e.name, e.kind.value), e.state is EngineState.READY)
                      for e in engines))  # fmt: skip
        loads = self._service.coordinator.engines.values()
        gauges = (
            ("engine_calls", "Calls in flight", [(e, len(e.in_flight)) for e in loads]),
            ("engine_tokens", "Tokens to prefill and to decode",
             [(e, e.outstanding_tokens()) for e in loads]),
            ("engine_fit_error", "Relative error of the step-cost fit",
             [(e, _fit_error(e)) for e in loads]),
            ("engine_step_seconds", "Fitted time of a decode step of one sequence",
             [(e, _step_s(e)) for e in loads]),
        )  # fmt: skip
        for name, doc, values in gauges:
            known = (((e.engine_id,), v) for e, v in values if v is not None)
            yield _gauge(name, doc, ("engine",), known)


class _Tuning(Collector):
    """Reads what tuning does."""

    def __init__(self, tuner: OnlineTuner) -> None:
        self._tuner = tuner

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of tuning."""
        tuner = self._tuner
        yield _counter("tune_events", "What tuning did", ("what",),
                       (((what,), n) for what, n in tuner.counts.items()))  # fmt: skip
        yield _gauge("tune_knob", "Values in force of tuned options", ("option",),
                     (((name,), value) for name, value in tuner.values.items()))  # fmt: skip
        error = tuner.simulator_error
        yield _gauge("tune_simulator_error", "Relative error of the simulated live loss", (),
                     () if error is None else (((), error),))  # fmt: skip


def _fit_error(engine: EngineLoad) -> float | None:
    own = engine.report.fit_error
    return own if engine.report.cost is not None else engine.traffic_fit.error()


def _step_s(engine: EngineLoad) -> float | None:
    cost = engine.cost()
    return None if cost is None else cost.step_s(1)


_Values = Iterable[tuple[tuple[str, ...], float]]


def _counter(name: str, doc: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, doc, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _gauge(name: str, doc: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, doc, labels=labels)
    for label, value in values:
        family.add_metric(label, float(value))
    return family
