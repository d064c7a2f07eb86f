"""Block copies on an NVIDIA GPU: binding of ``csrc/kv_copy.cu``.

The buffer may be device memory (staging) or pinned host memory, which the kernel then reads or
writes over the bus itself. Copies are enqueued on the current stream of the cache's device; the
buffer must stay alive and untouched until that stream has passed them.
"""

from __future__ import annotations

import ctypes

import torch

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.kernels.layout import BlockLayout
from hexgen_vllm.kernels.libraries import cuda_library
from hexgen_vllm.kernels.tables import piece_table, word_bytes

# What one warp copies with all its loads in flight.
PIECE_BYTES = 4096

# Thread blocks of 256. A bus is full with few; the rest of the GPU stays with the forward pass.
HOST_GRID = 32
DEVICE_GRID = 512


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot serve a cache on ``device``; ``None`` when it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the cuda kernel cannot reach memory on {device}"
    loaded = cuda_library()
    return None if loaded.handle is not None else loaded.reason


def copy_blocks(
    layout: BlockLayout, ids: torch.Tensor, buffer: torch.Tensor, *, to_records: bool
) -> None:
    """Enqueue a copy on the current stream; see :mod:`hexgen_vllm.kernels`.

    Raises:
        ConfigError: the library is missing or the cache is not on an NVIDIA GPU.
        RuntimeError: CUDA refuses the launch.
    """
    reason = unavailable(layout.device)
    library = cuda_library().handle if reason is None else None
    if library is None:
        raise ConfigError(f"kernel cuda: {reason}.")
    stream = torch.cuda.current_stream(layout.device).cuda_stream
    _enqueue(library, layout, ids, buffer, to_records=to_records, stream=stream)


def _enqueue(
    library: ctypes.CDLL,
    layout: BlockLayout,
    ids: torch.Tensor,
    buffer: torch.Tensor,
    *,
    to_records: bool,
    stream: int,
) -> None:
    table = piece_table(layout, PIECE_BYTES)
    status = library.hx_cuda_copy_blocks(
        layout.device.index or 0,
        table.data_ptr(),
        table.shape[0],
        ids.data_ptr(),
        ids.numel(),
        buffer.data_ptr(),
        layout.record_bytes,
        to_records,
        word_bytes(layout, buffer),
        HOST_GRID if buffer.device.type == "cpu" else DEVICE_GRID,
        stream,
    )
    if status:
        text = library.hx_cuda_error_text(status).decode()
        raise RuntimeError(f"CUDA refused a copy of {ids.numel()} KV blocks: {text}.")
