"""The sentences with which the package refuses to start or to go on, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hexgen_vllm"
PLACES: Final = ("hexgen_vllm", "benchmarks", "tools")
ERRORS: Final = frozenset(("ConfigError", "UnsupportedVLLM", "ProcessFailed"))
HOLE: Final = "…"


def sentences(*parts: str) -> dict[str, str]:
    """Return sentence and file of every error below ``parts`` of package, benchmarks and tools.

    What is filled in is an ellipsis.
    """
    found: dict[str, str] = {}
    for path in files(parts):
        for sentence in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(sentence, path.relative_to(ROOT).as_posix())
    return found


def files(parts: Sequence[str]) -> list[Path]:
    """Return the source files named, and those below the folders named."""
    named = (ROOT / place / part for place in PLACES for part in parts)
    chosen = [path for path in named if path.exists()]
    return sorted(
        file for path in chosen for file in (path.rglob("*.py") if path.is_dir() else [path])
    )


def _raised(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        text = None
        if name in ERRORS:
            text = template(node.args[0])
        elif name == "error" and len(node.args) > 1:  # Located.error(path, sentence)
            text = template(node.args[1])
        if text is not None and text.strip(f"{HOLE} :") != "line":
            yield text


def template(node: ast.expr) -> str | None:
    """Return a text with its holes; ``None`` for one that is put together elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else HOLE for v in node.values]
        return " ".join("".join(map(str, parts)).split())
    return None
