"""The native libraries compile, load and say so when they cannot."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen_vllm.kernels import build, libraries

BUILD_FILE = Path(build.__file__)


def test_cpu_library_builds_and_loads(tmp_path: Path) -> None:
    built = build.build_cpu(tmp_path)
    assert built.path is not None, built.reason
    assert ctypes.CDLL(str(built.path)).hx_cpu_copy_blocks
    assert [path.name for path in tmp_path.iterdir()] == [built.path.name]


@pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_library_builds_and_loads(tmp_path: Path) -> None:
    built = build.build_cuda(tmp_path)
    assert built.path is not None, built.reason
    library = ctypes.CDLL(str(built.path))
    library.hx_cuda_error_text.restype = ctypes.c_char_p
    assert library.hx_cuda_error_text(0) == b"no error"
    for name in ("hx_cuda_copy_blocks", "hx_cuda_copy_batch"):
        assert getattr(library, name)


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_source_compiles_for_every_gpu_without_a_warning(tmp_path: Path) -> None:
    nvcc, sources = build.find_nvcc(), build.source_dir()
    assert nvcc is not None
    assert sources is not None
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {"80", "86", "89", "90", "100", "120"} & set(
        listed.stdout.replace("compute_", "").split()
    )
    assert known >= {"80", "90"}
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in sorted(known)]
    flags = ["-O3", "-std=c++17", "-Werror", "all-warnings", "--threads", "2", *targets]
    command = [nvcc, *flags, "-fatbin", "-o", str(tmp_path / "kv"), str(sources / "kv_copy.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_compiler_is_a_reason_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_cxx", lambda: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    for built in (build.build_cpu(tmp_path), build.build_cuda(tmp_path)):
        assert (built.path, built.compiler) == (None, None)
        assert "no compiler was found" in built.reason
    assert build.main(["--out", str(tmp_path)]) == 0


def test_a_compiler_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("CXX", str(compiler))
    out = tmp_path / "out"
    assert build.main(["--out", str(out)]) == 1
    assert "no such flag" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_library_changes_its_name_with_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = build.source_dir()
    assert sources is not None
    for source in sources.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert build.library_name("cpu", tmp_path) == build.library_name("cpu", sources)
    with (tmp_path / "kv_copy.h").open("a") as header:
        header.write("// changed\n")
    assert build.library_name("cpu", tmp_path) != build.library_name("cpu", sources)


def test_without_sources_the_packaged_library_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.build_cpu(tmp_path)
    monkeypatch.setattr(build, "PACKAGED_DIR", tmp_path)
    monkeypatch.setattr(build, "source_dir", lambda: None)
    libraries.cpu_library.cache_clear()
    try:
        loaded = libraries.cpu_library()
    finally:
        libraries.cpu_library.cache_clear()
    assert loaded.handle is not None
    assert loaded.reason == str(built.path)


def test_the_build_file_runs_without_the_package(tmp_path: Path) -> None:
    """setup.py loads it by path, in an environment that has neither torch nor us."""
    code = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(BUILD_FILE)!r})\n"
        "assert 'torch' not in sys.modules and 'hexgen_vllm' not in sys.modules\n"
        "assert callable(names['build_cpu']) and callable(names['build_cuda'])\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
