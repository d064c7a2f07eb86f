"""Public names with the heads of their docstrings.

The sources are read, not imported: the scheduler cannot be imported without vLLM.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import hexgen_vllm
from tools.reference.markdown import code, table

MODULES: Final = (
    "hexgen_vllm",
    "hexgen_vllm.client",
    "hexgen_vllm.cluster",
    "hexgen_vllm.errors",
    "hexgen_vllm.testing",
    "hexgen_vllm.testing.fake_server",
)
_ROOT: Final = Path(hexgen_vllm.__file__).parents[1]
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sections() -> Iterator[tuple[str, str]]:
    """Yield title and text of each public module."""
    top = set(public(MODULES[0]))
    for module in MODULES:
        new = [name for name in public(module) if module == MODULES[0] or name not in top]
        rows = [row for name in new for row in _rows(module, name)]
        yield module, f"{head(tree(module))}\n\n{table(('name', 'what'), rows)}"


@cache
def tree(module: str) -> ast.Module:
    """Return the parsed source of ``module``."""
    path = _ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public(module: str) -> list[str]:
    """Return the names in ``__all__``, or without one the classes and functions of ``module``."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    return [n.name for n in tree(module).body if isinstance(n, Definition)]


def definition(module: str, name: str) -> tuple[str, Definition]:
    """Return where ``name`` of ``module`` is defined, and its definition.

    Raises:
        LookupError: nothing of that name is a class or a function.
    """
    if module == "hexgen_vllm" and name in hexgen_vllm._HOMES:
        return definition(hexgen_vllm._HOMES[name], name)
    for node in reversed(tree(module).body):  # the last one counts, after overloads
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(str(node.module), name)
    raise LookupError(f"{module} defines no {name}")


def head(node: ast.Module | Definition) -> str:
    """Return the first paragraph of a docstring, its code marked as in Markdown."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")


def _rows(module: str, name: str) -> Iterator[tuple[str, str]]:
    _, node = definition(module, name)
    yield code(f"{name}{_arguments(node)}"), head(node)
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, Definition) and not method.name.startswith("_"):
                yield code(f"{name}.{_spelled(method)}"), head(method)


def _spelled(method: Definition) -> str:
    marks = {ast.unparse(one) for one in getattr(method, "decorator_list", ())}
    return method.name if "property" in marks else f"{method.name}{_arguments(method)}"


def _arguments(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        made = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
        return _arguments(made[-1]) if made else ""
    found = node.args
    plain = [*found.posonlyargs, *found.args]
    needed: list[ast.expr | None] = [None] * (len(plain) - len(found.defaults))
    names = [
        _argument(one, default)
        for one, default in zip(plain, [*needed, *found.defaults], strict=True)
        if one.arg not in ("self", "cls")
    ]
    only = list(map(_argument, found.kwonlyargs, found.kw_defaults))
    return f"({', '.join([*names, *(['*', *only] if only else [])])})"


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    return one.arg if default is None else f"{one.arg}={ast.unparse(default)}"
