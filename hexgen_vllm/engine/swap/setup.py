"""When KV is kept in host memory: vLLM gets our KV connector, or a sentence why it cannot.

``host_kv_gib`` above 0 is all that a user says. The plugin then completes vLLM's arguments before
its configuration is made, whichever way the engine is started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.swap.planner import SwapPlanner
from hexgen_vllm.errors import ConfigError

CONNECTOR: Final = "HostKVConnector"
MODULE: Final = "hexgen_vllm.engine.swap.connector"
_OPTION: Final = "host_kv_gib"
_GIB: Final = 1 << 30
_GROWING: Final = "expandable_segments:True"
_ALLOCATOR_VARIABLE: Final = "PYTORCH_CUDA_ALLOC_CONF"


class PoolSize(NamedTuple):
    """Size of the host memory, in records of one KV block.

    Attributes:
        records: how many there are.
        block_size: tokens per block.
        block_bytes: bytes per block on all workers together.
    """

    records: int
    block_size: int
    block_bytes: int


def transfer_config() -> KVTransferConfig:
    """Return the configuration that makes vLLM load our connector.

    Its role is that of a producer: for a consumer, vLLM holds freed blocks back from new calls as
    long as a step is in flight, because it does not know in which order they are written.
    """
    return KVTransferConfig(
        kv_connector=CONNECTOR, kv_connector_module_path=MODULE, kv_role="kv_producer"
    )


def choose_connector(target: Any, options: Mapping[str, Any]) -> None:
    """Set our connector in ``target`` if host memory is set aside; twice changes nothing.

    Args:
        target: a parsed command line of vLLM, or ``EngineArgs``.
        options: the hexgen options that were given.

    Raises:
        ConfigError: another KV connector is configured. It may write into the blocks of a
            preempted call before they are saved: nothing puts the two in order.
    """
    if not options.get(_OPTION):
        return
    given = getattr(target, "kv_transfer_config", None)
    name = given.get("kv_connector") if isinstance(given, Mapping) else _connector(given)
    if getattr(target, "kv_offloading_size", None):
        name = "that of --kv-offloading-size"
    if name == CONNECTOR:
        return
    _check_allocator(target)
    if name is not None:
        raise ConfigError(
            f"{_OPTION} cannot be used beside another KV connector ({name}), because nothing puts "
            f"the copies of the two in order: take the other one out, or {_OPTION}, and have "
            "--kv-offloading-size of vLLM or a MultiConnector keep KV in host memory."
        )
    target.kv_transfer_config = transfer_config()


def _check_allocator(target: Any) -> None:
    """Say before vLLM does that it takes no KV connector with memory that can grow.

    Raises:
        ConfigError: torch is told to use such memory, and vLLM's own allocator is not in use.
    """
    fixed = ("enable_sleep_mode", "enable_cumem_allocator")
    if _GROWING in os.environ.get(_ALLOCATOR_VARIABLE, "") and not any(
        getattr(target, name, False) for name in fixed
    ):
        raise ConfigError(
            f"{_OPTION} needs KV memory that stays where it is: take {_GROWING} out of "
            f"${_ALLOCATOR_VARIABLE}, or start with --enable-sleep-mode."
        )


def _connector(config: Any) -> str | None:
    return getattr(config, "kv_connector", None)


def pool_size(vllm_config: Any, kv_cache_config: Any, gib: float) -> PoolSize:
    """Return how many blocks ``gib`` GiB hold; scheduler and workers come to the same number.

    Raises:
        ConfigError: the cache is of a kind that cannot be saved block by block, or no block fits.
    """
    _check_parallel(vllm_config.parallel_config)
    groups = kv_cache_config.kv_cache_groups
    spec: Any = groups[0].kv_cache_spec if groups else None
    plain = type(spec) in (FullAttentionSpec, MLAAttentionSpec)
    if len(groups) != 1 or not plain or kv_cache_config.needs_kv_cache_zeroing:
        raise ConfigError(
            f"{_OPTION} needs a model whose layers all have full attention; for one whose other "
            "layers have windows, --disable-hybrid-kv-cache-manager makes them so."
        )
    ours = spec.page_size_bytes * len(groups[0].layer_names)
    block_bytes = ours * vllm_config.parallel_config.world_size
    records = int(gib * _GIB / block_bytes)
    if records < 1:
        raise ConfigError(f"{_OPTION}: {gib:g} GiB cannot hold one KV block ({block_bytes} bytes).")
    return PoolSize(records, spec.block_size, block_bytes)


def _check_parallel(config: Any) -> None:
    for kind in ("pipeline", "decode_context", "prefill_context"):
        if getattr(config, f"{kind}_parallel_size", 1) > 1:
            raise ConfigError(
                f"{_OPTION} cannot be used with {kind.replace('_', ' ')} parallelism."
            )


def planner_of(connector: Any, options: EngineOptions) -> SwapPlanner | None:
    """Return what plans copies for a scheduler, ``None`` if no host memory is set aside.

    Raises:
        ConfigError: host memory is set aside, but the scheduler has another connector or none.
    """
    if not options.host_kv_gib:
        return None
    planner: SwapPlanner | None = getattr(connector, "planner", None)
    if planner is None:
        raise ConfigError(
            f"{_OPTION} needs the plugin of an installed hexgen_vllm (is VLLM_PLUGINS without "
            f'"hexgen"?) or --kv-transfer-config with kv_connector {CONNECTOR}, '
            f"kv_connector_module_path {MODULE} and kv_role kv_producer."
        )
    return planner
