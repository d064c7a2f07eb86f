"""vLLM's own connectors for KV in host memory, made to run on a CPU, for ``bench preempt``.

Their scheduler halves, policies and messages are vLLM's. Only the copies are replaced, which vLLM
makes with CUDA: here they go between tensors in host memory and are done when they return, as ours
are on a CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.simple_kv_offload import worker as simple_worker

MODES: Final = ("offloading", "offloading all", "simple")
_HERE: Final = "benchmarks.engine.in_tree"


def transfer_config(mode: str, host_kv_gib: float) -> KVTransferConfig:
    """Return the configuration of a mode of ``MODES``: prompts only, all tokens, or simple."""
    extra: dict[str, Any] = {"cpu_bytes_to_use": int(host_kv_gib * (1 << 30))}
    if mode == "simple":
        _let_simple_run_on_a_cpu()
        extra["lazy_offload"] = False
        name = "SimpleCPUOffloadConnector"
    else:
        extra |= {"spec_name": "HostSpec", "spec_module_path": _HERE}
        extra |= {"offload_prompt_only": False} if mode == "offloading all" else {}
        name = "OffloadingConnector"
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)


class HostCopies(OffloadingWorker):
    """Copies of blocks between tensors in host memory."""

    def __init__(self, kv_caches: Any, chunks: int) -> None:
        self._cache = [
            part.tensor.view(torch.int8).view(-1, part.page_size_bytes)
            for part in kv_caches.tensors
        ]
        self._kept = [torch.zeros((chunks, c.shape[1]), dtype=torch.int8) for c in self._cache]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy blocks out."""
        return self._copy(job_id, self._cache, src_spec, self._kept, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy blocks back."""
        return self._copy(job_id, self._kept, src_spec, self._cache, dst_spec)

    def _copy(
        self,
        job_id: int,
        source: list[torch.Tensor],
        source_spec: Any,
        target: list[torch.Tensor],
        target_spec: Any,
    ) -> bool:
        where = torch.as_tensor(source_spec.block_ids, dtype=torch.int64)
        whither = torch.as_tensor(target_spec.block_ids, dtype=torch.int64)
        copied = 0
        for one, other in zip(source, target, strict=True):
            other.index_copy_(0, whither, one.index_select(0, where))
            copied += where.numel() * one.shape[1]
        result = TransferResult(
            job_id=job_id, success=True, transfer_size=copied, transfer_time=1e-6
        )
        self._done.append(result)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the copies that are done, once each."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """All are done."""


class HostSpec(CPUOffloadingSpec):
    """vLLM's offloading to host memory, with the copies above."""

    _copies: HostCopies | None = None

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        """Return what copies."""
        if self.blocks_per_chunk != 1:
            raise NotImplementedError("one block per chunk is what is measured")
        if self._copies is None:
            self._copies = HostCopies(kv_caches, self.num_chunks)
        return self._copies


class _Event:
    """A point in a stream where everything is done at once."""

    def record(self, *stream: object) -> None:
        """Nothing is under way."""

    def query(self) -> bool:
        """It has been passed."""
        return True

    def synchronize(self) -> None:
        """It has been passed."""


class _Stream:
    def __init__(self, **options: object) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


class _HostBackend:
    """What copies for the simple connector."""

    def init(self, device_caches: Any, host_caches: Any, *others: object) -> None:
        """Learn where the blocks are."""
        self._pairs = [
            (cache.flatten(1), host_caches[name].flatten(1))
            for name, cache in device_caches.items()
        ]

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        **others: object,
    ) -> None:
        """Copy at once."""
        where, whither = torch.tensor(src_blocks), torch.tensor(dst_blocks)
        for device, host in self._pairs:
            source, target = (device, host) if is_store else (host, device)
            target.index_copy_(0, whither, source.index_select(0, where))
        events_list.append((event_idx, _Event()))

    def shutdown(self) -> None:
        """Nothing is under way."""


def _let_simple_run_on_a_cpu() -> None:
    names = ("Tensor", "device", "dtype", "empty", "int8", "zeros")
    fake = SimpleNamespace(**{name: getattr(torch, name) for name in names}, Event=_Event)
    fake.cuda = SimpleNamespace(Stream=_Stream, current_stream=lambda *device: _Stream())
    module: Any = simple_worker
    module.torch, module.DmaCopyBackend, module.PIN_MEMORY = fake, _HostBackend, False
