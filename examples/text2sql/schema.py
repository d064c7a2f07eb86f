"""What a database looks like: read from its file, cut down to what matters, shown as text."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its name.
        type: declared type, upper case.
        key: whether it is part of the primary key.
        references: table and column that it points at, ``None`` when it is no foreign key.
        values: values of text that fit the question, as examples.
    """

    name: str
    type: str
    key: bool = False
    references: tuple[str, str] | None = None
    values: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it holds text."""
        return "CHAR" in self.type or "TEXT" in self.type

    def line(self) -> str:
        """Return the column in one line of a prompt."""
        target = f" -> {'.'.join(self.references)}" if self.references else ""
        shown = f" e.g. {', '.join(map(repr, self.values))}" if self.values else ""
        return f"  {self.name} {self.type}{target}{shown}"


@dataclass(frozen=True)
class Table:
    """A table and its columns."""

    name: str
    columns: tuple[Column, ...]

    def text(self) -> str:
        """Return the table as lines of a prompt."""
        return "\n".join([f"{self.name}:", *(column.line() for column in self.columns)])


@dataclass(frozen=True)
class Schema:
    """Tables of a database."""

    tables: tuple[Table, ...]

    def text(self) -> str:
        """Return the schema as lines of a prompt; the same schema gives the same text."""
        return "\n".join(table.text() for table in self.tables)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of columns by table."""
        return {table.name: tuple(c.name for c in table.columns) for table in self.tables}

    def only(self, wanted: Mapping[str, Iterable[str]]) -> Schema:
        """Return the named tables with the named columns and all keys; no table gives all."""
        tables = tuple(_cut(t, set(wanted[t.name])) for t in self.tables if t.name in wanted)
        return Schema(tables) if tables else self

    def with_values(self, values: Mapping[tuple[str, str], Iterable[str]]) -> Schema:
        """Return the schema with example values, by table and column."""
        return Schema(
            tuple(
                Table(
                    table.name,
                    tuple(
                        replace(column, values=tuple(values.get((table.name, column.name), ())))
                        for column in table.columns
                    ),
                )
                for table in self.tables
            )
        )


def _cut(table: Table, wanted: set[str]) -> Table:
    kept = (c for c in table.columns if c.key or c.references or c.name in wanted)
    return Table(table.name, tuple(kept))


def read_schema(path: Path) -> Schema:
    """Return the schema of the SQLite file ``path``.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    with closing(connect(path)) as connection:
        found = connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
        return Schema(tuple(Table(name, _columns(connection, name)) for (name,) in found))


def connect(path: Path) -> sqlite3.Connection:
    """Open ``path`` for reading only."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _columns(connection: sqlite3.Connection, table: str) -> tuple[Column, ...]:
    links = connection.execute(
        'SELECT "from", "table", "to" FROM pragma_foreign_key_list(?)', (table,)
    )
    targets = {column: (other, to or "id") for column, other, to in links}
    infos = connection.execute("SELECT name, type, pk FROM pragma_table_info(?)", (table,))
    return tuple(
        Column(name, str(kind).upper(), bool(pk), targets.get(name)) for name, kind, pk in infos
    )
