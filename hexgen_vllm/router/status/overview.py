"""What the page at ``/ui`` shows, as one JSON object: the state of the router at a glance.

The page is one document without anything from elsewhere, under a strict policy. Several router
processes show themselves as one. Of an engine everything is said but its address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any, Final

from aiohttp import web
from yarl import URL

from hexgen_vllm import __version__
from hexgen_vllm.router.calls.accounts import NO_TIMES, REASONS, Accounts, WorkflowAccount
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.engines.fleet import Engine
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.metrics import (
    USED,
    Margin,
    by_workflow,
    margins,
)
from hexgen_vllm.router.observe.ledger import PERIOD_S, PERIODS
from hexgen_vllm.types import SLACK_BOUNDS_S, Decision, EngineState, Placement, slack_counts
from hexgen_vllm.wire import finite

SHOWN_WORKFLOWS: Final = 20
SHOWN_DECISIONS: Final = 30
SHOWN_TYPES: Final = 10
SHOWN_ENDED: Final = 12
SHOWN_TENANTS: Final = 10
FRESH_S: Final = 0.5
_NO_TIME_S: Final = 1e-6  # a fit that says less per prompt token knows nothing of prefill
_SUMMED: Final = ("max_num_seqs", "kv_tokens", "load")


class Overview:
    """Makes the object; whoever asks within :data:`FRESH_S` seconds gets the same one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._made_s = -math.inf
        self._body = b""

    def body(self) -> bytes:
        """Return it as JSON."""
        now = self._context.clock.now()
        if not self._body or now - self._made_s >= FRESH_S:
            self._body = json.dumps(self.data(now), allow_nan=False).encode()
            self._made_s = now
        return self._body

    def data(self, now: float) -> dict[str, Any]:
        """Return it; times are seconds, those that end with ``in_s`` from now."""
        context = self._context
        coordinator, metrics = context.service.coordinator, context.metrics
        found = list(margins(coordinator, now))
        worst = by_workflow(found)
        risky = [one for one in worst if one.at_risk]
        recent = list(coordinator.log)[-SHOWN_DECISIONS:]
        return {
            "version": __version__,
            "policy": coordinator.options.policy,
            "state": "draining" if context.draining else "ready" if context.ready else "not ready",
            "up_s": round(now - context.epoch_s, 1),
            "replicas": None if context.replicas is None else context.replicas.view(),
            "calls": self._calls(found, now),
            "workflows": {
                "open": len(coordinator.workflows),
                "at_risk": len(risky),
                "late": sum(one.slack_s < 0 for one in risky),
                "demoted": sum(one.entry.run.background for one in worst),
                "shown": [_workflow(one, now) for one in risky[:SHOWN_WORKFLOWS]],
            },
            "slack": {
                "bounds_s": SLACK_BOUNDS_S,
                "calls": slack_counts(one.slack_s for one in found),
            },
            "ended": self._ended(now),
            "tenants": self._tenants(found, now),
            "recent": [_ended_lately(one, now) for one in metrics.accounts.recent(SHOWN_ENDED)],
            "engines": [
                self._engine(engine, target)
                for engine in context.fleet.engines.values()
                for target in engine.targets
            ],
            "decisions": [decision(metrics.accounts, at, one, now) for at, one in reversed(recent)],
        }

    def measured(self, most: int = SHOWN_DECISIONS) -> dict[str, Any]:
        """Return what decisions stand on, and the ``most`` last ones."""
        context, now = self._context, self._context.clock.now()
        recent = list(context.service.coordinator.log)[-most:]
        accounts = context.metrics.accounts
        return {
            "engines": [
                rates_view(context, engine, target)
                for engine in context.fleet.engines.values()
                for target in engine.targets
            ],
            "decisions": [decision(accounts, at, one, now) for at, one in reversed(recent)],
        }

    def _calls(self, found: list[Margin], now: float) -> dict[str, Any]:
        book = self._context.ledger
        waiting = [one.entry.demand for one in found if one.entry.engine is None]
        return {
            "open": book.open,
            "held": self._context.service.coordinator.held,
            "held_tokens": sum(d.call.prompt_tokens + d.output_tokens for d in waiting),
            "oldest_held_s": round(max((now - d.call.arrived_s for d in waiting), default=0.0), 3),
            "received": book.arrived.total(),
            "answered": book.answered(),
            "failed": book.failed(),
            "retries": book.retries.total(),
        }

    def _ended(self, now: float) -> dict[str, Any]:
        outcomes, accounts = self._context.metrics.outcomes, self._context.metrics.accounts
        types = sorted(outcomes.types(now).items(), key=lambda one: -sum(one[1].values()))
        times = accounts.times(now - PERIOD_S * PERIODS)
        return {
            "period_s": PERIOD_S,
            "periods": outcomes.periods(now),
            "types": [
                {"type": name, **counts, **times.get(name, NO_TIMES)}
                for name, counts in types[:SHOWN_TYPES]
            ],
        }

    def _tenants(self, found: list[Margin], now: float) -> list[dict[str, Any]]:
        """Return what tenants have open, and had; those with most open first, then most tokens."""
        shown = self._context.metrics.usage.by_tenant()
        open_now: dict[str, list[Margin]] = {}
        for one in found:
            open_now.setdefault(one.entry.demand.call.tenant, []).append(one)
        rows = []
        for name in {*shown, *open_now}:
            mine = open_now.get(name, [])
            waiting = [one.entry.demand.call.arrived_s for one in mine if one.entry.engine is None]
            rows.append(
                {
                    "tenant": name,
                    "running": len(mine) - len(waiting),
                    "held": len(waiting),
                    "oldest_held_s": round(max(now - min(waiting, default=now), 0.0), 3),
                    "at_risk": len({m.entry.run.workflow_id for m in mine if m.at_risk}),
                    **dict.fromkeys(USED, 0),
                    **shown.get(name, {}),
                }
            )
        return _busiest(rows)

    def _engine(self, engine: Engine, target: str) -> dict[str, Any]:
        spec, load = engine.targets[target], self._context.service.coordinator.engines.get(target)
        shown: dict[str, Any] = {
            "name": target,
            "state": engine.state.value,
            "reason": engine.why,
            "kind": None if spec is None else spec.kind.value,
            "models": [] if spec is None else sorted(spec.models),
            "slots": None if spec is None else spec.max_num_seqs,
            "calls": 0,
        }
        if load is None:
            return shown
        cost, report = load.cost(), load.report
        error = report.fit_error if report.cost is not None else load.traffic_fit.error()
        return shown | {
            "calls": len(load.in_flight),
            "tokens": load.outstanding_tokens(),
            "running": report.running,
            "waiting": report.waiting,
            "kv_usage": report.kv_usage,
            "preemptions": report.preemptions,
            "fit_error": finite(error),
            "fit_age_s": round(max(self._context.clock.now() - load.fitted_s, 0.0), 1),
            "step_s": None if cost is None else finite(load.token_s(cost)),
            "prefill_tokens_per_s": None if cost is None or cost.p1 < _NO_TIME_S else 1 / cost.p1,
        }


