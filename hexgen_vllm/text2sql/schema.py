"""What a database looks like, cut down to what matters, shown as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

_TEXT: Final = ("CHAR", "TEXT", "CLOB", "STRING", "ENUM", "NAME", "CITEXT")
_NUMBER: Final = ("INT", "REAL", "FLOA", "DOUB", "NUMERIC", "DECIMAL", "SERIAL", "NUMBER")
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]+")
SHOWN_CHARS: Final = 80  # of an example value
SHOWN_TYPE_CHARS: Final = 300  # one that lists its values may be long


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its name.
        type: declared type, its words in upper case; empty when none is declared.
        key: whether it is part of the primary key.
        references: table and column that it points at, ``None`` when it is no foreign key.
        values: values of text that fit the question, as examples.
        sql: its name as SQL needs it; the name itself by default.
    """

    name: str
    type: str
    key: bool = False
    references: tuple[str, str] | None = None
    values: tuple[str, ...] = ()
    sql: str = ""

    def __post_init__(self) -> None:
        if not self.sql:
            object.__setattr__(self, "sql", self.name)

    @property
    def is_text(self) -> bool:
        """Whether it holds text."""
        return any(kind in self.type for kind in _TEXT)

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers."""
        return not self.is_text and any(kind in self.type for kind in _NUMBER)

    def line(self, target: tuple[str, str] | None = None) -> str:
        """Return the column in one line of a prompt; ``target`` is what it references, in SQL."""
        target = target or self.references
        link = f" -> {'.'.join(target)}" if target else ""
        shown = f" e.g. {', '.join(map(_literal, self.values))}" if self.values else ""
        type = _cut_off(self.type, SHOWN_TYPE_CHARS)
        return _CONTROL.sub(" ", f"  {' '.join(filter(None, (self.sql, type)))}{link}{shown}")


def _literal(value: str) -> str:
    return "'" + _cut_off(value, SHOWN_CHARS).replace("'", "''") + "'"


def _cut_off(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[:chars]}…"


@dataclass(frozen=True)
class Table:
    """A table or view and its columns.

    Attributes:
        name: its name, behind its schema's and a dot where it is not found without.
        columns: its columns.
        sql: its name as SQL needs it; the name itself by default.
    """

    name: str
    columns: tuple[Column, ...]
    sql: str = ""

    def __post_init__(self) -> None:
        if not self.sql:
            object.__setattr__(self, "sql", self.name)

    def text(self, among: Schema) -> str:
        """Return the table, one of ``among``, as lines of a prompt."""
        links = (c.references and among.sql_of(c.references) for c in self.columns)
        lines = (c.line(link) for c, link in zip(self.columns, links, strict=True))
        return "\n".join([_CONTROL.sub(" ", f"{self.sql}:"), *lines])


@dataclass(frozen=True)
class Schema:
    """Tables of a database."""

    tables: tuple[Table, ...]

    @cached_property
    def _by_name(self) -> dict[str, Table]:
        return {table.name: table for table in self.tables}

    def text(self) -> str:
        """Return the schema as lines of a prompt; the same schema gives the same text."""
        return "\n".join(table.text(self) for table in self.tables)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of columns by table."""
        return {table.name: tuple(c.name for c in table.columns) for table in self.tables}

    def table(self, name: str) -> Table | None:
        """Return the table ``name``, ``None`` if there is none."""
        return self._by_name.get(name)

    def sql_of(self, target: tuple[str, str]) -> tuple[str, str]:
        """Return a table and its column, given by name, as SQL needs them."""
        table = self.table(target[0])
        if table is None:
            return target
        return table.sql, next((c.sql for c in table.columns if c.name == target[1]), target[1])

    def only(self, wanted: Mapping[str, Iterable[str]]) -> Schema:
        """Return the named tables with the named columns and all keys; no table gives all."""
        tables = tuple(_cut(t, set(wanted[t.name])) for t in self.tables if t.name in wanted)
        return Schema(tables) if tables else self

    def within(self, chars: int, question: str) -> Schema:
        """Return what of the schema fits into ``chars`` characters of a prompt.

        Tables stay by how many words of the question are in their text; of equals, the first.
        """
        if len(self.text()) <= chars:
            return self
        words = {word.lower().rstrip("s") for word in re.findall(r"\w{3,}", question)}
        texts = [table.text(self) for table in self.tables]
        ranked = sorted(
            range(len(texts)), key=lambda i: -sum(word in texts[i].lower() for word in words)
        )
        kept, left = set(), chars
        for i in ranked:
            if len(texts[i]) < left:
                kept.add(i)
                left -= len(texts[i]) + 1
        if not kept:  # not even one: its first columns
            table = self.tables[ranked[0]]
            return Schema((replace(table, columns=table.columns[: max(chars // 40, 1)]),))
        return Schema(tuple(table for i, table in enumerate(self.tables) if i in kept))

    def with_values(self, values: Mapping[tuple[str, str], Iterable[str]]) -> Schema:
        """Return the schema with example values, by table and column."""
        return Schema(
            tuple(
                replace(
                    table,
                    columns=tuple(
                        replace(column, values=tuple(values.get((table.name, column.name), ())))
                        for column in table.columns
                    ),
                )
                for table in self.tables
            )
        )


def _cut(table: Table, wanted: set[str]) -> Table:
    kept = tuple(c for c in table.columns if c.key or c.references or c.name in wanted)
    return replace(table, columns=kept or table.columns)


def spelled(name: str, reserved: Iterable[str] = (), *, folds: bool = False) -> str:
    """Return a name as SQL needs it: in quotes if it is reserved or not plain.

    Args:
        name: the name.
        reserved: words that are no name without quotes, in lower case.
        folds: whether the database takes names without quotes for lower case.
    """
    plain = _PLAIN.fullmatch(name) and name.lower() not in reserved
    return name if plain and not (folds and name != name.lower()) else quoted(name)


def quoted(name: str) -> str:
    """Return a name in quotes."""
    return '"' + name.replace('"', '""') + '"'
