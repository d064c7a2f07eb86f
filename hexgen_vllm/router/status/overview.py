"""What the page at ``/ui`` shows, as one JSON object: the state of the router at a glance."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from hexgen_vllm import __version__
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.fleet import Engine
from hexgen_vllm.router.margins import SLACK_BOUNDS_S, Margin, by_workflow, histogram, margins
from hexgen_vllm.router.outcomes import PERIOD_S
from hexgen_vllm.types import Decision, Placement

SHOWN_WORKFLOWS: Final = 20
SHOWN_DECISIONS: Final = 30
SHOWN_TYPES: Final = 10
FRESH_S: Final = 0.5
_NO_TIME_S: Final = 1e-6  # a fit that says less per prompt token knows nothing of prefill


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
        coordinator = context.service.coordinator
        found = list(margins(coordinator, now))
        worst = by_workflow(found)
        risky = [one for one in worst if one.at_risk]
        recent = list(coordinator.log)[-SHOWN_DECISIONS:]
        return {
            "version": __version__,
            "policy": coordinator.options.policy,
            "state": "draining" if context.draining else "ready" if context.ready else "not ready",
            "up_s": round(now - context.epoch_s, 1),
            "calls": self._calls(found, now),
            "workflows": {
                "open": len(coordinator.workflows),
                "at_risk": len(risky),
                "late": sum(one.slack_s < 0 for one in risky),
                "demoted": sum(one.entry.run.background for one in worst),
                "shown": [_workflow(one, now) for one in risky[:SHOWN_WORKFLOWS]],
            },
            "slack": {"bounds_s": SLACK_BOUNDS_S, "calls": histogram(found)},
            "ended": self._ended(now),
            "engines": [
                self._engine(engine, target)
                for engine in context.fleet.engines.values()
                for target in engine.targets
            ],
            "decisions": [decision(at, one, now) for at, one in reversed(recent)],
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
        outcomes = self._context.metrics.outcomes
        types = sorted(outcomes.types(now).items(), key=lambda one: -sum(one[1].values()))
        return {
            "period_s": PERIOD_S,
            "periods": outcomes.periods(now),
            "types": [{"type": name, **counts} for name, counts in types[:SHOWN_TYPES]],
        }

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
            "step_s": None if cost is None else finite(load.token_s(cost)),
            "prefill_tokens_per_s": None if cost is None or cost.p1 < _NO_TIME_S else 1 / cost.p1,
        }


def finite(value: float | None) -> float | None:
    """Return ``value`` as JSON can say it: what is unknown or without bound is ``None``."""
    return value if value is not None and math.isfinite(value) else None


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


def decision(at_s: float, one: Decision, now: float) -> dict[str, Any]:
    """Return a decision as JSON can say it, with its age."""
    shown: dict[str, Any] = {
        "age_s": round(now - at_s, 3),
        "call": one.call_id,
        "reason": one.reason,
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