def _busiest(tenants: list[_Json]) -> list[_Json]:
    """Return the tenants that are shown: with most calls open, then with most tokens so far."""
    tenants.sort(
        key=lambda one: (-one["running"] - one["held"], -one["prompt"] - one["output"],
                         one["tenant"])
    )  # fmt: skip
    return tenants[:SHOWN_TENANTS]


def _workflow(one: Margin, now: float) -> dict[str, Any]:
    run, call = one.entry.run, one.entry.demand.call
    return {
        "id": run.workflow_id,
        "type": run.workflow_type,
        "stage": call.stage,
        "tenant": call.tenant,
        "engine": None if one.entry.engine is None else one.entry.engine.engine_id,
        "demoted": run.background,
        "slack_s": finite(one.slack_s),
        "deadline_in_s": finite(run.deadline_s - now),
    }


def _ended_lately(one: WorkflowAccount, now: float) -> dict[str, Any]:
    return {
        "id": one.workflow_id,
        "type": one.workflow_type,
        "outcome": one.outcome,
        "age_s": round(max(now - one.ended_s, 0.0), 1),
        "took_s": round(one.took_s, 3),
        "slack_s": finite(one.slack_s),
        "calls": len(one.calls),
        "parts": {name: round(seconds, 3) for name, seconds in one.parts().items()},
    }


