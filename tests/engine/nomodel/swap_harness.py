"""The fake engine with both halves of our KV connector: copies move the chain hashes themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from benchmarks.engine.headless import Setup
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.engine.swap.connector import HostKVConnector
from hexgen_vllm.engine.swap.pool import Extent
from hexgen_vllm.engine.swap.worker import HostCopier, SwapWorker
from hexgen_vllm.kernels import BlockLayout, scatter_blocks
from tests.engine.nomodel.harness import FakeEngine, FakeWorker

BLOCK_BYTES = 128
"""Of the made-up model's cache: 16 tokens, one head, one float32 for key and value each."""


def gib(blocks: int) -> float:
    return blocks * BLOCK_BYTES / (1 << 30)


class SwapWorkerDouble(FakeWorker):
    """A fake worker whose KV cache is a tensor that our connector copies."""

    def attach(self, connector: HostKVConnector) -> None:
        self.connector = connector
        cache = torch.zeros(self.blocks, 1, self.block_size, 1, dtype=torch.int64)
        self.kv = cache.view(-1).numpy()  # type: ignore[assignment]
        connector.register_kv_caches({"layer": cache})

    @property
    def swap(self) -> SwapWorker:
        assert self.connector.worker is not None
        return self.connector.worker

    def _take_in(self, output: Any) -> None:
        self.connector.handle_preemptions(output.kv_connector_metadata)
        super()._take_in(output)
        self.connector.bind_connector_metadata(output.kv_connector_metadata)
        if loads_first(output):
            self.connector.start_load_kv(None)

    def execute(self, output: Any) -> ModelRunnerOutput:
        result = super().execute(output)
        if not loads_first(output):
            self.connector.start_load_kv(None)
        _, loaded = self.connector.get_finished(output.finished_req_ids)
        result.kv_connector_output = KVConnectorOutput(
            finished_recving=loaded,
            kv_connector_worker_meta=self.connector.build_connector_worker_meta(),
        )
        self.connector.clear_connector_metadata()
        return result


def loads_first(output: Any) -> bool:
    """Whether a step loads before its forward pass: always up to vLLM 0.28, then if it must."""
    return bool(getattr(output, "has_sync_kv_loads", True))


class LateCopier(HostCopier):
    """Loads beside the forward pass as late as a GPU may: when somebody asks for the third time.

    The bus carries what the records held when the load was asked for: later saves are behind it.
    """

    ASKED = 3

    def __init__(self, layout: BlockLayout, records: int) -> None:
        super().__init__(layout, records)
        self._under_way: list[Callable[[], None]] = []

    def load(
        self, block_ids: Sequence[int], spans: Sequence[Extent], *, beside: bool
    ) -> Callable[[], bool]:
        if not beside:
            return super().load(block_ids, spans, beside=False)
        asked = 0
        parts = [self.memory[self._layout.record_span(a, a + size)] for a, size in spans]
        content = torch.cat(parts)

        def arrive() -> None:
            self._under_way.remove(arrive)
            scatter_blocks(self._layout, block_ids, content)

        def done() -> bool:
            nonlocal asked
            asked += 1
            if asked == self.ASKED and arrive in self._under_way:
                arrive()
            return asked >= self.ASKED

        self._under_way.append(arrive)
        return done

    def fence(self) -> None:
        for arrive in list(self._under_way):
            arrive()


class SwapEngine(FakeEngine):
    """A fake engine that keeps the KV of preempted calls in ``host_blocks`` blocks of memory."""

    worker: SwapWorkerDouble

    def __init__(
        self,
        folder: Path,
        scheduler_class: type = UrgencyScheduler,
        *,
        host_blocks: int = 400,
        beside: bool = False,
        **options: Any,
    ) -> None:
        hexgen = {"host_kv_gib": gib(host_blocks), "keep_kv": "always"}
        hexgen |= options.pop("hexgen", {})
        options.setdefault("blocks", 24)
        setup = Setup(additional={"hexgen": hexgen}, **options)
        super().__init__(scheduler_class, folder, setup)
        self.keeper = self.scheduler.connector.planner
        self.worker = SwapWorkerDouble(setup.blocks, setup.block_size)
        self.worker.attach(self._worker_connector(beside))

    def _worker_connector(self, beside: bool) -> HostKVConnector:
        scheduler = self.scheduler
        connector = HostKVConnector(
            scheduler.vllm_config, KVConnectorRole.WORKER, scheduler.kv_cache_config
        )
        if beside:
            self.keeper.beside_from_s = 0.0
            connector.make_copier = LateCopier
        return connector

    def host_kv(self) -> dict[str, Any]:
        found: dict[str, Any] = self.keeper.stats()
        return found

    def recomputed(self) -> int:
        return int(self.scheduler.hexgen_stats()["recomputed_tokens"])

    def assert_clean(self) -> None:
        super().assert_clean()
        assert not self.keeper.pool.copies
        pool = self.keeper.pool
        assert pool.used == len(pool.kept), "a record is taken that nobody will let go"
        assert not self.worker.swap.finished()
