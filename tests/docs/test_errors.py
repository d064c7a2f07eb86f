"""Every sentence with which something refuses to start is documented, and no other."""

from __future__ import annotations

import re

from tests.docs.sentences import ROOT, sentences

PAGES = ("troubleshooting.md", "tool-errors.md")
TEXTS = {name: (ROOT / "docs" / name).read_text() for name in PAGES}
CODE = re.compile(r"``(?P<long>.+?)``|`(?P<short>[^`]+)`")


def documented(text: str) -> set[str]:
    """Return the sentences in the first columns of the tables of ``text``."""
    found = set()
    for table in re.findall(r"^\| sentence \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M):
        for row in table.splitlines():
            first, _, cure = row.strip("| ").rpartition(" | ")
            assert cure, row
            found |= {m["long"] or m["short"] for m in CODE.finditer(first)}
    return found


def test_every_sentence_of_the_code_is_documented() -> None:
    known = set().union(*map(documented, TEXTS.values()))
    missing = {s: file for s, file in sentences(".").items() if s not in known}
    assert not missing, "add a row with its cure to docs/troubleshooting.md or tool-errors.md"


def test_every_documented_sentence_is_in_the_code() -> None:
    said = set(sentences("."))
    for name, text in TEXTS.items():
        assert documented(text) <= said, name