def decision(accounts: Accounts, at_s: float, one: Decision, now: float) -> dict[str, Any]:
    """Return a decision as JSON can say it, with its age."""
    shown: dict[str, Any] = {
        "age_s": round(now - at_s, 3),
        "call": one.call_id,
        "request": accounts.request_of(one.call_id) or one.call_id,
        "reason": one.reason,
        "why": REASONS.get(one.reason, one.reason),
    }
    if isinstance(one, Placement):
        finish_s = one.finish_s
        shown |= {
            "engine": one.engine_id,
            "score": finite(one.score),
            "due_in_s": finite(one.due_s - at_s),
            "finish_in_s": None if finish_s is None else finite(finish_s - at_s),
            "late_s": None if finish_s is None else finite(finish_s - one.due_s),
            "tail_s": finite(one.tail_s),
            "demoted": one.background,
            "expected_output_tokens": one.expected_output_tokens,
            "uncached_tokens": one.uncached_tokens,
        }
    return shown


_Json = dict[str, Any]


def total(parts: Sequence[_Json]) -> _Json:
    """Return the overview of all processes; what all see alike is taken from the first.

    Calls, workflows and decisions are each known to one process. Engines are known to all, but
    the calls placed on them are not.

    Args:
        parts: at least one; the first is that of the process that was asked.
    """
    first = parts[0]
    shown = sorted(
        (one for part in parts for one in part["workflows"]["shown"]),
        key=lambda one: float("inf") if one["slack_s"] is None else one["slack_s"],
    )
    decisions = sorted(
        (one for part in parts for one in part["decisions"]), key=lambda one: float(one["age_s"])
    )
    recent = sorted(
        (one for part in parts for one in part["recent"]), key=lambda one: float(one["age_s"])
    )
    workflows = _sums(part["workflows"] for part in parts)
    slack = [part["slack"]["calls"] for part in parts]
    return {
        **first,
        "up_s": min(part["up_s"] for part in parts),
        "calls": _calls([part["calls"] for part in parts]),
        "workflows": {**workflows, "shown": shown[:SHOWN_WORKFLOWS]},
        "slack": {**first["slack"], "calls": [sum(column) for column in zip(*slack, strict=True)]},
        "ended": _ended([part["ended"] for part in parts]),
        "recent": recent[:SHOWN_ENDED],
        "tenants": _tenants([part["tenants"] for part in parts]),
        "engines": [_engine(one, parts) for one in first["engines"]],
        "decisions": decisions[:SHOWN_DECISIONS],
    }


