"""Block copies between host tensors: binding of ``csrc/kv_copy_cpu.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.checks import check_gather, check_scatter
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


def gather_blocks(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, out: torch.Tensor
) -> None:
    """Pack blocks into ``out``, with up to ``torch.get_num_threads()`` threads.

    Raises:
        ValueError: see :func:`~hexgen_vllm.kernels.checks.check_gather`.
        ConfigError: the library is missing or the cache is not on the host.
    """
    _copy(layout, check_gather(layout, block_ids, out), out, to_records=True)


def scatter_blocks(
    layout: BlockLayout, block_ids: Sequence[int] | torch.Tensor, src: torch.Tensor
) -> None:
    """Unpack ``src`` into the cache; arguments and errors as :func:`gather_blocks`."""
    _copy(layout, check_scatter(layout, block_ids, src), src, to_records=False)


def _copy(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
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
