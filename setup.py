"""Builds the optional native libraries of ``csrc/`` and takes ``patches/`` along.

All metadata is in ``pyproject.toml``.

A plain ``pip install .`` runs no compiler: a machine that has one builds the libraries when an
engine first needs them. ``HEXGEN_BUILD_NATIVE=auto`` builds and ships what can be built, as an
editable install does; ``1`` makes it an error when none can be.

``HEXGEN_COMPILE=1`` compiles with mypyc what decides, what simulates and what every call passes
through (a C compiler and the headers of Python are needed): the same code, less than half of the
instructions, for two minutes and more of building; published wheels are made so. ``auto`` does it
where it can be done. An editable install never is.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
PATCHES = ROOT / "patches"
KERNELS = Path("hexgen_vllm", "kernels")
BUILDERS = ("build_cpu", "build_cuda")
COMPILES = frozenset(("bdist_wheel", "build", "build_ext", "install"))  # of what pip asks for
PACKAGE = Path("hexgen_vllm")
COMPILED_FOLDERS = (
    "policy", "sim/engine", "sim/workloads",
    "router/calls", "router/engines", "router/http", "router/observe",
)  # fmt: skip
COMPILED_FILES = (
    "clock", "keys", "types", "wire", "sim/simulator",
    "router/access", "router/app", "router/context", "router/endpoints", "router/errors",
    "router/foreign", "router/metrics", "router/relay", "router/routes", "router/service",
    "router/words",
)  # fmt: skip
INTERPRETED = (
    "router/http/errors",  # a subclass of OSError cannot be compiled
    "router/observe/otel",  # OpenTelemetry may be missing where it is built
    "router/observe/tracing",  # what is there for others to be
)


def to_compile() -> list[str]:
    """Return the files that mypyc gets."""
    found = {path for folder in COMPILED_FOLDERS for path in (ROOT / PACKAGE / folder).glob("*.py")}
    found |= {ROOT / PACKAGE / f"{name}.py" for name in COMPILED_FILES}
    found -= {ROOT / PACKAGE / f"{name}.py" for name in INTERPRETED}
    own = {path.relative_to(ROOT) for path in found if path.name != "__init__.py"}
    return sorted(map(str, own))


def mode_of(variable: str, otherwise: str) -> str:
    """``auto`` (build what can be built), ``0`` (nothing) or ``1`` (none is an error)."""
    mode = os.environ.get(variable, otherwise)
    if mode not in {"0", "1", "auto"}:
        raise SystemExit(f"{variable} must be 0, 1 or auto, not {mode!r}.")
    return mode


COMPILE = mode_of("HEXGEN_COMPILE", "0")


def load_builder() -> ModuleType:
    """Load ``kernels/build.py`` by its path: what the package imports may not be there yet."""
    name = "hexgen_native_build"
    spec = importlib.util.spec_from_file_location(name, ROOT / KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_native(out_dir: Path, otherwise: str) -> list[Path]:
    """Build every library that this machine can build into an emptied ``out_dir``."""
    mode = mode_of("HEXGEN_BUILD_NATIVE", otherwise)
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
    """Return the modules to compile, none where that cannot or shall not be done."""
    if COMPILE == "0" or COMPILES.isdisjoint(sys.argv):
        return []
    found = obstacle()
    if found is not None:
        leave_as_it_is(found)
        return []
    from mypyc.build import mypycify

    # Libraries that are not there when a wheel is built count as Any.
    options = ("--config-file=", "--ignore-missing-imports")
    try:
        return list(mypycify([*options, *to_compile()], opt_level="3", debug_level="0"))
    except SystemExit:  # it has said why
        leave_as_it_is("mypyc does not take it")
        return []


def obstacle() -> str | None:
    """Return why nothing can be compiled here, ``None`` if it can."""
    if importlib.util.find_spec("mypyc") is None:
        return "mypy is not installed"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        try:
            subprocess.run([*compiler, include, "-c", source.name], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return str(error)
    return None


def leave_as_it_is(why: str) -> None:
    """Say that nothing is compiled.

    Raises:
        SystemExit: it must be.
    """
    if COMPILE == "1":
        raise SystemExit(f"HEXGEN_COMPILE=1, but nothing can be compiled: {why}.")
    print(f"hexgen-vllm: not compiled, it works all the same: {why}")


class BuildExt(build_ext):
    """Compiles all of the modules or none: some alone would not find the others."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            for path in self.get_outputs():
                Path(path).unlink(missing_ok=True)
            self.distribution.ext_modules = []
            leave_as_it_is(str(error))


class BuildPy(build_py):
    """Copies the Python files, then puts the libraries and their sources beside them.

    An editable install finds the sources in ``csrc/``; a wheel takes them along, so that a
    machine with a compiler can build what the machine that made the wheel could not.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            if COMPILE == "1":
                raise SystemExit("HEXGEN_COMPILE=1 does not go with an editable install.")
            build_native(ROOT / KERNELS / "_lib", "auto")
            return
        kernels = Path(self.build_lib, KERNELS)
        build_native(kernels / "_lib", "0")
        shutil.rmtree(kernels / "csrc", ignore_errors=True)
        shutil.copytree(SOURCES, kernels / "csrc")
        bundled = Path(self.build_lib, "hexgen_vllm", "patch", "files")
        shutil.rmtree(bundled, ignore_errors=True)
        shutil.copytree(PATCHES, bundled)


class BdistWheel(bdist_wheel):
    """Marks a wheel that carries libraries as one for this platform only."""

    def run(self) -> None:
        self.run_command("build")  # it may turn out that nothing can be compiled
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        libs = Path(self.get_finalized_command("build").build_lib, KERNELS, "_lib")
        if any(libs.glob("*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
    ext_modules=compiled(),
    # Of what is not there when a wheel is built, mypy knows nothing: not which keywords the classes
    # made of it take.
    setup_requires=[] if COMPILE == "0" else ["mypy>=1.15", "msgspec"],
)
