"""What is tuned for. Every objective is a loss: lower is better, ``inf`` is worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import no_choice
from hexgen_vllm.records import WorkflowRecord
from hexgen_vllm.report.summary import min_deadline

Objective = Callable[[Sequence[WorkflowRecord]], float]


def _deadline(share: float) -> Objective:
    def loss(records: Sequence[WorkflowRecord]) -> float:
        return min_deadline([r.latency_s for r in records], share, 1.0).seconds

    return loss


def negative_goodput(records: Sequence[WorkflowRecord]) -> float:
    """Return minus the workflows on time per second of the arrivals."""
    span_s = max(r.arrived_s for r in records) - min(r.arrived_s for r in records)
    return -sum(r.on_time for r in records) / span_s if span_s > 0 else math.inf


def tenants(weights: Mapping[str, float]) -> Objective:
    """Return the objective: share of late workflows of each tenant, weighted.

    Args:
        weights: by tenant; one that is not named weighs 1.

    Raises:
        ConfigError: a weight is not a number of at least 0, or all are 0.
    """
    for tenant, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of tenant {tenant} must be 0 or more, not {weight:g}.")

    def loss(records: Sequence[WorkflowRecord]) -> float:
        by_tenant: dict[str, list[bool]] = {}
        for record in records:
            by_tenant.setdefault(record.tenant, []).append(not record.on_time)
        total = sum(weights.get(tenant, 1.0) for tenant in by_tenant)
        if total <= 0:
            return math.inf
        late = sum(weights.get(t, 1.0) * sum(v) / len(v) for t, v in by_tenant.items())
        return late / total

    return loss


OBJECTIVES: Final[dict[str, tuple[Objective, str]]] = {
    "min_deadline_95": (_deadline(0.95), "min deadline @95% (s)"),
    "min_deadline_99": (_deadline(0.99), "min deadline @99% (s)"),
    "goodput": (negative_goodput, "minus workflows on time per s"),
    "tenants": (tenants({}), "late share, mean of tenants"),
}
"""name: (loss, heading)"""


def chosen(name: str, weights: Mapping[str, float] | None = None) -> tuple[Objective, str]:
    """Return the objective ``name`` and its heading; ``weights`` belong to ``tenants``.

    Raises:
        ConfigError: there is no such objective, or a weight is wrong.
    """
    if name not in OBJECTIVES:
        raise no_choice("objective", name, OBJECTIVES)
    if weights:
        return tenants(weights), "late share, weighted by tenant"
    return OBJECTIVES[name]
