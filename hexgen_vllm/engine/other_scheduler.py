"""Keeping KV under a scheduler that is not ours, where vLLM tells connectors of preemptions.

A stock vLLM does not; ``patches/0001-connector-learns-of-preemption`` adds it. Nothing is measured
and no deadline known there: rates are the options' until the end, and all calls equally urgent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.arguments import SCHEDULER, is_ours
from hexgen_vllm.engine.swap_planner import SwapPlanner
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.service import ServiceRates

HOOK: Final = "update_state_before_preempt"


@dataclass(slots=True)
class AnyCall:
    """Stands for the state of a call; see :class:`hexgen_vllm.engine.host_pool.Owner`."""

    latest_start_s: float
    kept_tokens: int = 0


class OtherScheduler:
    """Does what :class:`hexgen_vllm.engine.scheduler.UrgencyScheduler` does for the planner."""

    def __init__(self, planner: SwapPlanner, options: EngineOptions) -> None:
        self._planner, self._rates = planner, ServiceRates.seeds(options)

    def preempting(self, request: Any, blocks: Sequence[Any], *, reset: bool) -> None:
        """Have the KV of a call saved, unless our own scheduler has done so.

        Args:
            request: the call.
            blocks: its KV blocks.
            reset: it is preempted by a reset of the prefix cache: the weights may be new.
        """
        if hasattr(request, "hexgen"):
            return
        if reset:
            self._planner.forget_all("reset")
        elif not request.resumable:  # the tokens of a session may change while it waits
            now = time.monotonic()
            self._planner.preempting(request, AnyCall(now), blocks, self._rates, now)


def require_teller(vllm_config: Any) -> None:
    """Check that somebody will tell the connector of preemptions.

    Raises:
        ConfigError: the scheduler is not ours, and vLLM has no call for it.
    """
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    if not (is_ours(scheduler_cls) or hasattr(KVConnectorBase_V1, HOOK)):
        raise ConfigError(
            f"host_kv_gib needs --scheduler-cls {SCHEDULER}, "
            "or a vLLM that `hexgen-vllm patch apply` has patched."
        )
