"""Pinned host memory of the size that was asked for."""

from __future__ import annotations

import ctypes
import weakref

import torch

from hexgen_vllm.kernels.libraries import cuda_library


def pinned_buffer(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor in pinned host memory that every GPU of this process can address.

    torch's own allocator rounds pinned memory up to a power of two, which for a pool of 20 GiB
    wastes 12; the CUDA library takes the exact size. Without that library torch allocates. The
    memory is given back when the last tensor on it is gone.

    Raises:
        ValueError: ``num_bytes`` is not positive.
        RuntimeError: there is no GPU, or CUDA cannot pin that much.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes: {num_bytes} bytes cannot be allocated.")
    if not torch.cuda.is_available():
        raise RuntimeError("pinned memory needs a GPU.")
    library = cuda_library().handle
    if library is None:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    torch.cuda.init()
    address = ctypes.c_void_p()
    status = library.hx_cuda_host_alloc(ctypes.byref(address), num_bytes)
    if status or address.value is None:
        text = library.hx_cuda_error_text(status).decode()
        raise RuntimeError(f"CUDA cannot pin {num_bytes} bytes of host memory: {text}.")
    memory = (ctypes.c_uint8 * num_bytes).from_address(address.value)
    # At exit the driver frees it; freeing before that could race with a copy in flight.
    weakref.finalize(memory, library.hx_cuda_host_free, address.value).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)
