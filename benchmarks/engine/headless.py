"""vLLM's scheduler without a model, a worker or a device: for benchmarks and tests.

Only configuration is made up: a config file of a very small model, and a KV cache of one group of
full attention. The scheduler, its queues and its KV manager are vLLM's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hexgen_vllm.engine.swap.setup import choose_connector

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 17,
    "vocab_size": 1024,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Setup:
    """What a scheduler is built for; sizes in tokens or blocks, as named.

    Attributes:
        blocks: KV blocks, one of which vLLM keeps for itself.
        block_size: tokens per block.
        max_num_seqs: calls in the batch.
        max_batched_tokens: tokens per step.
        max_model_len: longest sequence.
        prefix_caching: whether full blocks are shared.
        async_scheduling: whether a step is scheduled before the one before it has ended.
        pipeline: stages that a step goes through one after another.
        policy: vLLM's own scheduling policy.
        log_stats: whether events and statistics are collected, as a server does.
        v2_runner: write steps in the format of Model Runner V2.
        additional: vLLM's ``additional_config``.
    """

    blocks: int
    block_size: int = 16
    max_num_seqs: int = 8
    max_batched_tokens: int = 256
    max_model_len: int = 1024
    prefix_caching: bool = True
    async_scheduling: bool = False
    pipeline: int = 1
    policy: str = "fcfs"
    log_stats: bool = True
    v2_runner: bool = False
    additional: Mapping[str, Any] = field(default_factory=dict)


@lru_cache
def _model_config(folder: str, max_model_len: int) -> ModelConfig:
    return ModelConfig(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        max_model_len=max_model_len,
    )


def vllm_config(folder: Path, setup: Setup) -> VllmConfig:
    """Return vLLM's configuration for ``setup``; ``folder`` gets the model's config file."""
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(_MODEL))
    config = VllmConfig(
        model_config=_model_config(str(folder), setup.max_model_len),
        scheduler_config=SchedulerConfig(
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_batched_tokens,
            max_model_len=setup.max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            policy=setup.policy,
            async_scheduling=setup.async_scheduling and setup.pipeline == 1,
        ),
        cache_config=CacheConfig(
            block_size=setup.block_size, enable_prefix_caching=setup.prefix_caching
        ),
        parallel_config=ParallelConfig(pipeline_parallel_size=setup.pipeline),
        device_config=DeviceConfig("cpu"),
        additional_config=dict(setup.additional),
    )
    # The CPU platform turns these round to what its own worker can do, and vLLM refuses to overlap
    # the steps of a pipeline on Model Runner V1, which is what a machine without Triton has.
    config.scheduler_config.async_scheduling = setup.async_scheduling
    config.cache_config.block_size = setup.block_size
    config.cache_config.num_gpu_blocks = setup.blocks
    options = setup.additional.get("hexgen")
    if isinstance(options, dict):
        choose_connector(config, options)
    return config


def build_scheduler(scheduler_class: type, folder: Path, setup: Setup) -> Any:
    """Return a scheduler of ``scheduler_class`` for ``setup``."""
    config = vllm_config(folder, setup)
    config.scheduler_config.scheduler_cls = scheduler_class
    spec = FullAttentionSpec(
        block_size=setup.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    kv_cache = KVCacheConfig(
        num_blocks=setup.blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    scheduler = scheduler_class(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=setup.block_size,
        hash_block_size=setup.block_size,
        log_stats=setup.log_stats,
    )
    scheduler.use_v2_model_runner = setup.v2_runner
    return scheduler


def block_hasher(block_size: int) -> Callable[[Request], list[Any]]:
    """Return the function that hashes a request's blocks for the prefix cache."""
    init_none_hash(sha256)
    return get_request_block_hasher(block_size, sha256)


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    hasher: Callable[[Request], list[Any]] | None,
    *,
    sampling: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Request:
    """Return a greedy request that writes ``max_tokens`` tokens.

    Args:
        request_id: its id.
        prompt: its token ids.
        max_tokens: length of its output.
        hasher: as :func:`block_hasher` returns it.
        sampling: more for its ``SamplingParams``.
        changes: more for the ``Request`` itself.
    """
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, temperature=0.0, **(sampling or {})
    )
    params.update_from_generation_config({}, 1)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=params,
        pooling_params=None,
        block_hasher=hasher,
        **changes,
    )
