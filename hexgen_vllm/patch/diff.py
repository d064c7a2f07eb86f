"""Unified diffs, applied to exactly what they were made for or not at all.

A hunk fits where all its old lines stand, once in the file; line numbers are not looked at. There
is no fuzz: a patch that nearly fits would be a scheduler that nearly works.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from hexgen_vllm.errors import HexgenError

_FILE = re.compile(r"\+\+\+ b/(\S+)")
_SIDES: Final = {" ": (0, 1), "-": (0,), "+": (1,)}
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class MismatchError(HexgenError):
    """A diff does not fit the text, or is none."""


class Hunk(NamedTuple):
    """Neighbouring lines, ends of line included, before and after a change."""

    old: tuple[str, ...]
    new: tuple[str, ...]


Diff = dict[str, tuple[Hunk, ...]]
"""Hunks by the path of the file that they change."""


def parse(text: str) -> Diff:
    """Read a unified diff; what stands between its hunks is a message and left out.

    Raises:
        MismatchError: it changes nothing, or a hunk is shorter than it says.
    """
    found: dict[str, tuple[Hunk, ...]] = {}
    path = ""
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if header := _FILE.match(line):
            path = header[1]
        elif hunk := _HUNK.match(line):
            sizes = [int(size or 1) for size in hunk.groups()]
            found[path] = (*found.get(path, ()), _hunk(lines, *sizes))
    if not found:
        raise MismatchError("the patch changes nothing.")
    return found


def _hunk(lines: Iterator[str], old_size: int, new_size: int) -> Hunk:
    old: list[str] = []
    new: list[str] = []
    while len(old) < old_size or len(new) < new_size:
        line = next(lines, "")
        if line[:1] not in _SIDES:
            raise MismatchError(f"{line!r} is no line of a hunk.")
        for side in _SIDES[line[0]]:
            (old, new)[side].append(line[1:])
    return Hunk(tuple(old), tuple(new))


def reverse(hunks: Iterable[Hunk]) -> tuple[Hunk, ...]:
    """Return the hunks that take back what ``hunks`` do."""
    return tuple(Hunk(hunk.new, hunk.old) for hunk in hunks)


def apply(text: str, hunks: Iterable[Hunk]) -> str:
    """Return ``text`` with every hunk applied.

    Raises:
        MismatchError: one does not fit, or fits in several places.
    """
    lines = text.splitlines(keepends=True)
    for number, hunk in enumerate(hunks, 1):
        size = len(hunk.old)
        starts = range(len(lines) - size + 1)
        places = [i for i in starts if tuple(lines[i : i + size]) == hunk.old]
        if len(places) != 1:
            raise MismatchError(f"hunk {number} fits in {len(places)} places, not in one.")
        lines[places[0] : places[0] + size] = hunk.new
    return "".join(lines)


def fits(text: str, hunks: Iterable[Hunk]) -> bool:
    """Return whether :func:`apply` would succeed."""
    try:
        apply(text, hunks)
    except MismatchError:
        return False
    return True
