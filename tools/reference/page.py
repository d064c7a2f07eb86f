"""All parts of the reference as one page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tools.reference import (
    commands,
    files,
    python_api,
    routes,
    variables,
)

_HEAD: Final = """# Reference

Written from the code by `hexgen-vllm reference --out docs/reference.md`; do not edit.
`hexgen-vllm reference` prints that of the installed version.

- [Commands](#commands): every command and its options
- [Files](#files): keys of cluster, router and scenario files
- [HTTP](#http): endpoints and headers
- [Python](#python): public names
- [Environment variables](#environment-variables)
"""


def page() -> str:
    """Return the page, Markdown."""
    parts = [
        _HEAD,
        _part("Commands", commands.sections(), coded=True),
        _part("Files", files.sections()),
        _part("HTTP", routes.sections()),
        _part("Python", python_api.sections(), coded=True),
        f"## Environment variables\n\n{variables.text()}\n",
    ]
    return "\n".join(parts)


def _part(title: str, sections: Iterable[tuple[str, str]], *, coded: bool = False) -> str:
    mark = "`" if coded else ""
    texts = [f"### {mark}{name}{mark}\n\n{text}\n" for name, text in sections]
    return "\n".join([f"## {title}\n", *texts])
