"""The router's metrics in Prometheus form, ``hexgen_router_*``; docs/metrics.md lists them.

Counters are read from the :class:`~hexgen_vllm.router.observe.ledger.Ledger` and the coordinator
when they are asked for, so that a call pays for a few integer additions. Labels are bounded:
endpoints, engines and reason words, and of the names that clients choose (workflow types, tenants,
models) so many as :class:`~hexgen_vllm.router.observe.ledger.BoundedNames` tells apart; never
workflows or requests.

The time that open calls have to spare, and what waits, is worked out when it is asked for, too. To
histograms of times a call adds three values.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hexgen_vllm import __version__
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.cost import UNMEASURED
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.protection import OpenCall
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.calls.accounts import Accounts
from hexgen_vllm.router.calls.call import Job
from hexgen_vllm.router.endpoints import ENDPOINT_NAMES
from hexgen_vllm.router.engines.fleet import Fleet
from hexgen_vllm.router.errors import Blame, Outcome
from hexgen_vllm.router.http.server import Server
from hexgen_vllm.router.observe.families import PREFIX, counter, gauge
from hexgen_vllm.router.observe.ledger import OTHER, BoundedNames, Ledger, Outcomes
from hexgen_vllm.router.service import Service
from hexgen_vllm.tune.online import EVENTS, OnlineTuner
from hexgen_vllm.types import SLACK_BOUNDS_S, Call, CallResult, slack_counts

RISKY_SHARE: Final = 0.1
"""A workflow with less slack than this share of its budget is at risk."""
BOUNDS_S: Final = [
    0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
]  # fmt: skip
"""Upper bounds of the buckets, seconds; one more bucket holds the rest."""
MAX_TENANTS: Final = 64
MAX_MODELS: Final = 64
WORKFLOW_BOUNDS_S: Final = [
    0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0,
    600.0, 1800.0,
]  # fmt: skip
"""Upper bounds of the buckets of the time of workflows, seconds."""
END_SLACK_BOUNDS_S: Final = [
    -120.0, -60.0, -30.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
]  # fmt: skip
"""Upper bounds of the buckets of the slack of workflows at their end, seconds."""
_KINDS: Final = ("prompt", "cached", "output")
USED: Final = ("answered", "failed", *_KINDS)
"""What is counted of a tenant's calls that ended: calls by outcome, tokens by kind."""
_NAMES_TENANT: Final = re.compile(rb'[a-z_]+\{(?:[^}]*,)?(?:tenant|type)="')
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Margin(NamedTuple):
    """An open call and the seconds its workflow has to spare, demoted or not."""

    entry: OpenCall
    slack_s: float

    @property
    def at_risk(self) -> bool:
        """Whether its workflow will be late, or nearly."""
        run = self.entry.run
        return self.slack_s < RISKY_SHARE * max(run.deadline_s - run.started_s, 0.0)


def margins(coordinator: Coordinator, now: float) -> Iterator[Margin]:
    """Yield every open call.

    One on an engine has what lies between its predicted end and when it is due; one that waits
    has the same for the fastest engine that takes it, should it start now.
    """
    for entry in coordinator.open_calls.values():
        yield Margin(entry, _slack_s(coordinator, entry, now))


def _slack_s(coordinator: Coordinator, entry: OpenCall, now: float) -> float:
    demand = entry.demand
    call_id = demand.call.call_id
    flight = None if entry.engine is None else entry.engine.in_flight.get(call_id)
    if flight is not None:
        end_s = max(flight.placement.finish_s or now, now)
    else:
        able = (e for e in coordinator.engines.values() if e.serves(demand.call))
        alone_s = (e.solo_s(demand, e.cost() or UNMEASURED) for e in able)
        end_s = now + min(alone_s, default=0.0)
    return demand.deadline_s - demand.tail_s - end_s


def by_workflow(found: Iterable[Margin]) -> list[Margin]:
    """Return the call with the least slack of each workflow, least first."""
    worst: dict[str, Margin] = {}
    for one in found:
        name = one.entry.run.workflow_id
        if name not in worst or one.slack_s < worst[name].slack_s:
            worst[name] = one
    return sorted(worst.values(), key=lambda one: one.slack_s)


class Pressure:
    """Reads open calls."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield slack, workflows at risk, and the size and age of the queue."""
        coordinator, now = self._service.coordinator, self._service.clock.now()
        found = list(margins(coordinator, now))
        bounds = [*(f"{bound:g}" for bound in SLACK_BOUNDS_S), "+Inf"]
        counts = accumulate(slack_counts(one.slack_s for one in found))
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


