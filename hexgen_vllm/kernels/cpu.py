"""Block copies between host tensors: binding of ``csrc/kv_copy_cpu.cpp``."""

from __future__ import annotations

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.libraries import cpu_library
from hexgen_vllm.kernels.tables import piece_table

# Small enough that a few large blocks still spread over the threads.
PIECE_BYTES = 256 * 1024


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot serve a cache on ``device``; ``None`` when it can."""
    if device.type != "cpu":
        return f"the cpu kernel cannot reach memory on {device}"
    loaded = cpu_library()
    return None if loaded.handle is not None else loaded.reason


def copy_blocks(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
    """Copy with up to ``torch.get_num_threads()`` threads; see :mod:`hexgen_vllm.kernels`.

    Raises:
        ConfigError: the library is missing or the cache is not on the host.
    """
    reason = unavailable(layout.device)
    library = cpu_library().handle
    if reason is not None or library is None:
        raise ConfigError(f"kernel cpu: {reason}.")
    table = piece_table(layout, PIECE_BYTES)
    # ctypes lets go of the interpreter lock during the call.
    library.hx_cpu_copy_blocks(
        table.data_ptr(),
        table.shape[0],
        ids.data_ptr(),
        ids.numel(),
        buffer.data_ptr(),
        layout.record_bytes,
        to_records,
        torch.get_num_threads(),
    )
