"""Finding values in a database that a question may mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Final

from examples.text2sql.schema import Schema, connect

MIN_CHARS: Final = 3
MOST_PER_COLUMN: Final = 3


def find_values(
    path: Path, schema: Schema, words: Iterable[str]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return values of text columns that contain one of ``words``, by table and column.

    The words come from a model: they are bound as parameters, never made part of a query.
    """
    wanted = sorted({word.strip() for word in words if len(word.strip()) >= MIN_CHARS})
    columns = [(t.name, c.name) for t in schema.tables for c in t.columns if c.is_text]
    with closing(connect(path)) as connection:
        found = {
            (table, column): _containing(connection, table, column, wanted)
            for table, column in columns
        }
    return {where: values for where, values in found.items() if values}


def _containing(
    connection: sqlite3.Connection, table: str, column: str, words: list[str]
) -> tuple[str, ...]:
    query = (
        f"SELECT DISTINCT {_quoted(column)} FROM {_quoted(table)} "
        f"WHERE instr(lower({_quoted(column)}), lower(?)) ORDER BY 1 LIMIT {MOST_PER_COLUMN}"
    )
    found = [str(value) for word in words for (value,) in connection.execute(query, (word,))]
    return tuple(dict.fromkeys(found))[:MOST_PER_COLUMN]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