class Connections:
    """Counts the clients of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield how many there are, may be, and were turned away."""
        server = self._server
        yield gauge("client_connections", "Connections of clients, also of those that are told why "
                    "they are turned away", (), (((), len(server.open)),))  # fmt: skip
        yield gauge("most_client_connections", "Connections that clients may have "
                    "(--max-connections)", (), (((), server.max_connections),))  # fmt: skip
        yield counter("refused_connections", "Connections turned away as there were too many", (),
                      (((), server.refused),))  # fmt: skip


class LabeledHistogram:
    """One histogram for each value of a label, or one without a label.

    Args:
        name: of the metric, without prefix.
        text: what it says.
        label: name of the label, ``None`` for none.
        bounds_s: upper bounds of the buckets, seconds; one more bucket holds the rest.
    """

    def __init__(
        self,
        name: str,
        text: str,
        label: str | None = None,
        bounds_s: Sequence[float] = BOUNDS_S,
    ) -> None:
        self._name, self._text, self._label = PREFIX + name, text, label
        self._bounds_s = bounds_s
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if label is None:
            self._begin("")

    def _begin(self, value: str) -> list[int]:
        counts = self._counts[value] = [0] * (len(self._bounds_s) + 1)
        self._sums[value] = 0.0
        return counts

    def observe(self, seconds: float, value: str = "") -> None:
        """Add a time under a value of the label."""
        counts = self._counts.get(value) or self._begin(value)
        counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sums[value] += seconds

    def begin(self, value: str) -> None:
        """Show a value of the label before the first time under it."""
        if value not in self._counts:
            self._begin(value)

    def forget(self, value: str, under: str) -> None:
        """Count what has one value of the label under another one."""
        gone = self._counts.pop(value, None)
        if gone is not None:
            counts = self._counts.get(under) or self._begin(under)
            self._counts[under] = [a + b for a, b in zip(counts, gone, strict=True)]
            self._sums[under] += self._sums.pop(value)

    def collect(self) -> Iterator[Metric]:
        """Yield the histograms."""
        labels = () if self._label is None else (self._label,)
        family = HistogramMetricFamily(self._name, self._text, labels=labels)
        bounds = [*map(str, self._bounds_s), "+Inf"]
        for value, counts in self._counts.items():
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric([value] if labels else [], buckets, self._sums[value])
        yield family


class _Used:
    """What one tenant had of one model."""

    def __init__(self) -> None:
        self.answered = self.failed = 0
        self.prompt = self.cached = self.output = 0


