"""Compile the native kernels of ``csrc/`` with whatever compiler there is.

``python -m hexgen_vllm.kernels.build`` builds into the package; ``setup.py`` loads this file by
its path and calls the same functions. Hence: standard library only, no import of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGED_DIR = Path(__file__).parent / "_lib"

_SOURCES = {"cpu": "kv_copy_cpu.cpp", "cuda": "kv_copy.cu"}
_HEADER = "kv_copy.h"
_COMMON_FLAGS = ("-O3", "-std=c++17", "-shared")
_CPU_FLAGS = (*_COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-pthread")
# Machine code of 8.0 runs on 8.6 and 8.9 too; later GPUs compile the PTX when it is loaded.
_CUDA_FLAGS = (
    *_COMMON_FLAGS,
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=sm_90"),
    *("-gencode", "arch=compute_90,code=compute_90"),
    *("-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
)


@dataclass(frozen=True)
class Built:
    """What came of a build.

    Attributes:
        path: the library, or ``None``.
        reason: one sentence: which compiler made it, or why there is none.
        compiler: the compiler that ran, or ``None`` when none was found.
    """

    path: Path | None
    reason: str
    compiler: str | None = None


def build_cpu(out_dir: Path) -> Built:
    """Build the CPU library into ``out_dir`` with ``$CXX``, g++ or clang++."""
    return _build("cpu", find_cxx(), _CPU_FLAGS, out_dir)


def build_cuda(out_dir: Path) -> Built:
    """Build the CUDA library into ``out_dir`` with ``$NVCC`` or the nvcc of ``$CUDA_HOME``."""
    return _build("cuda", find_nvcc(), _CUDA_FLAGS, out_dir)


def find_cxx() -> str | None:
    """Path of a C++ compiler, or ``None``."""
    return _first_program(os.environ.get("CXX"), "g++", "c++", "clang++")


def find_nvcc() -> str | None:
    """Path of nvcc, or ``None``."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home]
    return _first_program(os.environ.get("NVCC"), *candidates, "nvcc")


def source_dir() -> Path | None:
    """Folder of the sources: in the package when installed, else in the source tree."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parents[1] / "csrc"):
        if (folder / _HEADER).is_file():
            return folder
    return None


def library_name(kind: str, sources: Path) -> str:
    """File name of a library; it changes with the sources, so a stale build is never loaded."""
    digest = hashlib.sha256()
    for name in (_HEADER, _SOURCES[kind]):
        digest.update((sources / name).read_bytes())
    return f"libhexgen_kv_{kind}-{digest.hexdigest()[:12]}.so"


def _first_program(*names: str | None) -> str | None:
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _build(kind: str, compiler: str | None, flags: Sequence[str], out_dir: Path) -> Built:
    sources = source_dir()
    if sources is None:
        return Built(None, f"the {kind} library has no sources in this installation")
    if compiler is None:
        return Built(None, f"no compiler was found for the {kind} library")
    target = Path(out_dir) / library_name(kind, sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, flags, sources / _SOURCES[kind], target)
    except subprocess.CalledProcessError as error:
        return Built(None, f"{compiler} failed: {error.stderr.strip()[-2000:]}", compiler)
    except OSError as error:
        return Built(None, f"the {kind} library could not be written: {error}", compiler)
    return Built(target, f"{target.name} was built with {compiler}", compiler)


def _compile(compiler: str, flags: Sequence[str], source: Path, target: Path) -> None:
    """Compile beside the target, then rename: another process never sees half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        unfinished = Path(folder) / target.name
        command = [compiler, *flags, "-o", str(unfinished), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(unfinished, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Build both libraries; a missing compiler is no failure, an error of one is."""
    parser = argparse.ArgumentParser(prog="python -m hexgen_vllm.kernels.build")
    parser.add_argument("--out", type=Path, default=PACKAGED_DIR, help="folder to build into")
    out_dir: Path = parser.parse_args(argv).out
    for stale in out_dir.glob("libhexgen_kv_*.so"):
        stale.unlink()
    results = (build_cpu(out_dir), build_cuda(out_dir))
    for result in results:
        print(result.reason, file=sys.stdout if result.path else sys.stderr)
    return int(any(result.path is None and result.compiler for result in results))


if __name__ == "__main__":
    sys.exit(main())
