"""The pages as the tests see them: fenced blocks, prose, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDERS: Final = ("csrc", "docs", "examples", "hexgen_vllm", "patches", "tests")
PAGES: Final = tuple(
    sorted(
        page
        for found in (ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in FOLDERS))
        for page in found
        if page.name != "CHANGELOG.md"
    )
)
SHELL: Final = ("sh", "bash", "console")
_FENCED: Final = re.compile(r"^( *)```([\w-]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_FILE: Final = re.compile(r"# ([\w./-]+\.(?:py|yaml|yml|json|toml))\b")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text without indentation."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line is a comment with a name."""
        match = _FILE.match(self.text)
        return match[1] if match and self.language not in SHELL else None

    @property
    def where(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of ``page`` in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCED.finditer(text):
        indent, language, code = match.groups()
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        at = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, at, language, "\n".join(lines) + "\n"))
    return found


def prose(page: Path) -> str:
    """Return the text of ``page`` without its fenced blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def commands(block: Block) -> Iterator[str]:
    """Yield the commands of a shell block; one may go over lines, by ``\\`` or inside quotes."""
    prompts = block.language == "console"
    pending = ""
    for line in block.text.splitlines():
        if prompts and not pending and not line.startswith("$ "):
            continue  # what a command has printed
        pending += (line.removeprefix("$ ") if prompts else line) + "\n"
        if not _is_whole(pending):
            continue
        command, pending = pending.strip(), ""
        if command and not command.startswith("#"):
            yield command
    assert not pending.strip(), f"{block.where}: an unfinished command"


def _is_whole(text: str) -> bool:
    if text.rstrip("\n").endswith("\\"):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def words(command: str) -> list[str]:
    """Return the words of a command, without assignments, ``&`` and what it is piped into."""
    found = shlex.split(command.replace("\\\n", " "), comments=True)
    while found and _ASSIGNMENT.match(found[0]):
        found = found[1:]
    for end in ("|", "&", ">", "&&", ";"):
        if end in found:
            found = found[: found.index(end)]
    return found