class Usages:
    """Counts ended calls."""

    def __init__(self) -> None:
        self._tenant = BoundedNames(MAX_TENANTS, self._forget_tenant)
        self._model = BoundedNames(MAX_MODELS, self._forget_model)
        self._used: dict[tuple[str, str], _Used] = {}

    def begun(self, call: Call) -> None:
        """Note who is counted before the call ends: counters begin at 0 for Prometheus."""
        if (call.tenant, call.model) not in self._used:
            self._of(call)

    def add(self, call: Call, result: CallResult) -> None:
        """Count a call that ended; one that was not answered has no tokens."""
        used = self._of(call, known=result.ok)
        if not result.ok:
            used.failed += 1
            return
        used.answered += 1
        used.prompt += result.prompt_tokens or 0
        used.cached += result.cached_tokens or 0
        used.output += result.output_tokens or 0

    def _of(self, call: Call, *, known: bool = True) -> _Used:
        """Return the counts that a call belongs to; a model is only believed if it is ``known``."""
        key = self._tenant(call.tenant), self._model(call.model) if known else OTHER
        used = self._used.get(key)
        if used is None:
            used = self._used[key] = _Used()
        return used

    def _forget_tenant(self, name: str) -> None:
        self._merge([(key, (OTHER, key[1])) for key in self._used if key[0] == name])

    def _forget_model(self, name: str) -> None:
        self._merge([(key, (key[0], OTHER)) for key in self._used if key[1] == name])

    def _merge(self, moves: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
        """Count what has one key under another one."""
        for old, new in moves:
            gone = self._used.pop(old)
            used = self._used.setdefault(new, _Used())
            used.answered += gone.answered
            used.failed += gone.failed
            used.prompt += gone.prompt
            used.cached += gone.cached
            used.output += gone.output

    def collect(self) -> Iterator[Metric]:
        """Yield the counters."""
        yield counter("tenant_calls", "Calls that ended, by tenant", ("tenant", "outcome"),
                      self._sums(0, ("answered", "failed")).items())  # fmt: skip
        yield counter("tenant_tokens", "Tokens of answered calls, by tenant; cached ones are "
                      "prompt tokens too", ("tenant", "kind"),
                      self._sums(0, _KINDS).items())  # fmt: skip
        yield counter("model_tokens", "Tokens of answered calls, by model; cached ones are "
                      "prompt tokens too", ("model", "kind"),
                      self._sums(1, _KINDS).items())  # fmt: skip

    def by_tenant(self) -> dict[str, dict[str, int]]:
        """Return by tenant the calls that were answered and that failed, and tokens by kind."""
        sums = self._sums(0, USED)
        return {
            name: {field: sums[name, field] for field in USED}
            for name in {key[0] for key in self._used}
        }

    def _sums(self, by: int, fields: tuple[str, ...]) -> Counter[tuple[str, str]]:
        """Return fields summed by tenant (0) or model (1)."""
        found: Counter[tuple[str, str]] = Counter()
        for key, used in self._used.items():
            for name in fields:
                found[key[by], name] += getattr(used, name)
        return found


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
        workflow_s: time from the first call of a workflow to its last end, by type.
        end_slack_s: time left when workflows with a deadline ended, by type.
        accounts: where the time of workflows went.
        on_workflow_end: told of every ending.
    """

    def __init__(
        self, ledger: Ledger, service: Service, fleet: Fleet, tuner: OnlineTuner | None = None
    ) -> None:
        self.outcomes, self.usage = Outcomes(), Usages()
        self.accounts = Accounts()
        service.coordinator.workflows.on_end = self._workflow_ended
        service.coordinator.workflows.on_move = self.accounts.workflow_moved
        self.on_workflow_end: Callable[[WorkflowRun], None] | None = None
        self.outcomes.on_forget = self._forget_type
        self._registry = CollectorRegistry()
        self.add(_State(ledger, service, fleet))
        self.add(self.usage)
        self.add(Pressure(service))
        self.add(_Workflows(self.outcomes, service))
        if tuner is not None:
            self.add(_Tuning(tuner))
        self.call_s = LabeledHistogram(
            "call_seconds", "Time from receipt to the end of answered calls", "endpoint"
        )
        self.first_token_s = LabeledHistogram(
            "time_to_first_token_seconds",
            "Time from receipt to the first token of streams",
            "endpoint",
        )
        self.held_s = LabeledHistogram(
            "held_seconds", "Time from receipt of a call to its first placement"
        )
        self.workflow_s = LabeledHistogram(
            "workflow_seconds",
            "Time from the first call of a workflow to its last end, by type",
            "type",
            WORKFLOW_BOUNDS_S,
        )
        self.end_slack_s = LabeledHistogram(
            "workflow_slack_seconds",
            "Time left when workflows with a deadline ended, negative for late ones, by type",
            "type",
            END_SLACK_BOUNDS_S,
        )
        timed = (self.call_s, self.first_token_s, self.held_s, self.workflow_s, self.end_slack_s)
        for timings in timed:
            self.add(timings)

    def add(self, collector: Collector) -> None:
        """Show what ``collector`` yields, too."""
        self._registry.register(collector)

    def began(self, call: Call) -> None:
        """Note a call that is to be sent, before it ends."""
        name = self.outcomes.begun(call.workflow_type)
        if name is not None:
            self.workflow_s.begin(name)
            self.end_slack_s.begin(name)
        self.usage.begun(call)

    def _workflow_ended(self, run: WorkflowRun) -> None:
        if self.on_workflow_end is not None:
            self.on_workflow_end(run)
        name = self.outcomes.add(run)
        self.accounts.workflow_ended(run)
        self.workflow_s.observe(run.last_seen_s - run.started_s, name)
        if math.isfinite(run.deadline_s):
            self.end_slack_s.observe(run.deadline_s - run.last_seen_s, name)

    def _forget_type(self, name: str) -> None:
        for timings in (self.workflow_s, self.end_slack_s):
            timings.forget(name, OTHER)

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


class _State:
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
        again = [outcome for outcome in Outcome if outcome.ending.blame is Blame.ENGINE]
        yield counter("retries", "Calls sent again", ("reason",),
                      (((why.value,), book.retries[why]) for why in again))  # fmt: skip
        yield counter("migrations", "Streams whose engine failed, by what became of them",
                      ("outcome",),
                      (((what,), n) for what, n in book.migrations.items()))  # fmt: skip
        yield counter("prefills", "Prompts at prefill engines, by what became of them",
                      ("outcome",),
                      (((what,), n) for what, n in book.prefills.items()))  # fmt: skip
        yield counter("kv_event_batches", "Batches of KV events, by what became of them",
                      ("what",), (((what,), n) for what, n in book.kv_events.items()))  # fmt: skip
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
            ("engine_calls_elsewhere", "Calls that other routers or processes have there",
             [(e, e.elsewhere.calls) for e in loads]),
            ("engine_tokens", "Tokens to prefill and to decode",
             [(e, e.outstanding_tokens()) for e in loads]),
            ("engine_fit_error", "Relative error of the step-cost fit",
             [(e, _fit_error(e)) for e in loads]),
            ("engine_fit_age_seconds", "Time since anything was learned of the step cost",
             [(e, self._service.clock.now() - e.fitted_s) for e in loads]),
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


class _Workflows:
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


class _Tuning:
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
