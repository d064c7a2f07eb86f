"""What a simulated engine is: its step cost and vLLM's limits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hexgen_vllm.config import check, option
from hexgen_vllm.types import StepCost


@dataclass(frozen=True)
class EngineModel:
    """What a simulated engine is."""

    engine_id: str
    cost: StepCost
    device: str = option("", "name of the device")
    max_num_seqs: int = option(256, "sequences in a batch", least=1)
    max_num_batched_tokens: int = option(2048, "tokens in a step", least=1)
    kv_tokens: int = option(400_000, "tokens that the KV cache holds", least=1)
    block_size: int = option(16, "tokens of a KV block", least=1)
    watermark: float = option(
        0.0, "share of KV blocks kept free when calls are admitted", least=0.0, most=0.99
    )
    prefix_caching: bool = option(True, "whether prefixes are cached")
    kv_copy_tokens_per_s: float | None = option(
        None, "rate of copying preempted KV to the host and back; none is recompute", least=1.0
    )
    async_scheduling: bool = option(
        False, "whether a step is scheduled while the one before it is computed"
    )

    def __post_init__(self) -> None:
        check(self)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Let it be pickled, frozen and compiled as it may be."""
        return EngineModel, tuple(getattr(self, one.name) for one in fields(self))

    @property
    def blocks(self) -> int:
        """KV blocks."""
        return self.kv_tokens // self.block_size
