"""Reading what a model said. Models are not exact: what cannot be read is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_FENCED = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_BARE = re.compile(r"^\s*((?:SELECT|WITH)\b.*)", re.DOTALL | re.IGNORECASE | re.MULTILINE)
_VERDICT = re.compile(r"\b(pass|fail)\b", re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def without_thought(text: str) -> str:
    """Return ``text`` without what a reasoning model thinks aloud, as text that can be encoded."""
    return _THOUGHT.sub("", text).encode(errors="replace").decode().strip()


def query(text: str) -> str:
    """Return the last fenced query, or what begins like one, or an empty string."""
    fenced = _FENCED.findall(text)
    bare = _BARE.search(text)
    found = fenced[-1] if fenced else bare[1] if bare else ""
    return found.strip().rstrip(";").rstrip()


def lines(text: str, most: int) -> list[str]:
    """Return up to ``most`` lines without bullets, quotes and empty ones."""
    found = (line.strip().lstrip("-*• ").strip("\"'` ") for line in text.splitlines())
    return [line for line in found if line][:most]


def links(text: str, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the tables and columns that ``text`` names, those only that are in ``names``."""
    found: dict[str, list[str]] = {}
    for line in lines(text, most=50):
        table, _, columns = line.partition(":")
        name = table.strip('`" ').lower()
        if name in names:
            said = {column.strip('`" ').rpartition(".")[2] for column in columns.split(",")}
            found.setdefault(name, []).extend(c for c in names[name] if c in said)
    return found


def passes(text: str) -> bool:
    """Return whether the last verdict in ``text`` is a pass."""
    found = _VERDICT.findall(text)
    return bool(found) and found[-1].lower() == "pass"
