"""Find and load the native libraries: the packaged one, a cached one, or one built now."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hexgen_vllm.kernels import build


@dataclass(frozen=True)
class Loaded:
    """A native library, or the reason why there is none."""

    handle: ctypes.CDLL | None
    reason: str


@functools.cache
def cpu_library() -> Loaded:
    """The library of ``csrc/kv_copy_cpu.cpp``; built on first use where a compiler exists."""
    loaded = _load("cpu", build.build_cpu)
    if loaded.handle is not None:
        copy = loaded.handle.hx_cpu_copy_blocks
        copy.restype = None
        copy.argtypes = [
            ctypes.c_void_p,  # pieces
            ctypes.c_int64,  # num_pieces
            ctypes.c_void_p,  # block_ids
            ctypes.c_int64,  # num_ids
            ctypes.c_void_p,  # records
            ctypes.c_int64,  # record_bytes
            ctypes.c_int32,  # to_records
            ctypes.c_int32,  # max_threads
        ]
    return loaded


@functools.cache
def cuda_library() -> Loaded:
    """The library of ``csrc/kv_copy.cu``; built on first use where nvcc exists (seconds)."""
    loaded = _load("cuda", build.build_cuda)
    if loaded.handle is not None:
        _declare_cuda(loaded.handle)
    return loaded


def _declare_cuda(library: ctypes.CDLL) -> None:
    library.hx_cuda_error_text.restype = ctypes.c_char_p
    library.hx_cuda_error_text.argtypes = [ctypes.c_int32]
    library.hx_cuda_copy_batch.restype = ctypes.c_int32
    library.hx_cuda_copy_batch.argtypes = [
        ctypes.c_int32,  # device
        ctypes.c_void_p,  # to
        ctypes.c_void_p,  # from
        ctypes.c_void_p,  # sizes
        ctypes.c_int64,  # count
        ctypes.c_void_p,  # stream
    ]
    library.hx_cuda_copy_blocks.restype = ctypes.c_int32
    library.hx_cuda_copy_blocks.argtypes = [
        ctypes.c_int32,  # device
        ctypes.c_void_p,  # pieces
        ctypes.c_int64,  # num_pieces
        ctypes.c_void_p,  # block_ids
        ctypes.c_int64,  # num_ids
        ctypes.c_void_p,  # records
        ctypes.c_int64,  # record_bytes
        ctypes.c_int32,  # to_records
        ctypes.c_int32,  # word_bytes
        ctypes.c_int32,  # max_grid
        ctypes.c_void_p,  # stream
    ]


def cache_dir() -> Path:
    """Folder of libraries built on first use: ``$HEXGEN_CACHE_DIR`` or the user's cache."""
    chosen = os.environ.get("HEXGEN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hexgen_vllm"


def _load(kind: str, builder: Callable[[Path], build.Built]) -> Loaded:
    path = _existing(kind)
    reason = f"no {kind} library was found"
    if path is None:
        built = builder(cache_dir())
        path, reason = built.path, built.reason
    if path is None:
        return Loaded(None, reason)
    try:
        return Loaded(ctypes.CDLL(str(path)), str(path))
    except OSError as error:
        return Loaded(None, f"{path.name} does not load: {error}")


def _existing(kind: str) -> Path | None:
    """A library made from the present sources; without sources, the packaged one."""
    sources = build.source_dir()
    if sources is None:
        return next(iter(sorted(build.PACKAGED_DIR.glob(f"libhexgen_kv_{kind}-*.so"))), None)
    name = build.library_name(kind, sources)
    candidates = (build.PACKAGED_DIR / name, cache_dir() / name)
    return next((path for path in candidates if path.is_file()), None)
