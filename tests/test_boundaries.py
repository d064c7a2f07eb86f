"""Who may import what. Every import counts: lazy, relative, for types only, or by name.

The rules keep the policy a set of functions that a simulator can run, vLLM in one folder, and
wall time in one file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hexgen_vllm"

# Standard library without I/O, clock, threads or global state.
PURE_STDLIB = frozenset({
    "__future__", "abc", "base64", "bisect", "collections", "copy", "dataclasses", "decimal",
    "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math",
    "numbers", "operator", "re", "statistics", "string", "struct", "types", "typing",
    "urllib.parse",
})  # fmt: skip
PURE_OWN = frozenset({"types", "config", "errors", "option"})
DYNAMIC = frozenset({"import_module", "__import__"})


@dataclass(frozen=True)
class Never:
    """Modules that the files below ``where`` must not import, except those below ``unless``."""

    where: tuple[str, ...]
    modules: tuple[str, ...]
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Only:
    """The files below ``where`` import pure standard library, ``own`` modules and ``others``."""

    where: tuple[str, ...]
    own: frozenset[str]
    others: frozenset[str] = frozenset()


def own(*folders: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{folder}" for folder in folders)


EVERYWHERE = ("",)
RULES: Mapping[str, Never | Only] = {
    "only engine names vllm": Never(EVERYWHERE, ("vllm",), unless=("engine",)),
    "only kernels and engine name torch and triton": Never(
        EVERYWHERE,
        ("torch", "triton", "transformers"),
        unless=("engine", "kernels", "testing.tiny_model"),
    ),
    "only cluster.ray names ray": Never(EVERYWHERE, ("ray",), unless=("cluster.ray",)),
    "only clock reads the time": Never(
        EVERYWHERE, ("time", "datetime"), unless=("clock", "engine", "bench", "testing.pace")
    ),
    "kernels know nothing of scheduling": Never(
        ("kernels",), own("engine", "policy", "router", "client", "sim", "tune")
    ),
    "router and client work without engine and simulator": Never(
        ("router", "client"), ("vllm", "torch", "triton", *own("engine", "sim", "kernels"))
    ),
    "simulator and tuner live in virtual time": Never(
        ("sim", "tune"), ("asyncio", "threading", *own("router", "engine", "kernels", "clock"))
    ),
    "policy is pure": Only(("policy",), PURE_OWN | {"policy", "wire"}, frozenset({"numpy"})),
    "types, wire and errors are pure": Only(("types", "wire", "errors"), PURE_OWN),
    "records and their summary are pure": Only(
        ("records", "report.summary"), PURE_OWN | {"records", "report.summary"}
    ),
}


@dataclass(frozen=True)
class Module:
    """A source file of the package; ``name`` is relative to the package: ``policy.slack``."""

    name: str
    source: str
    is_package: bool = False

    def within(self, folders: tuple[str, ...]) -> bool:
        return any(below(self.name, folder) for folder in folders)


def below(name: str, parent: str) -> bool:
    """Tell whether dotted ``name`` is ``parent`` or inside it; everything is inside ``""``."""
    return parent in ("", name) or name.startswith(parent + ".")


@cache
def modules() -> list[Module]:
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name, path.read_text(), is_package))
    return found


@cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


def imports(module: Module) -> Iterator[str]:
    """Yield the absolute dotted name of everything that ``module`` imports."""
    for node in ast.walk(tree(module.source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in DYNAMIC:
            yield from (text for argument in node.args for text in texts(argument))


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """Return the module that a ``from`` import names, with its leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *filter(None, module.name.split("."))]
    up = node.level - 1 if module.is_package else node.level
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def called(node: ast.Call) -> str:
    """Return the last name of what is called: ``import_module`` for ``importlib.import_module``."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def violations(module: Module) -> list[str]:
    """Return one line per import of ``module`` that breaks a rule."""
    found, named = [], list(imports(module))
    for title, rule in RULES.items():
        for name in named if module.within(rule.where) else ():
            if breaks(rule, module, name):
                found.append(f"{module.name or PACKAGE} imports {name}: {title}")
    return found


def breaks(rule: Never | Only, module: Module, name: str) -> bool:
    if isinstance(rule, Never):
        banned = any(below(name, parent) for parent in rule.modules)
        return banned and not module.within(rule.unless)
    if below(name, PACKAGE):
        return not any(below(name, f"{PACKAGE}.{own_name}") for own_name in rule.own)
    if name == "random.Random":  # a generator that is passed in is an argument like any other
        return False
    return not any(below(name, allowed) for allowed in PURE_STDLIB | rule.others)


def test_no_import_crosses_a_boundary() -> None:
    found = modules()
    assert len(found) > len(RULES)
    assert [line for module in found for line in violations(module)] == []


def test_nothing_in_the_package_imports_objects_from_its_root() -> None:
    """``from hexgen_vllm import X`` would reach the engine around the rules above."""
    names = {module.name.split(".")[0] for module in modules()} | {"__version__"}
    roots = [
        f"{module.name} imports {name}"
        for module in modules()
        for name in imports(module)
        if below(name, PACKAGE) and name != PACKAGE and name.split(".")[1] not in names
    ]
    assert roots == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("router.app", "import vllm"),
        ("serve", "def main():\n    from vllm.engine import arg_utils"),
        ("policy.urgency", "if TYPE_CHECKING:\n    from vllm.v1.request import Request"),
        ("client.workflow", "import importlib\nimportlib.import_module('vllm')"),
        ("bench.live", "import torch.cuda"),
        ("cluster.command_line", "def run():\n    import ray.exceptions"),
        ("router.app", "import time"),
        ("testing", "from datetime import datetime"),
        ("cluster.file", "from time import monotonic as now"),
        ("kernels.cpu", "from ..policy import slack"),
        ("router.app", "from hexgen_vllm.engine.telemetry import Snapshot"),
        ("router.app", "from ..sim.simulator import Loop"),
        ("client", "from hexgen_vllm import engine"),
        ("sim.engine.engine", "import asyncio"),
        ("sim.engine.engine", "from hexgen_vllm.clock import SystemClock"),
        ("tune.search", "from .. import router"),
        ("policy.urgency", "import logging"),
        ("policy.urgency", "import random"),
        ("policy.urgency", "from random import choice"),
        ("policy.urgency", "from os import path"),
        ("policy.urgency", "from ..clock import Clock"),
        ("policy.urgency", "from hexgen_vllm import report"),
        ("wire", "import numpy"),
        ("wire", "from .policy import slack"),
        ("types", "import uuid"),
        ("report.summary", "from . import sinks"),
    ],
)
def test_the_rules_catch(name: str, source: str) -> None:
    assert violations(Module(name, source)) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine.scheduler", "import time, vllm, torch\nfrom hexgen_vllm.policy import slack"),
        ("kernels.reference", "import torch, ctypes"),
        ("cluster.ray.nodes", "import ray"),
        ("clock", "import time, random"),
        ("bench.live", "import time, asyncio"),
        (
            "policy.urgency",
            "from random import Random\nfrom ..types import Call\nimport math, numpy",
        ),
        ("policy.urgency", "from collections.abc import Mapping\nfrom hexgen_vllm.policy import x"),
        ("router.app", "import asyncio, aiohttp\nfrom hexgen_vllm.policy.dispatch import pick"),
        ("report.summary", "from ..records import CallRecord"),
    ],
)
def test_the_rules_allow(name: str, source: str) -> None:
    assert violations(Module(name, source)) == []


def test_relative_imports_are_resolved_from_packages_too() -> None:
    inner = Module("router", "from . import app\nfrom ..sim import loop", is_package=True)
    assert list(imports(inner)) == [f"{PACKAGE}.router.app", f"{PACKAGE}.sim.loop"]
    assert violations(inner) != []


def test_each_name_of_a_class_means_one_thing() -> None:
    found: dict[str, list[str]] = {}
    for module in modules():
        for node in tree(module.source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module.name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


HEAVY = {"anthropic", "matplotlib", "openai", "torch", "transformers", "vllm"}
COLLECT = """
import sys, pytest
pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", *sys.argv[1:]])
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.slow
def test_collecting_what_make_check_runs_loads_nothing_heavy() -> None:
    said = dict(re.findall(r"^(\w+) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = [said["NO_ENGINE"], *said["CHECKED"].split()]
    run = subprocess.run(
        [sys.executable, "-c", COLLECT, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert " tests collected" in run.stdout, run.stdout + run.stderr
    assert set(run.stdout.split()) & HEAVY == set()
