"""Grammars for constrained decoding: what a model may say at one stage, and no more.

A grammar is a table of rules. Every alternative is finite, so every answer ends. Servers get it
as xgrammar's EBNF; vLLM takes that in the field ``structured_outputs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Rule:
    """The rule ``name``, where another rule refers to it."""

    name: str


@dataclass(frozen=True)
class Chars:
    """From ``least`` to ``most`` characters of a class, written as in ``[...]``."""

    among: str
    least: int
    most: int


Part = str | Rule | Chars
Alternative = tuple[Part, ...]
Rules = Mapping[str, tuple[Alternative, ...]]

ROOT: Final = "root"
PROSE: Final = "A-Za-z0-9 ,"


@dataclass(frozen=True)
class Grammar:
    """Rules by name; an answer is what :data:`ROOT` derives."""

    rules: Rules

    def ebnf(self) -> str:
        """Return the grammar in xgrammar's EBNF."""
        return "\n".join(
            f"{name} ::= {' | '.join(_alternative(parts) for parts in alternatives)}"
            for name, alternatives in self.rules.items()
        )

    def extra_body(self) -> dict[str, object]:
        """Return the fields of a request that make vLLM keep to the grammar."""
        return {"structured_outputs": {"grammar": self.ebnf()}}


def _alternative(parts: Alternative) -> str:
    return " ".join(map(_part, parts)) or '""'


def _part(part: Part) -> str:
    if isinstance(part, Rule):
        return part.name
    if isinstance(part, Chars):
        return f"[{part.among}]{{{part.least},{part.most}}}"
    escaped = part.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def words(options: Iterable[str]) -> tuple[Alternative, ...]:
    """Return one alternative for each word."""
    return tuple((option,) for option in options)


def listed(item: Rule, separator: str, most: int) -> tuple[Alternative, ...]:
    """Return the alternatives of a list of 1 to ``most`` items."""
    return tuple(
        (item, *(part for _ in range(count) for part in (separator, item))) for count in range(most)
    )


def keywords(question: str) -> Grammar:
    """Return the grammar of up to four words of the question, one on a line."""
    found = dict.fromkeys(word.strip("?.,:;'\"") for word in question.split())
    return Grammar({
        ROOT: listed(Rule("word"), "\n", 4),
        "word": words(word for word in found if len(word) > 2) or words(["none"]),
    })  # fmt: skip


def links(names: Mapping[str, Iterable[str]]) -> Grammar:
    """Return the grammar of up to four lines ``table: column, column``."""
    rules: dict[str, tuple[Alternative, ...]] = {ROOT: listed(Rule("line"), "\n", 4)}
    rules["line"] = tuple((f"{table}: ", Rule(f"of-{i}")) for i, table in enumerate(names))
    for i, columns in enumerate(names.values()):
        rules[f"of-{i}"] = listed(Rule(f"column-{i}"), ", ", 3)
        rules[f"column-{i}"] = words(columns)
    return Grammar(rules)


def unit_test() -> Grammar:
    """Return the grammar of one short sentence."""
    return Grammar({ROOT: (("The result ", Chars(PROSE, 10, 80), "."),)})


def verdict() -> Grammar:
    """Return the grammar of a short reason and a verdict."""
    return Grammar({ROOT: ((Chars(PROSE, 5, 60), "\nverdict: ", Rule("word")),),
                    "word": words(("pass", "fail"))})  # fmt: skip
