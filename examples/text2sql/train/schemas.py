"""Schemas to ask about: the demo's own, and any number that are made up."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from examples.text2sql.databases import build
from examples.text2sql.train import vocabulary as said
from examples.text2sql.train.vocabulary import SaidColumn, SaidLink, SaidSchema, SaidTable
from hexgen_vllm.text2sql.database import MIN_CHARS, MOST_PER_COLUMN, Database
from hexgen_vllm.text2sql.schema import Column, Schema, Table

Where = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """A schema as the agent shows it, how people speak of it, and its texts by column."""

    said: SaidSchema
    schema: Schema
    texts: Mapping[Where, tuple[str, ...]]

    def find(self, words: list[str]) -> dict[Where, tuple[str, ...]]:
        """Return what :meth:`~hexgen_vllm.text2sql.database.Database.find_values` finds."""
        wanted = sorted({word.lower() for word in words if len(word) >= MIN_CHARS})
        found: dict[Where, tuple[str, ...]] = {}
        for where, texts in self.texts.items():
            hits = (text for word in wanted
                    for text in [t for t in texts if word in t.lower()][:3])  # fmt: skip
            if values := tuple(dict.fromkeys(hits))[:MOST_PER_COLUMN]:
                found[where] = values
        return found


def demo(folder: Path) -> list[Source]:
    """Return the demo's schemas; their databases are built in ``folder``."""
    return [_demo(schema, build(schema.name, folder / schema.name)) for schema in said.DEMO]


def _demo(spoken: SaidSchema, path: Path) -> Source:
    with Database.open(path) as database, closing(sqlite3.connect(path)) as connection:
        schema = database.schema()
        texts = {
            (table.name, column.name): tuple(
                value for (value,) in connection.execute(
                    f"SELECT DISTINCT {column.sql} FROM {table.sql} "
                    f"WHERE {column.sql} IS NOT NULL ORDER BY 1"
                )
            )
            for table in schema.tables for column in table.columns if column.is_text
        }  # fmt: skip
    tables = {table.name: table for table in spoken.tables}
    order = [tables[table.name] for table in schema.tables]
    filled = tuple(
        replace(table, columns=tuple(
            replace(column, values=texts.get((table.name, column.name), ()))
            for column in table.columns
        )) for table in order
    )  # fmt: skip
    return Source(replace(spoken, tables=filled), schema, texts)


_VOWELS: Final = "aeiou"


def plural(word: str) -> str:
    """Return an English plural."""
    if word.endswith("y") and word[-2:-1] not in _VOWELS:
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def made_up(rng: random.Random) -> Source:
    """Return a schema of two to six tables that nobody has seen."""
    spoken = SaidSchema("database", tuple(_tables(rng)))
    schema = Schema(tuple(_shown(table, spoken, rng) for table in spoken.tables))
    texts = {
        (table.name, column.name): tuple(sorted(column.values))
        for table in spoken.tables for column in table.columns if column.values
    }  # fmt: skip
    return Source(spoken, schema, texts)


def _invented(rng: random.Random) -> str:
    return "".join(rng.choice(said.SYLLABLES) for _ in range(rng.choice((2, 2, 3))))


def _tables(rng: random.Random) -> Iterator[SaidTable]:
    names: list[str] = []
    count = rng.randint(2, 6)
    while len(names) < count:
        name = _invented(rng) if rng.random() < 0.15 else rng.choice(said.NOUNS)
        if name not in names:
            names.append(name)
    keys = {name: rng.choice(("id", "id", "id", f"{name}_id")) for name in names}
    for at, name in enumerate(names):
        targets = rng.sample(names[:at], min(at, rng.choice((0, 1, 1, 1, 2)))) if at else []
        links = tuple(_link(target, rng) for target in targets)
        one = name.replace("_", " ")
        yield SaidTable(name, one, plural(one), tuple(_columns(name, rng)), links, keys[name])


def _link(target: str, rng: random.Random) -> SaidLink:
    after, predicate, active = rng.choice(said.OWNERS)
    return said.link(target, after, predicate, active)


def _columns(table: str, rng: random.Random) -> Iterator[SaidColumn]:
    taken: set[str] = set()

    def free(name: str) -> str:
        if rng.random() < 0.1:
            name = f"{table}_{name}"
        while name in taken:
            name = f"{name}_{_invented(rng)}"
        taken.add(name)
        return name

    if rng.random() < 0.85:
        called = rng.choice(("name", "name", "title", "label"))
        pool = rng.choice((said.NAMES, said.THINGS, said.FIRMS))
        name = free(called)
        yield said.label(name, _spoken(name, table, called), rng.sample(pool, 8))
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        yield _column(table, rng, free)


def _spoken(name: str, table: str, called: str = "") -> str:
    words = name.removeprefix(f"{table}_").replace("_", " ")
    return f"{called}/{words}" if called and called != words else words


def _column(table: str, rng: random.Random, free: Callable[[str], str]) -> SaidColumn:
    kind = rng.choice(("category", "category", "number", "number", "number", "year", "date",
                       "place"))  # fmt: skip
    if kind == "place":
        called = rng.choice(("city", "country", "town"))
        pool = said.NATIONS if called == "country" else said.PLACES
        return said.category(free(called), called, rng.sample(pool, 6), "from {}/in {}",
                             "are from {}/come from {}/are in {}")  # fmt: skip
    if kind == "category":
        called = _invented(rng) if rng.random() < 0.15 else rng.choice(said.CATEGORY_NAMES)
        values: tuple[str, ...] = rng.choice(said.GROUPS)
        if rng.random() < 0.3:
            values = tuple(rng.sample(said.FIRMS, 4))
        elif rng.random() < 0.2:
            values = tuple(_invented(rng) for _ in range(4))
        if rng.random() < 0.15:
            values = tuple(value.capitalize() for value in values)
        name = free(called)
        return said.category(name, _spoken(name, table), values, predicates="are {}",
                             bare=rng.random() < 0.6, nullable=rng.random() < 0.25)  # fmt: skip
    if kind == "number":
        called, words, most, least, verbs, whole = rng.choice(said.NUMBER_NAMES)
        if rng.random() < 0.1:
            called = words = _invented(rng)
            most = least = verbs = whole = ""
        high = rng.choice((10, 50, 100, 1000, 10000))
        name = free(called)
        words = words if name == called else f"{_spoken(name, table)}"
        return said.number(name, words, (1, high), most, least, verbs, whole)
    if kind == "year":
        called, verb, most, least = rng.choice(said.YEAR_NAMES)
        name = free(rng.choice((f"{called}_year", f"year_{called}", f"{called}_in")))
        return said.year(name, f"year/{called} year", verb, most, least)
    called, verb = rng.choice(said.DAY_NAMES)
    name = free(rng.choice((f"{called}_on", f"{called}_at", f"{called}_date", f"date_{called}")))
    return said.day(name, f"{called} date", verb, nullable=rng.random() < 0.5)


def _shown(table: SaidTable, spoken: SaidSchema, rng: random.Random) -> Table:
    key = Column(table.key, "INTEGER", key=True)
    columns = [Column(column.name, column.type) for column in table.columns]
    for one in table.links:
        linked = Column(one.name, "INTEGER", references=(one.target, spoken.table(one.target).key))
        columns.insert(rng.randint(0, len(columns)), linked)
    return Table(table.name, (key, *columns))
