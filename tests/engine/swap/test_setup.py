"""When our connector is chosen, and when the engine refuses in one sentence."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.server import arguments
from hexgen_vllm.engine.swap import setup
from hexgen_vllm.errors import ConfigError

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16)
MLA = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float16)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16, sliding_window=128
)


def target(**changes: Any) -> SimpleNamespace:
    made = {"kv_transfer_config": None, "kv_offloading_size": None}
    return SimpleNamespace(**{**made, **changes})


def kv_cache(*specs: Any, layers: int = 4) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"l{i}" for i in range(layers)], spec) for spec in specs]
    return KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=groups)


def parallel(**sizes: int) -> SimpleNamespace:
    config = {"world_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    return SimpleNamespace(parallel_config=SimpleNamespace(**{**config, **sizes}))


def test_our_connector_is_chosen_where_host_memory_is_set_aside() -> None:
    args = target()
    setup.choose_connector(args, {"host_kv_gib": 1.0})
    chosen = args.kv_transfer_config
    assert chosen.kv_connector == "HostKVConnector"
    assert not chosen.is_kv_consumer
    setup.choose_connector(args, {"host_kv_gib": 1.0})
    assert args.kv_transfer_config is chosen


@pytest.mark.parametrize("options", [{}, {"host_kv_gib": 0.0}, {"keep_kv": "always"}])
def test_without_host_memory_nothing_is_touched(options: dict[str, Any]) -> None:
    args = target(kv_transfer_config="something of the user's")
    setup.choose_connector(args, options)
    assert args.kv_transfer_config == "something of the user's"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="NixlConnector", kv_role="kv_both"
                )
            },
            "NixlConnector",
        ),
        ({"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1"}}, "LMCacheConnectorV1"),
        ({"kv_transfer_config": {"kv_connector": "MultiConnector"}}, "MultiConnector"),
        ({"kv_offloading_size": 4.0}, "--kv-offloading-size"),
    ],
)
def test_another_connector_is_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"host_kv_gib cannot .* connector \(.*{name}\), .*--kv-offloading-size"
    ):
        setup.choose_connector(target(**changes), {"host_kv_gib": 1.0})


@pytest.mark.parametrize("fixed", [None, "enable_sleep_mode", "enable_cumem_allocator"])
def test_memory_that_can_grow_is_refused_before_vllm_does(
    fixed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    args = target(**({fixed: True} if fixed else {}))
    if fixed is None:
        with pytest.raises(ConfigError, match=r"^host_kv_gib .*expandable_segments:True out of"):
            setup.choose_connector(args, {"host_kv_gib": 1.0})
        setup.choose_connector(args, {})
        assert args.kv_transfer_config is None
    else:
        setup.choose_connector(args, {"host_kv_gib": 1.0})
        assert args.kv_transfer_config is not None


def test_a_hybrid_model_is_told_of_the_option_that_helps() -> None:
    with pytest.raises(ConfigError, match="--disable-hybrid-kv-cache-manager"):
        setup.pool_size(parallel(), kv_cache(FULL, WINDOW), 1.0)


def test_the_pool_is_counted_in_blocks_of_all_workers() -> None:
    found = setup.pool_size(parallel(), kv_cache(FULL), 1.0)
    assert found == (2**30 // (4 * 8192), 16, 4 * 8192)
    assert setup.pool_size(parallel(world_size=2), kv_cache(FULL), 1.0) == (
        2**30 // (8 * 8192),
        16,
        8 * 8192,
    )
    assert setup.pool_size(parallel(), kv_cache(MLA), 1.0).records > 0


@pytest.mark.parametrize(
    ("config", "cache", "gib", "sentence"),
    [
        (parallel(pipeline_parallel_size=2), kv_cache(FULL), 1.0, "pipeline parallelism"),
        (parallel(decode_context_parallel_size=2), kv_cache(FULL), 1.0, "decode context"),
        (parallel(), kv_cache(WINDOW), 1.0, "full attention"),
        (parallel(), kv_cache(FULL, WINDOW), 1.0, "full attention"),
        (parallel(), kv_cache(), 1.0, "full attention"),
        (parallel(), kv_cache(FULL), 1e-6, "cannot hold one KV block .32768 bytes."),
    ],
)
def test_what_cannot_be_kept_is_refused(
    config: Any, cache: KVCacheConfig, gib: float, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"^host_kv_gib[^.]*{sentence}"):
        setup.pool_size(config, cache, gib)


def test_a_scheduler_whose_engine_has_another_connector_says_what_to_do() -> None:
    options = EngineOptions(host_kv_gib=1.0)
    for connector in (None, object()):
        with pytest.raises(ConfigError, match=r"plugin .* kv_connector HostKVConnector"):
            setup.planner_of(connector, options)
        assert setup.planner_of(connector, replace(options, host_kv_gib=0.0)) is None


@pytest.mark.parametrize("scheduler", ["hexgen_vllm.UrgencyScheduler", None])
def test_the_command_line_is_completed(scheduler: str | None) -> None:
    args = target(
        scheduling_policy="urgency" if scheduler is None else "fcfs",
        scheduler_cls=scheduler,
        additional_config={"hexgen": {"host_kv_gib": 2}},
    )
    arguments.resolve(args)
    assert args.kv_transfer_config.kv_connector_module_path == "hexgen_vllm.engine.swap.connector"
    again = args.kv_transfer_config
    arguments.resolve(args)
    assert args.kv_transfer_config is again


def test_a_scheduler_of_others_gets_no_connector() -> None:
    args = target(
        scheduling_policy="fcfs",
        scheduler_cls=None,
        additional_config={"hexgen": {"host_kv_gib": 2}},
    )
    arguments.resolve(args)
    assert args.kv_transfer_config is None
