"""The router's metrics in Prometheus form, ``hexgen_router_*``; docs/metrics.md lists them.

Counters are read from the :class:`~hexgen_vllm.router.ledger.Ledger` and the coordinator when they
are asked for, so that a call pays for a few integer additions. Labels are bounded: endpoints,
engines and reason words, and of the names that clients choose (workflow types, tenants, models)
so many as :class:`~hexgen_vllm.router.labels.Names` tells apart; never workflows or requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from hexgen_vllm import __version__
from hexgen_vllm.policy.load import EngineLoad
from hexgen_vllm.router.answers import Fault, Outcome
from hexgen_vllm.router.endpoints import ENDPOINT_NAMES
from hexgen_vllm.router.families import counter, gauge
from hexgen_vllm.router.fleet import Fleet
from hexgen_vllm.router.job import Job
from hexgen_vllm.router.ledger import Ledger
from hexgen_vllm.router.outcomes import Outcomes
from hexgen_vllm.router.pressure import Pressure
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.timings import Timings
from hexgen_vllm.router.usage import Usages
from hexgen_vllm.tune.online import EVENTS, OnlineTuner
from hexgen_vllm.types import Call

_NAMES_TENANT: Final = re.compile(rb'[a-z_]+\{(?:[^}]*,)?(?:tenant|type)="')
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def without_tenants(text: bytes) -> bytes:
    """Return an exposition without samples that name tenants or their types of workflows."""
    return b"".join(line for line in text.splitlines(True) if not _NAMES_TENANT.match(line))


class Metrics:
    """Histograms, and everything else at the time of asking.

    Attributes:
        outcomes: what became of workflows.
        usage: tokens and calls by model and tenant.
        call_s: time from receipt to the end of calls that were answered, by endpoint.
        first_token_s: time from receipt to the first token of streams, by endpoint.
        held_s: time from receipt to the first placement.
    """

    def __init__(
        self, ledger: Ledger, service: Service, fleet: Fleet, tuner: OnlineTuner | None = None
    ) -> None:
        self.outcomes, self.usage = Outcomes(), Usages()
        service.coordinator.workflows.on_end = self.outcomes.add
        self._registry = CollectorRegistry()
        for collector in (_State(ledger, service, fleet), self.usage, Pressure(service)):
            self._registry.register(collector)
        self._registry.register(_Workflows(self.outcomes, service))
        if tuner is not None:
            self._registry.register(_Tuning(tuner))
        self.call_s = Timings(
            "call_seconds", "Time from receipt to the end of answered calls", "endpoint"
        )
        self.first_token_s = Timings(
            "time_to_first_token_seconds",
            "Time from receipt to the first token of streams",
            "endpoint",
        )
        self.held_s = Timings("held_seconds", "Time from receipt of a call to its first placement")
        for timings in (self.call_s, self.first_token_s, self.held_s):
            self._registry.register(timings)

    def add(self, collector: Collector) -> None:
        """Show what ``collector`` yields, too."""
        self._registry.register(collector)

    def began(self, call: Call) -> None:
        """Note a call that is to be placed, before it ends."""
        self.outcomes.begun(call.workflow_type)
        self.usage.begun(call)

    def ended(self, job: Job, now: float) -> None:
        """Count a call that ended, however it did."""
        if job.accepted is None:
            return
        self.usage.add(job.accepted.call, job.result)
        if job.result.ok:
            self.call_s.observe(now - job.began_s, job.endpoint.name)
        if job.first_token_s is not None:
            self.first_token_s.observe(job.first_token_s - job.began_s, job.endpoint.name)

    def exposition(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)

    def families(self) -> Iterable[Metric]:
        """Return all metrics as objects."""
        return self._registry.collect()


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
        # From the first scrape on, also what has not happened: Prometheus sees no increase in a
        # counter that appears, and an alert that divides by one that is not there never fires.
        yield counter("calls_received", "Calls that came in", ("endpoint",),
                       (((name,), book.arrived[name]) for name in ENDPOINT_NAMES))  # fmt: skip
        yield counter("calls", "Calls that ended", ("endpoint", "outcome"),
                      (((name, outcome.value), book.ended[name, outcome])
                       for name in ENDPOINT_NAMES for outcome in Outcome))  # fmt: skip
        again = [outcome for outcome in Outcome if outcome.ending.fault is Fault.ENGINE]
        yield counter("retries", "Calls sent again", ("reason",),
                      (((why.value,), book.retries[why]) for why in again))  # fmt: skip
        yield counter("placements", "Calls placed", ("engine", "reason"), book.placements.items())
        yield counter("overdue_calls", "Calls answered after they were due", (),
                       (((), book.overdue),))  # fmt: skip
        yield counter("clamped_claims", "Claims beyond a ceiling, by what was claimed",
                       ("claim",), (((name,), n) for name, n in book.clamped.items()))  # fmt: skip
        yield gauge("open_calls", "Calls that have not ended", (), (((), book.open),))
        yield gauge("held_calls", "Calls waiting in the router", (), (((), coordinator.held),))
        about = (__version__, coordinator.options.policy)
        yield gauge("info", "Always 1; version and policy in force", ("version", "policy"),
                    ((about, 1),))  # fmt: skip

    def _engines(self) -> Iterator[Metric]:
        engines = self._fleet.engines.values()
        yield gauge("ready_engines", "Engines that get calls", (),
                    (((), len(self._fleet.ready())),))  # fmt: skip
        yield gauge("engine_up", "Whether an engine gets calls", ("engine", "kind"),
                     (((target, e.kind.value if e.spec else "unknown"), e.takes_calls)
                      for e in engines for target in e.targets))  # fmt: skip
        loads = self._service.coordinator.engines.values()
        gauges = (
            ("engine_calls", "Calls in flight", [(e, len(e.in_flight)) for e in loads]),
            ("engine_tokens", "Tokens to prefill and to decode",
             [(e, e.outstanding_tokens()) for e in loads]),
            ("engine_fit_error", "Relative error of the step-cost fit",
             [(e, _fit_error(e)) for e in loads]),
            ("engine_step_seconds", "Fitted time of a decode step of one sequence",
             [(e, _step_s(e)) for e in loads]),
            ("engine_running", "Sequences in the batch, as the engine says",
             [(e, e.report.running) for e in loads]),
            ("engine_waiting", "Calls queued in the engine, as it says",
             [(e, e.report.waiting) for e in loads]),
            ("engine_kv_usage_ratio", "Share of KV blocks in use, as the engine says, 0 to 1",
             [(e, e.report.kv_usage) for e in loads]),
        )  # fmt: skip
        for name, doc, values in gauges:
            known = (((e.engine_id,), v) for e, v in values if v is not None)
            yield gauge(name, doc, ("engine",), known)
        yield counter("engine_preemptions", "Preemptions since the engine started, as it says",
                      ("engine",), (((e.engine_id,), e.report.preemptions) for e in loads
                                    if e.report.preemptions is not None))  # fmt: skip


class _Workflows(Collector):
    """Reads what became of workflows."""

    def __init__(self, outcomes: Outcomes, service: Service) -> None:
        self._outcomes, self._service = outcomes, service

    def collect(self) -> Iterator[Metric]:
        """Yield the counts of open and ended workflows."""
        open_now = len(self._service.coordinator.workflows)
        yield gauge("open_workflows", "Workflows that have begun and not ended", (),
                    (((), open_now),))  # fmt: skip
        yield counter("workflows", "Workflows that ended, by type and outcome",
                      ("type", "outcome"), self._outcomes.totals().items())  # fmt: skip


class _Tuning(Collector):
    """Reads what tuning does."""

    def __init__(self, tuner: OnlineTuner) -> None:
        self._tuner = tuner

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of tuning."""
        tuner = self._tuner
        yield counter("tune_events", "What tuning did", ("what",),
                       (((what,), tuner.counts.get(what, 0)) for what in EVENTS))  # fmt: skip
        yield gauge("tune_knob", "Values in force of tuned options", ("option",),
                     (((name,), value) for name, value in tuner.values.items()))  # fmt: skip
        error = tuner.simulator_error
        yield gauge("tune_simulator_error", "Relative error of the simulated live loss", (),
                     () if error is None else (((), error),))  # fmt: skip


def _fit_error(engine: EngineLoad) -> float | None:
    own = engine.report.fit_error
    return own if engine.report.cost is not None else engine.traffic_fit.error()


def _step_s(engine: EngineLoad) -> float | None:
    cost = engine.cost()
    return None if cost is None else cost.step_s(1)