def _sums(parts: Iterable[_Json]) -> _Json:
    """Return the sums of all numbers, by key."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update({name: n for name, n in part.items() if isinstance(n, int | float)})
    return dict(found)


def _counts(parts: Sequence[_Json]) -> _Json:
    """Return the sums of counts, and of quantiles, which do not add up, the largest ones."""
    times = {
        name: max((part[name] for part in parts if part[name] is not None), default=None)
        for name in NO_TIMES
    }
    return {**_sums({k: v for k, v in p.items() if k not in times} for p in parts), **times}


def _calls(parts: Sequence[_Json]) -> _Json:
    failed = _sums(part["failed"] for part in parts)
    oldest_s = max(part["oldest_held_s"] for part in parts)
    return {**_sums(parts), "oldest_held_s": oldest_s, "failed": failed}


def _tenants(parts: Iterable[Sequence[_Json]]) -> list[_Json]:
    of: dict[str, list[_Json]] = {}
    for part in parts:
        for one in part:
            of.setdefault(one["tenant"], []).append(one)
    return _busiest(
        [
            {
                "tenant": name,
                **_sums(same),
                "oldest_held_s": max(one["oldest_held_s"] for one in same),
            }
            for name, same in of.items()
        ]
    )


def _ended(parts: Sequence[_Json]) -> _Json:
    """Return the sums of periods and types; periods of two processes begin at different moments."""
    types: dict[str, list[_Json]] = {}
    for part in parts:
        for one in part["types"]:
            types.setdefault(one["type"], []).append(one)
    counts = [{"type": name, **_counts(of)} for name, of in types.items()]
    counts.sort(key=lambda one: -sum(n for n in one.values() if isinstance(n, int)))
    columns = zip(*(part["periods"] for part in parts), strict=True)
    return {
        **parts[0],
        "periods": [_sums(column) for column in columns],
        "types": counts[:SHOWN_TYPES],
    }


def _engine(one: _Json, parts: Sequence[_Json]) -> _Json:
    same = [e for part in parts for e in part["engines"] if e["name"] == one["name"]]
    placed = {name: sum(e.get(name) or 0 for e in same) for name in ("calls", "tokens")}
    return {**one, **{name: n for name, n in placed.items() if name in one}}


class UiPage:
    """Handlers of the page and of what it shows."""

    def __init__(self, context: Context) -> None:
        self._overview = Overview(context)
        self._page, self._policy = page_document()

    async def page(self, request: Request) -> web.StreamResponse:
        """Show the page; it needs no key, what it asks for does."""
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": self._policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        return web.Response(
            body=self._page, content_type="text/html", charset="utf-8", headers=headers
        )

    async def data(self, request: Request) -> web.StreamResponse:
        """Say what the page shows now."""
        return data_response(self._overview.body())


def data_response(body: bytes) -> web.Response:
    """Return the answer that says what the page shows."""
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, content_type="application/json", headers=headers)


def page_document() -> tuple[bytes, str]:
    """Return the page and its content security policy.

    Only the page's own style and script may run, and they may only talk to this router.
    """
    folder = resources.files("hexgen_vllm.router.status") / "ui"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.replace("{style}", style).replace("{script}", script).encode(), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def worker_view(context: Context, engine: Engine) -> dict[str, Any]:
    """Return an engine as ``/workers`` shows it; limits and load are those of all its ranks."""
    ranks = [target_view(context, engine, target) for target in engine.targets]
    sums = {name: _sum(rank[name] for rank in ranks) for name in _SUMMED}
    return {**ranks[0], "name": engine.name, **sums, "data_parallel_size": len(ranks)}


def target_view(context: Context, engine: Engine, target: str) -> dict[str, Any]:
    """Return what is known of an engine, or of one of its ranks."""
    load = context.service.coordinator.engines.get(target)
    spec = engine.targets[target]
    return {
        "name": target,
        "state": engine.state.value,
        "is_healthy": engine.state is not EngineState.DOWN,
        "role": engine.worker.role.value,
        "reason": engine.why,
        "kind": None if spec is None else spec.kind.value,
        "models": sorted(spec.models) if spec is not None else [],
        "max_num_seqs": None if spec is None else spec.max_num_seqs,
        "kv_tokens": None if spec is None else spec.kv_tokens,
        "telemetry_port": URL(engine.front.stats[0]).port if engine.front.stats else None,
        "max_model_len": None if spec is None else spec.max_model_len,
        "load": 0 if load is None else len(load.in_flight),
    }


def rates_view(context: Context, engine: Engine, target: str) -> dict[str, Any]:
    """Return what decisions about an engine, or one of its ranks, stand on."""
    shown = target_view(context, engine, target)
    load = context.service.coordinator.engines.get(target)
    if load is not None:
        cost = load.cost()
        measured = load.report.cost is not None
        shown["cost"] = None if cost is None else asdict(cost)
        shown["cost_from"] = "telemetry" if measured else "traffic" if cost else None
        error = load.report.fit_error if measured else load.traffic_fit.error()
        shown["fit_error"] = error
        shown["queued_prefill_tokens"] = load.queued_prefill_tokens()
        shown["outstanding_tokens"] = load.outstanding_tokens()
        report = asdict(load.report)
        shown["report"] = {k: report[k] for k in report if k not in ("cost", "fit_error")}
    return shown


def _sum(values: Iterable[int | None]) -> int | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None
