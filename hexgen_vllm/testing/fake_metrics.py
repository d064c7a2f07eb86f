"""What a fake engine counts for each of its data-parallel ranks, and the metrics it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

RANK_HEADER: Final = "x-data-parallel-rank"


@dataclass(slots=True)
class RankCounts:
    """Counts by rank; a request that names no rank counts for the first."""

    running: Counter[int] = field(default_factory=Counter)
    waiting: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)


def rank_asked(headers: Mapping[str, str]) -> int:
    """Return the rank that a request is for, as vLLM reads it: what is no number is not said."""
    said = headers.get(RANK_HEADER, "")
    return int(said) if said.lstrip("-").isdecimal() else 0


def page(counts: RankCounts, ranks: int) -> str:
    """Return vLLM's metrics of an engine with so many ranks."""
    return "".join(_of_rank(counts, rank, 100 * ranks) for rank in range(ranks))


def _of_rank(counts: RankCounts, rank: int, all_blocks: int) -> str:
    label = f'{{engine="{rank}",model_name="tiny"}}'
    cache = f'{{block_size="16",engine="{rank}",num_gpu_blocks="{all_blocks}"}}'
    return (
        f"vllm:num_requests_running{label} {counts.running[rank]:.1f}\n"
        f"vllm:num_requests_waiting{label} {counts.waiting[rank]:.1f}\n"
        f"vllm:kv_cache_usage_perc{label} 0.25\n"
        f"vllm:num_preemptions_total{label} 3.0\n"
        f"vllm:iteration_tokens_total_count{label} {counts.steps[rank]:.1f}\n"
        f"vllm:cache_config_info{cache} 1.0\n"
    )
