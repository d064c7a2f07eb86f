"""Builds the optional native libraries of ``csrc/``; all metadata is in ``pyproject.toml``.

The libraries are an extra: with a compiler they are built and shipped, without one the package
installs all the same and uses its Python and Triton code. ``HEXGEN_BUILD_NATIVE=0`` leaves them
out, ``HEXGEN_BUILD_NATIVE=1`` makes a failed build an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = Path("hexgen_vllm", "kernels")
BUILDERS = ("build_cpu", "build_cuda")


def native_mode() -> str:
    """``auto`` (build what can be built), ``0`` (nothing) or ``1`` (a failure is an error)."""
    mode = os.environ.get("HEXGEN_BUILD_NATIVE", "auto")
    if mode not in {"0", "1", "auto"}:
        raise SystemExit(f"HEXGEN_BUILD_NATIVE must be 0, 1 or auto, not {mode!r}")
    return mode


def load_builder() -> ModuleType | None:
    """Load ``kernels/build.py`` by path: its package may not be importable at build time."""
    path = ROOT / KERNELS / "build.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("hexgen_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_native(out_dir: Path) -> list[Path]:
    """Build every library this machine can build into an emptied ``out_dir``; return them."""
    mode = native_mode()
    shutil.rmtree(out_dir, ignore_errors=True)
    if mode == "0":
        return []
    built: list[Path] = []
    try:
        builder = load_builder()
        if builder is not None:
            out_dir.mkdir(parents=True)
            built = [lib for name in BUILDERS if (lib := getattr(builder, name)(out_dir))]
    except Exception as error:
        if mode == "1":
            raise
        print(f"hexgen-vllm: native libraries left out: {error}")
    if mode == "1" and not built:
        raise SystemExit("HEXGEN_BUILD_NATIVE=1, but no native library could be built")
    print(f"hexgen-vllm: native libraries: {', '.join(lib.name for lib in built) or 'none'}")
    return built


class BuildPy(build_py):
    """Copies the Python files, then builds the libraries beside them."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        build_native(base / KERNELS / "_lib")


class BdistWheel(bdist_wheel):
    """Marks a wheel that carries libraries as one for this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        libs = Path(self.get_finalized_command("build").build_lib, KERNELS, "_lib")
        if any(libs.glob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
