"""The grammar of queries over a schema: whatever it derives, the database can run.

It covers one table or up to three joined along foreign keys, conditions, rows that no other table
points at, grouping, order and limit. Names come from the schema, in quotes where they need them,
so that no answer names a column that is not in its ``FROM``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hexgen_vllm.text2sql.grammar import (
    PROSE,
    ROOT,
    Alternative,
    Chars,
    Grammar,
    Part,
    Rule,
    listed,
    words,
)
from hexgen_vllm.text2sql.schema import Column, Schema, Table

FENCE: Final = "```"
MOST_SOURCES: Final = 24
_TEXT: Final = "A-Za-z0-9 .:-"
_WHERE, _CONDITION, _COLUMN, _NUMBER, _TEXTS, _MEASURE = (
    "where", "condition", "column", "number", "text", "measure",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """What follows ``FROM``, and the tables in it."""

    clause: str
    tables: tuple[Table, ...]

    def columns(self) -> Iterator[tuple[str, Column]]:
        for table in self.tables:
            yield from ((f"{table.sql}.{column.sql}", column) for column in table.columns)


def query_grammar(schema: Schema, plan_chars: int = 100) -> Grammar:
    """Return the grammar of an answer: a plan in one line, then a query in a fence.

    Args:
        schema: tables and columns to use; ``values`` of columns become literals.
        plan_chars: longest plan, characters.
    """
    rules: dict[str, tuple[Alternative, ...]] = {
        ROOT: ((Chars(PROSE, 0, plan_chars), f"\n{FENCE}sql\n", Rule("query"), f"\n{FENCE}"),),
        "query": (),
        "limit": ((), ("\nLIMIT ", Chars("1-9", 1, 1))),
        "compared": words((" = ", " < ", " > ", " <= ", " >= ", " <> ")),
        "direction": ((), (" DESC",)),
        "amount": ((Chars("0-9", 1, 5),), (Chars("0-9", 1, 3), ".", Chars("0-9", 1, 2))),
        "having": ((), (Rule("kept"),)),
        "kept": (("\nHAVING COUNT(*)", Rule("compared"), Chars("0-9", 1, 3)),),
        "order": ((), ("\nORDER BY 2", Rule("direction"))),
    }
    sources = list(_sources(schema))[:MOST_SOURCES]
    for i, source in enumerate(sources):
        rules |= _rules_of(source, i, schema)
    rules["query"] = tuple((Rule(f"query-{i}"),) for i in range(len(sources)))
    return Grammar(rules)


def _rules_of(source: _Source, i: int, schema: Schema) -> dict[str, tuple[Alternative, ...]]:
    column, measure, where = (Rule(f"{name}-{i}") for name in (_COLUMN, _MEASURE, _WHERE))
    named = dict(source.columns())
    tail: Alternative = (f"\nFROM {source.clause}", where)
    ordered: Alternative = ("\nORDER BY ", column, Rule("direction"), Rule("limit"))
    return {
        f"query-{i}": (
            *(("SELECT ", *parts, *tail) for parts in listed(column, ", ", 3)),
            *(("SELECT ", *parts, *tail, *ordered) for parts in listed(column, ", ", 2)),
            ("SELECT DISTINCT ", column, *tail),
            ("SELECT ", measure, *tail),
            ("SELECT ", column, ", ", measure, *tail, "\nGROUP BY 1", Rule("having"),
             Rule("order"), Rule("limit")),
            ("SELECT ", column, *tail, "\nGROUP BY 1", Rule("kept")),
            *_unreferenced(source, i, schema),
        ),
        f"{_COLUMN}-{i}": words(named),
        f"{_MEASURE}-{i}": tuple(_measures(source, i)),
        f"{_WHERE}-{i}": ((), *(
            ("\nWHERE ", *parts) for parts in listed(Rule(f"{_CONDITION}-{i}"), " AND ", 2)
        )),
        f"{_CONDITION}-{i}": tuple(_conditions(source, i)),
        **_column_kinds(source, i),
    }  # fmt: skip


def _column_kinds(source: _Source, i: int) -> dict[str, tuple[Alternative, ...]]:
    kinds = {
        f"{_TEXTS}-{i}": words(name for name, column in source.columns() if column.is_text),
        f"{_NUMBER}-{i}": words(name for name, column in source.columns() if column.is_number),
    }
    return {name: alternatives for name, alternatives in kinds.items() if alternatives}


def _measures(source: _Source, i: int) -> Iterator[Alternative]:
    yield ("COUNT(*)",)
    yield "COUNT(DISTINCT ", Rule(f"{_COLUMN}-{i}"), ")"
    if any(column.is_number for _, column in source.columns()):
        for function in ("SUM", "AVG", "MIN", "MAX"):
            yield f"{function}(", Rule(f"{_NUMBER}-{i}"), ")"


def _unreferenced(source: _Source, i: int, schema: Schema) -> Iterator[Alternative]:
    """Yield queries for the rows of one table that no row of another one points at."""
    table, *others = source.tables
    if others:
        return
    for child in (one for one in schema.tables if one.name != table.name):
        for column in child.columns:
            if column.references and column.references[0] == table.name:
                target = ".".join(schema.sql_of(column.references))
                inner = f"SELECT {child.sql}.{column.sql} FROM {child.sql}"
                where = f"\nFROM {source.clause}\nWHERE {target} NOT IN ({inner})"
                for said in (Rule(f"{_COLUMN}-{i}"), "COUNT(*)"):
                    yield "SELECT ", said, where


def _conditions(source: _Source, i: int) -> Iterator[Alternative]:
    kinds = _column_kinds(source, i)
    compared: Part = Rule("compared")
    if f"{_NUMBER}-{i}" in kinds:
        yield Rule(f"{_NUMBER}-{i}"), compared, Rule("amount")
    if f"{_TEXTS}-{i}" in kinds:
        yield Rule(f"{_TEXTS}-{i}"), compared, "'", Chars(_TEXT, 1, 20), "'"
        yield Rule(f"{_TEXTS}-{i}"), " LIKE '%", Chars(_TEXT, 1, 12), "%'"
        yield Rule(f"{_TEXTS}-{i}"), compared, Rule(f"{_TEXTS}-{i}")
    yield Rule(f"{_COLUMN}-{i}"), " IS NOT NULL"
    yield Rule(f"{_COLUMN}-{i}"), " IS NULL"
    for name, column in source.columns():
        for value in column.values:
            yield (f"{name} = '{value.replace(chr(39), chr(39) * 2)}'",)


def _sources(schema: Schema) -> Iterator[_Source]:
    """Yield single tables first, then pairs, then chains of three: the short ones are kept."""
    single = [_Source(table.sql, (table,)) for table in schema.tables]
    pairs = [wider for source in single for wider in _joined(source, schema)]
    chains = [wider for source in pairs for wider in _joined(source, schema)]
    seen: set[frozenset[str]] = set()
    for source in (*single, *pairs, *chains):
        names = frozenset(table.name for table in source.tables)
        if names not in seen:
            seen.add(names)
            yield source


def _joined(source: _Source, schema: Schema) -> Iterator[_Source]:
    inside = {table.name for table in source.tables}
    for table in schema.tables:
        if table.name in inside:
            continue
        for on in _links(table, source.tables, schema):
            yield _Source(f"{source.clause} JOIN {table.sql} ON {on}", (*source.tables, table))


def _links(table: Table, others: tuple[Table, ...], schema: Schema) -> Iterator[str]:
    for other in others:
        for left, right in ((table, other), (other, table)):
            for column in left.columns:
                if column.references and column.references[0] == right.name:
                    target = ".".join(schema.sql_of(column.references))
                    yield f"{left.sql}.{column.sql} = {target}"
