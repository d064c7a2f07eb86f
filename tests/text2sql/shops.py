"""The shop for music on every kind of database that the agent knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import psycopg

from tests.text2sql import music

ORDINARY = Path(__file__).with_name("ordinary.sql")


def ordinary(dialect: str) -> list[str]:
    """Return queries as people and their tools write them, that must run on ``dialect``."""
    _, *sections = re.split(r"^---- (\w+)\n", ORDINARY.read_text(), flags=re.MULTILINE)
    return [
        query
        for name, body in zip(sections[::2], sections[1::2], strict=True)
        if name in ("all", dialect)
        for query in re.split(r"\n----\n", body.removesuffix("\n"))
    ]


def build_duckdb(path: Path) -> Path:
    """Write the shop into a new file of DuckDB."""
    with duckdb.connect(str(path)) as connection:
        for sql, found in music.statements():
            if found is None:
                connection.execute(sql)
            elif len(found) < 10:  # rows that reference others of the same table
                connection.executemany(sql, found)
            else:  # at once: DuckDB is slow with one row at a time
                values = ", ".join(f"({', '.join(map(_literal, row))})" for row in found)
                connection.execute(f"{sql.partition('VALUES')[0]} VALUES {values}")
    return path


def _literal(value: object) -> str:
    return "NULL" if value is None else repr(value)


def build_postgres(url: str) -> None:
    """Write the shop into a database of PostgreSQL."""
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        for sql, found in music.statements("%s"):
            if found is None:
                cursor.execute(sql.encode())
            else:
                cursor.executemany(sql.encode(), found)
        for sql in numbers():
            cursor.execute(sql.encode())


def numbers() -> Iterator[str]:
    """Yield what makes a table of some hundred rows with an id, for what must not run."""
    yield "CREATE TABLE loan (id INTEGER PRIMARY KEY)"
    yield f"INSERT INTO loan VALUES {', '.join(f'({n})' for n in range(1, 1201))}"
