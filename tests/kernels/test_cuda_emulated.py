"""The CUDA source's arithmetic, run thread by thread on the host.

``emulated/cuda_runtime.h`` stands in for CUDA's header, so this shows which bytes each thread
moves; it says nothing of speed, streams or what nvcc makes of the code.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest
import torch

from hexgen_vllm.kernels import BlockLayout, build, cuda, libraries, reference
from tests.kernels.caches import LAYOUTS, Cache, Shape

SHAPES = [
    *(Shape(order=order, layers=3, content=48) for order in sorted(LAYOUTS)),
    *(Shape(dtype=torch.uint8, shift=shift, content=40) for shift in (0, 1, 2, 4, 8)),
    # Rows of 37 x 1, 2, 4 and 8 bytes with gaps: one word width each.
    *(Shape(dtype=torch.uint8, content=37 * width, pad=width) for width in (1, 2, 4, 8)),
    Shape(dtype=torch.bfloat16, heads=1, content=576, tokens=64, pad=3),
    Shape(dtype=torch.float32, heads=1, tokens=2, content=8, blocks=2000),  # three launches
    Shape(heads=8, tokens=64, content=256, layers=2, blocks=20),  # more work than warps
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources, compiler = build.source_dir(), build.find_cxx()
    assert sources is not None
    assert compiler is not None
    target = tmp_path_factory.mktemp("emulated") / "kv_copy.so"
    emulation = Path(__file__).parent / "emulated"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    source = ["-x", "c++", str(sources / "kv_copy.cu")]
    subprocess.run([compiler, *flags, f"-I{emulation}", "-o", target, *source], check=True)
    loaded = ctypes.CDLL(str(target))
    libraries._declare_cuda(loaded)
    return loaded


@pytest.mark.parametrize("skew", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape: Shape, skew: int, library: ctypes.CDLL) -> None:
    cache = Cache(shape)
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    ids = random.Random(3).sample(range(shape.blocks), shape.blocks * 2 // 3)
    num_bytes = layout.packed_bytes(len(ids))
    saved, right = (cache.random_bytes(num_bytes + skew)[skew:] for _ in range(2))
    host_ids = torch.tensor(ids)

    reference.gather_blocks(layout, ids, right)
    cuda._enqueue(library, layout, host_ids, saved, to_records=True, stream=0)
    assert torch.equal(saved, right)
    assert torch.equal(cache.bytes, before.bytes)

    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids)
    cuda._enqueue(library, layout, host_ids, saved, to_records=False, stream=0)
    assert torch.equal(cache.bytes, expected.bytes)
