"""The Triton kernel compiles for real GPUs; the interpreter accepts what the compiler refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hexgen_vllm.kernels import BlockLayout, triton_copy


@pytest.mark.parametrize(("alignment", "loads"), [(16, "ld.global.v2.b64"), (2, "ld.global.b16")])
@pytest.mark.parametrize(("size", "to_records"), [(16384, True), (16384, False), (8192, True)])
def test_compiles_to_wide_loads(
    size: int,
    alignment: int,
    loads: str,
    to_records: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns while it is unset
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_copy._kernel(False)
    types = ("*i64", "*i64", "i64", "i32", "i32", "i32")
    constants = triton_copy._constants(size, alignment, to_records)
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8},
    )
    assert loads in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("page", "size"), [(40, 1024), (8 << 10, 8 << 10), (12 << 10, 16 << 10), (1 << 20, 16 << 10)]
)
def test_no_lane_idles_because_pages_are_small(page: int, size: int) -> None:
    layout = BlockLayout.from_tensors([torch.zeros(2, page, dtype=torch.uint8)])
    assert triton_copy.piece_bytes(layout) == size
