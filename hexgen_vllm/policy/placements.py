"""Every placement policy by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy import rivals
from hexgen_vllm.policy.dispatch import (
    Dispatch,
    EarliestFinish,
    HexGen,
    LeastOutstanding,
    RoundRobin,
)
from hexgen_vllm.policy.marginal_cost import MarginalCost

PLACEMENTS: Final[dict[str, Callable[[DispatchOptions], Dispatch]]] = {
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "hexgen": HexGen,
    "slack": MarginalCost,
    "earliest_finish": EarliestFinish,
    "weighted_round_robin": rivals.WeightedRoundRobin,
    "weighted_least": rivals.WeightedLeast,
    "power_of_two": rivals.PowerOfTwo,
    "sticky": rivals.Sticky,
    "wlcaff": rivals.WlcAff,
    "llm_d": rivals.LlmD,
    "cache_aware": rivals.CacheAware,
    "dynamo": rivals.Dynamo,
}
