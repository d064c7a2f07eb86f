"""vLLM's KV connector that keeps the KV of preempted calls in host memory.

vLLM makes one in the scheduler and one in each worker. The scheduler tells it of a preemption
itself (:meth:`hexgen_vllm.engine.swap.planner.SwapPlanner.preempting`), because vLLM's interface
has no call for that; the rest goes through the interface. Other schedulers need a patched vLLM
(:class:`OtherScheduler`).

Order in a step. The scheduler preempts, which frees blocks, and may give them away at once. The
worker saves in ``handle_preemptions``, before anything of the step writes KV and, on the same
stream, after everything of the step before. It then loads, which other calls of the step may rely
on, and then runs the forward pass.

Under a scheduler that is not ours, vLLM has to tell connectors of preemptions. A stock vLLM does
not; ``patches/0001-connector-learns-of-preemption`` adds it. Nothing is measured
and no deadline known there: rates are the options' until the end, and all calls equally urgent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine import compat
from hexgen_vllm.engine.compat import Seam
from hexgen_vllm.engine.options import SCHEDULER, is_ours, options_of
from hexgen_vllm.engine.swap import setup
from hexgen_vllm.engine.swap.messages import SwapMeta, SwapReport
from hexgen_vllm.engine.swap.planner import SwapPlanner
from hexgen_vllm.engine.swap.pool import HostPool, RecordSpace
from hexgen_vllm.engine.swap.worker import Copier, SwapWorker, make_copier
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels import BlockLayout
from hexgen_vllm.policy.service_rates import ServiceRates

HOOK: Final = "update_state_before_preempt"
WRITTEN_BEFORE_SAVES: Final = ("new_block_ids_to_zero", "kv_cache_block_copies")
"""What of a step Model Runner V2 does to blocks before ``handle_preemptions``."""


@dataclass(slots=True)
class AnyCall:
    """Stands for the state of a call; see :class:`hexgen_vllm.engine.swap.pool.Owner`."""

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


_SEAMS: Final = (
    Seam(KVConnectorBase_V1, "__init__", ("self", "vllm_config", "role", "kv_cache_config")),
    Seam(KVConnectorBase_V1, "register_kv_caches", ("self", "kv_caches")),
    Seam(KVConnectorBase_V1, "handle_preemptions", ("self", "kv_connector_metadata")),
    Seam(KVConnectorBase_V1, "start_load_kv", ("self", "forward_context")),
    Seam(KVConnectorBase_V1, "get_finished", ("self", "finished_req_ids")),
    Seam(KVConnectorBase_V1, "build_connector_worker_meta", ("self",)),
    Seam(
        KVConnectorBase_V1,
        "get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens"),
    ),
    Seam(
        KVConnectorBase_V1,
        "update_state_after_alloc",
        ("self", "request", "blocks", "num_external_tokens"),
    ),
    Seam(KVConnectorBase_V1, "build_connector_meta", ("self", "scheduler_output")),
    Seam(KVConnectorBase_V1, "update_connector_output", ("self", "connector_output")),
    Seam(KVConnectorBase_V1, "request_finished", ("self", "request", "block_ids")),
    Seam(KVConnectorBase_V1, "has_pending_push_work", ("self",)),
    Seam(KVConnectorBase_V1, "reset_cache", ("self",)),
    Seam(KVConnectorBase_V1, "shutdown", ("self",)),
)


class HostKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Chosen by ``host_kv_gib``; see :mod:`hexgen_vllm.engine.swap.setup`.

    Attributes:
        planner: the scheduler's half; ``None`` in a worker.
        worker: a worker's half, once its KV cache is registered; ``None`` in the scheduler.

    Raises:
        ConfigError: the model's KV cannot be kept, or nobody would tell of preemptions.
        UnsupportedVLLM: this vLLM's connector interface has changed.
    """

    make_copier: Callable[[BlockLayout, int], Copier] = staticmethod(make_copier)
    """How a worker copies; a test may put its own in place."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        compat.check_seams(_SEAMS)
        super().__init__(vllm_config, role, kv_cache_config)
        options = options_of(vllm_config)
        size = setup.pool_size(vllm_config, kv_cache_config, options.host_kv_gib)
        self._records, self._num_blocks = size.records, kv_cache_config.num_blocks
        self.worker: SwapWorker | None = None
        self.planner: SwapPlanner | None = None
        if role == KVConnectorRole.SCHEDULER:
            require_teller(vllm_config)
            self.planner = SwapPlanner(
                HostPool(RecordSpace(size.records)),
                block_size=size.block_size,
                block_bytes=size.block_bytes,
                keep=options.keep_kv,
                beside=vllm_config.device_config.device_type != "cpu",
            )
            self._other_scheduler = OtherScheduler(self.planner, options)

    @property
    def requires_kv_delivery(self) -> bool:
        """A copy that is lost costs time, nothing else: vLLM need not hold output back for it."""
        return False

    # In the scheduler.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded for a call, and whether beside the forward pass."""
        return self._planner().restorable(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of a call that was admitted."""
        planner = self._planner()
        if request.request_id in planner.pool.copies or num_external_tokens:
            planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def update_state_before_preempt(
        self, request: Any, blocks: Any, drop_stale_output: bool
    ) -> None:
        """Plan the copy of a call that another scheduler preempts; a patched vLLM calls this."""
        # vLLM drops stale output in a reset, and for connectors that require delivery: not ours.
        self._other_scheduler.preempting(request, blocks.blocks[0], reset=drop_stale_output)

    def build_connector_meta(self, scheduler_output: Any) -> SwapMeta:
        """Return what the workers copy in this step.

        Model Runner V2 zeroes new blocks and copies shared ones before it lets us save. Neither
        happens with the caches that we take; should it, the saves would come too late.
        """
        if any(getattr(scheduler_output, name, None) for name in WRITTEN_BEFORE_SAVES):
            self._planner().cancel_saves()
        return self._planner().end_step()

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn how fast the workers copied, and which loads are done.

        Those that nobody waits for any more are taken out: vLLM looks up the request of each.
        """
        if connector_output.finished_recving:
            wanted = self._planner().loaded(set(connector_output.finished_recving))
            connector_output.finished_recving = wanted
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, SwapReport):
            self._planner().ledger.reported(report)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop the copy of a call that is over, however it ended."""
        del block_ids
        self._planner().forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop the copy of a call that is over, however it ended."""
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Return whether the engine must go on stepping: loads are under way.

        A paused engine steps until there are none. Only then is a pause complete, and may the
        cache's memory be given up.
        """
        return self._planner().loads_under_way()

    def reset_cache(self) -> bool:
        """Drop all copies."""
        self._planner().forget_all("reset")
        return True

    def _planner(self) -> SwapPlanner:
        assert self.planner is not None, "the scheduler's half was called in a worker"
        return self.planner

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learn where the KV cache lies, and take the host memory."""
        layout = BlockLayout.from_tensors(list(kv_caches.values()), self._num_blocks)
        self.worker = SwapWorker(layout, self._records, self.make_copier(layout, self._records))

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Save before blocks are written by this step."""
        meta: SwapMeta = kv_connector_metadata
        if meta.renew:
            self._worker().renew()
        if meta.fence:
            self._worker().fence()
        if meta.saves or meta.loads:
            self._worker().save(meta.saves)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load what this step's calls need, and start what later ones will."""
        del forward_context, kwargs
        meta = self._get_connector_metadata()
        assert isinstance(meta, SwapMeta)
        if meta.loads:
            self._worker().load(meta.loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return no sent requests, and those loaded beside the forward pass."""
        del finished_req_ids
        return None, self._worker().finished() or None

    def build_connector_worker_meta(self) -> SwapReport | None:
        """Return how fast this worker copied."""
        return self._worker().report()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads are ordered as a whole, not by layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: only preempted calls are saved."""

    def wait_for_save(self) -> None:
        """Do nothing: the streams put saves in order."""

    def shutdown(self) -> None:
        """Let go of all copies, and of the memory once no copy uses it."""
        if self.planner is not None:
            self.planner.forget_all("shutdown")
        if self.worker is not None:
            self.worker.close()

    def _worker(self) -> SwapWorker:
        assert self.worker is not None, "the KV cache is not registered"
        return self.worker
