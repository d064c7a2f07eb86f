"""Builds the optional native libraries of ``csrc/`` and takes ``patches/`` along.

All metadata is in ``pyproject.toml``.

The libraries are an extra: with a compiler they are built and shipped, without one the package
installs all the same and uses its Python and Triton code. ``HEXGEN_BUILD_NATIVE=0`` leaves them
out, ``HEXGEN_BUILD_NATIVE=1`` makes it an error when none can be built.

``HEXGEN_COMPILE=1`` compiles what decides and what simulates with mypyc: the same code, two to
three times as fast.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
PATCHES = ROOT / "patches"
KERNELS = Path("hexgen_vllm", "kernels")
BUILDERS = ("build_cpu", "build_cuda")
COMPILE = os.environ.get("HEXGEN_COMPILE", "0") == "1"
SIMULATES = (
    "batch", "decodes", "demoted", "displacing", "engine", "keeping", "loop", "model",
    "prefix_cache", "pricing", "prompts", "queues", "records", "sequence", "simulator", "tight",
    "truth", "workload",
)  # fmt: skip
COMPILED = [
    "hexgen_vllm/types.py",
    *sorted(
        f"hexgen_vllm/policy/{path.name}" for path in ROOT.glob("hexgen_vllm/policy/[a-z]*.py")
    ),
    *(f"hexgen_vllm/sim/{name}.py" for name in SIMULATES),
]


def native_mode() -> str:
    """``auto`` (build what can be built), ``0`` (nothing) or ``1`` (none is an error)."""
    mode = os.environ.get("HEXGEN_BUILD_NATIVE", "auto")
    if mode not in {"0", "1", "auto"}:
        raise SystemExit(f"HEXGEN_BUILD_NATIVE must be 0, 1 or auto, not {mode!r}.")
    return mode


def load_builder() -> ModuleType:
    """Load ``kernels/build.py`` by its path: what the package imports may not be there yet."""
    name = "hexgen_native_build"
    spec = importlib.util.spec_from_file_location(name, ROOT / KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_native(out_dir: Path) -> list[Path]:
    """Build every library that this machine can build into an emptied ``out_dir``."""
    mode = native_mode()
    shutil.rmtree(out_dir, ignore_errors=True)
    if mode == "0":
        return []
    builder = load_builder()
    results = [getattr(builder, name)(out_dir) for name in BUILDERS]
    for result in results:
        print(f"hexgen-vllm: {result.reason}")
    built = [result.path for result in results if result.path is not None]
    if mode == "1" and not built:
        raise SystemExit("HEXGEN_BUILD_NATIVE=1, but no native library could be built.")
    return built


def compiled() -> list[Extension]:
    """Return the modules to compile; none where pip has yet to find out that it needs mypy."""
    if not COMPILE or importlib.util.find_spec("mypyc") is None:
        return []
    from mypyc.build import mypycify

    return list(mypycify(["--config-file=", *COMPILED], opt_level="3"))


class BuildPy(build_py):
    """Copies the Python files, then puts the libraries and their sources beside them.

    An editable install finds the sources in ``csrc/``; a wheel takes them along, so that a
    machine with a compiler can build what the machine that made the wheel could not.
    """

    def run(self) -> None:
        super().run()
        if COMPILE and self.editable_mode:
            raise SystemExit("HEXGEN_COMPILE=1 does not go with an editable install.")
        if COMPILE and not self.distribution.ext_modules:
            raise SystemExit("HEXGEN_COMPILE=1, but mypy is not installed.")
        if self.editable_mode:
            build_native(ROOT / KERNELS / "_lib")
            return
        kernels = Path(self.build_lib, KERNELS)
        build_native(kernels / "_lib")
        shutil.rmtree(kernels / "csrc", ignore_errors=True)
        shutil.copytree(SOURCES, kernels / "csrc")
        bundled = Path(self.build_lib, "hexgen_vllm", "patch", "files")
        shutil.rmtree(bundled, ignore_errors=True)
        shutil.copytree(PATCHES, bundled)


class BdistWheel(bdist_wheel):
    """Marks a wheel that carries libraries as one for this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        libs = Path(self.get_finalized_command("build").build_lib, KERNELS, "_lib")
        if any(libs.glob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    ext_modules=compiled(),
    setup_requires=["mypy"] if COMPILE else [],
)
