"""The CUDA source's arithmetic, run thread by thread on the host.

``emulated/cuda_runtime.h`` stands in for CUDA's header, so this shows which bytes each thread
moves; it says nothing of speed, streams or what nvcc makes of the code.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

from hexgen_vllm.kernels import BlockLayout, batch, build, cuda, libraries, reference
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

    reference.copy_blocks(layout, host_ids, right, to_records=True)
    cuda._enqueue(library, layout, host_ids, saved, to_records=True, stream=0)
    assert torch.equal(saved, right)
    assert torch.equal(cache.bytes, before.bytes)

    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids)
    cuda._enqueue(library, layout, host_ids, saved, to_records=False, stream=0)
    assert torch.equal(cache.bytes, expected.bytes)


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_a_batch_of_plain_copies(shape: Shape, library: ctypes.CDLL) -> None:
    cache = Cache(shape)
    layout, before = BlockLayout.from_tensors(cache.tensors), cache.copy()
    ids = torch.tensor(random.Random(3).sample(range(shape.blocks), shape.blocks * 2 // 3))
    saved, right = (cache.random_bytes(layout.packed_bytes(ids.numel())) for _ in range(2))
    reference.copy_blocks(layout, ids, right, to_records=True)
    paged, packed, sizes = batch.ranges(layout, ids, saved)

    def submit(to: torch.Tensor, source: torch.Tensor) -> None:
        lists = (to.data_ptr(), source.data_ptr(), sizes.data_ptr())
        assert library.hx_cuda_copy_batch(0, *lists, sizes.numel(), None) == 0

    submit(packed, paged)
    assert torch.equal(saved, right)
    cache.scramble()
    expected = cache.copy()
    expected.put(before, ids.tolist())
    submit(paged, packed)
    assert torch.equal(cache.bytes, expected.bytes)


def test_neighbouring_blocks_of_one_run_are_one_copy() -> None:
    tensor = torch.zeros(8, 3, 64, dtype=torch.uint8)
    layout = BlockLayout.from_tensors(list(tensor.unbind(1)))
    saved = torch.zeros(layout.packed_bytes(4), dtype=torch.uint8)
    _, _, sizes = batch.ranges(layout, torch.tensor([5, 2, 3, 4]), saved)
    assert sizes.tolist() == [192, 576]


CHECKED = """
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
extern "C" int32_t hx_cuda_copy_blocks(int32_t, const void*, int64_t, const int64_t*, int64_t,
                                       uint8_t*, int64_t, int32_t, int32_t, int32_t, void*);
int main() {
  for (int64_t bytes : {1, 36, 64, 1000, 4096}) {
    const int64_t blocks = 5, ids[] = {4, 0, 2};
    auto* cache = static_cast<uint8_t*>(std::malloc(blocks * bytes));
    auto* records = static_cast<uint8_t*>(std::malloc(3 * bytes));
    for (int64_t i = 0; i < blocks * bytes; ++i) cache[i] = static_cast<uint8_t>(i * 7);
    struct alignas(16) { int64_t address, stride, bytes, offset; } piece = {
        reinterpret_cast<int64_t>(cache), bytes, bytes, 0};
    const int word = bytes % 16 == 0 ? 16 : bytes % 4 == 0 ? 4 : 1;
    for (int to : {1, 0})
      if (hx_cuda_copy_blocks(0, &piece, 1, ids, 3, records, bytes, to, word, 2, nullptr)) return 2;
    std::free(records);
    std::free(cache);
  }
  return 0;
}
"""


def checked(folder: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """Run copies of buffers of the exact size under the compiler's sanitizers."""
    compiler, program = build.find_cxx(), folder / "checked"
    assert compiler is not None
    (folder / "main.cpp").write_text(CHECKED)
    sources = build.source_dir()
    emulation = Path(__file__).parent / "emulated"
    flags = ["-O1", "-g", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    where = [f"-I{emulation}", f"-I{sources}", "-Wno-unknown-pragmas"]
    files = ["-x", "c++", str(folder / "main.cpp"), str(source)]
    subprocess.run([compiler, *flags, *where, "-o", program, *files], check=True)
    # The sanitizer has to be loaded first; vLLM sets what else would be.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment = inherited | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, check=False, env=environment)


def test_sanitizers_find_nothing_and_would_find_one_word_too_many(tmp_path: Path) -> None:
    sources = build.source_dir()
    assert sources is not None
    right = (sources / "kv_copy.cu").read_text()
    done = checked(tmp_path, sources / "kv_copy.cu")
    assert (done.returncode, done.stderr) == (0, "")
    wrong = tmp_path / "wrong.cu"
    wrong.write_text(right.replace("if (i < count)", "if (i <= count)"))
    assert wrong.read_text() != right
    assert "heap-buffer-overflow" in checked(tmp_path, wrong).stderr
