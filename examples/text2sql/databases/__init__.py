"""Three databases made by script: the same seed gives the same rows on every machine.

paths = build_all(Path("out/agent/databases"))
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from examples.text2sql.databases import clinic, library, shop, unseen

Rows = Mapping[str, Iterable[tuple[Any, ...]]]


class Source(NamedTuple):
    """How a database is made: its ``CREATE TABLE`` script and its rows, by table."""

    schema: str
    rows: Callable[[random.Random], Rows]


SOURCES: Final[Mapping[str, Source]] = {
    "library": Source(library.SCHEMA, library.rows),
    "clinic": Source(clinic.SCHEMA, clinic.rows),
    "shop": Source(shop.SCHEMA, shop.rows),
}
UNSEEN: Final[Mapping[str, Source]] = {
    "airline": Source(unseen.AIRLINE, unseen.airline),
    "music": Source(unseen.MUSIC, unseen.music),
}
"""What the demo's model has not been trained on."""


def build(name: str, path: Path, seed: int = 0) -> Path:
    """Write database ``name`` to ``path``, replacing what is there; return ``path``."""
    source = {**SOURCES, **UNSEEN}[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    connection = sqlite3.connect(draft)
    try:
        connection.executescript(source.schema)
        for table, rows in source.rows(random.Random(f"{name}/{seed}")).items():
            _insert(connection, table, list(rows))
        connection.commit()
        connection.execute("PRAGMA foreign_keys = ON")
        broken = connection.execute("PRAGMA foreign_key_check").fetchall()
        assert not broken, broken[:3]
    finally:
        connection.close()
    return draft.replace(path)


def build_all(
    folder: Path, seed: int = 0, sources: Mapping[str, Source] = SOURCES
) -> dict[str, Path]:
    """Write all databases into ``folder``; return their files by name."""
    return {name: build(name, folder / f"{name}.sqlite", seed) for name in sources}


def _insert(connection: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    places = ", ".join("?" for _ in rows[0])
    connection.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
