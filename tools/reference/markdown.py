"""The little Markdown that the page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown, with their bars and line breaks made harmless."""
    lines = [_row(headings), _row(["---"] * len(headings))]
    return "\n".join([*lines, *(_row([_cell(cell) for cell in row]) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: object) -> str:
    """Return ``text`` as code, nothing for an empty one."""
    return f"`{text}`" if str(text) else ""


def shown(value: object) -> str:
    """Return a default value as a reader writes it; nothing where there is none."""
    if value is None or value in ((), [], {}):
        return ""
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple | list):
        return code(" ".join(map(str, value)))
    return code(f"{value:g}" if isinstance(value, float) else value)


def limits(meta: Any) -> str:
    """Return what the metadata of an option allows: words, or a range."""
    if meta.get("choices"):
        return ", ".join(code(word) for word in meta["choices"])
    least, most = meta.get("least"), meta.get("most")
    if least is None and most is None:
        return ""
    if most is None:
        return f"≥ {least:g}"
    return f"≤ {most:g}" if least is None else f"{least:g} to {most:g}"


def keys(cls: type[Any], *, but: Sequence[str] = ()) -> str:
    """Return the table of the keys that the options of ``cls`` make in a file."""
    rows = [
        (code(f.name), shown(_default(f)), limits(f.metadata), f.metadata.get("doc", ""))
        for f in fields(cls)
        if f.name not in but
    ]
    return table(("key", "default", "values", "meaning"), rows)


def _default(one: Field[Any]) -> object:
    if one.default is not MISSING:
        return one.default
    made = None if one.default_factory is MISSING else one.default_factory()
    return made if isinstance(made, tuple | dict | list) else None
