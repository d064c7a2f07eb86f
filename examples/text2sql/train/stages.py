"""What the agent asks at each of its stages, and what a model should say."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from examples.text2sql.train.pairs import Pair, draw
from hexgen_vllm.text2sql import prompts
from hexgen_vllm.text2sql.outcome import QueryOutcome
from hexgen_vllm.text2sql.prompts import ChatPrompt
from hexgen_vllm.text2sql.schema import Schema

PRODUCT: Final = "SQLite"
_CLAUSES: Final = {
    "COUNT(": "count", "AVG(": "average", "SUM(": "sum", "MAX(": "maximum", "MIN(": "minimum",
    "DISTINCT": "different", "WHERE": "filter", "NOT IN": "exclude", "GROUP": "group",
    "HAVING": "keep groups", "ORDER": "sort", "LIMIT": "cut off",
}  # fmt: skip


class Example(NamedTuple):
    """A call of the agent and a good answer."""

    prompt: ChatPrompt
    answer: str


def keywords(pair: Pair) -> Example:
    """Return the call for words that are values."""
    return Example(prompts.keywords(pair.question), "\n".join(pair.words or (pair.noun,)))


def linking(pair: Pair) -> Example:
    """Return the call for tables and columns."""
    known = pair.source.schema.with_values(pair.source.find(list(pair.words)))
    return Example(prompts.links(known, pair.question), _links(pair))


def _links(pair: Pair) -> str:
    return "\n".join(
        f"{table}: {', '.join(pair.columns[table] or [_first(pair.source.schema, table)])}"
        for table in pair.tables
    )


def _first(schema: Schema, table: str) -> str:
    found = schema.table(table)
    assert found is not None
    return found.columns[0].name


def writing(pair: Pair, style: int, rng: random.Random) -> Example:
    """Return the call for a query."""
    prompt = prompts.candidate(PRODUCT, style, _linked(pair, rng), pair.question)
    return Example(prompt, _answer(pair, style))


def _answer(pair: Pair, style: int) -> str:
    return f"{_plan(pair, style)}\n```sql\n{pair.sql}\n```"


def _plan(pair: Pair, style: int) -> str:
    if style == 0:
        return ", ".join(word for clause, word in _CLAUSES.items() if clause in pair.sql) or "read"
    named = pair.tables if style == 1 else pair.outputs
    plan = f"{'from' if style == 1 else 'show'} {', '.join(named)}"
    return re.sub(r"[^A-Za-z0-9 ,]", " ", plan)[:100]


def _linked(pair: Pair, rng: random.Random) -> Schema:
    """Return the part of the schema that the pair needs, now and then with some more."""
    words = [] if rng.random() < 0.1 else list(pair.words)
    known = pair.source.schema.with_values(pair.source.find(words))
    wanted = {table: list(columns) for table, columns in pair.columns.items()}
    while rng.random() < 0.3:
        more = rng.choice(known.tables)
        wanted.setdefault(more.name, []).append(rng.choice(more.columns).name)
    return known.only(wanted)


def revising(pair: Pair, rng: random.Random) -> Example:
    """Return the call for a better query."""
    sql, outcome = _wrong(pair, rng)
    prompt = prompts.revise(PRODUCT, _linked(pair, rng), pair.question, sql, outcome)
    return Example(prompt, _answer(pair, 0))


def _wrong(pair: Pair, rng: random.Random) -> tuple[str, QueryOutcome]:
    names = re.findall(r"\b(\w+)\.(\w+)\b", pair.sql)
    values = re.findall(r"'[^']+'", pair.sql)
    if values and rng.random() < 0.5:
        value = rng.choice(values)
        other = value.swapcase() if rng.random() < 0.5 else f"'{value[2:]}"
        return pair.sql.replace(value, other), QueryOutcome(pair.outputs, ())
    if names and rng.random() < 0.85:
        table, column = rng.choice(names)
        wrong = f"{table}.{rng.choice(('name', 'title', 'id', 'city', 'year', column[:-1] or 'x'))}"
        said = f"no such column: {wrong}"
        return pair.sql.replace(f"{table}.{column}", wrong), QueryOutcome(error=said)
    return "", QueryOutcome(error="the answer holds no SQL query")


_COLUMNS: Final = "The result has {} column"


def testing(pair: Pair, rng: random.Random) -> Example:
    """Return the call for a statement that tells results apart."""
    other = draw(pair.source, rng).sql if rng.random() < 0.5 else _wrong(pair, rng)[0]
    queries = [pair.sql, other or pair.sql]
    rng.shuffle(queries)
    aspect = rng.randrange(len(prompts.TEST_ASPECTS))
    prompt = prompts.unit_test(_linked(pair, rng), pair.question, queries, aspect)
    return Example(prompt, _statement(len(pair.outputs), pair.most if aspect else None))


def _statement(columns: int, rows: int | None) -> str:
    if rows is not None:
        return f"The result has at most {rows} row{'s' * (rows != 1)}."
    return f"The result has {columns} column{'s' * (columns != 1)}."


def judging(pair: Pair, rng: random.Random) -> Example:
    """Return the call for a verdict."""
    columns = rng.choice((len(pair.outputs), rng.randint(1, 3)))
    rows = rng.choice((0, 1, 1, pair.most or 2, rng.randint(2, 12), rng.randint(10, 300)))
    names = tuple(pair.outputs[at % len(pair.outputs)] for at in range(columns))
    cells = [value for texts in pair.source.texts.values() for value in texts[:3]] or ["x"]
    shown = tuple(
        tuple(rng.choice((rng.choice(cells), rng.randint(0, 3000))) for _ in range(columns))
        for _ in range(rows)
    )
    about_rows = pair.most is not None and rng.random() < 0.5
    statement = _statement(len(pair.outputs), pair.most if about_rows else None)
    right = rows <= (pair.most or 0) if about_rows else columns == len(pair.outputs)
    prompt = prompts.evaluate(
        PRODUCT, pair.question, pair.sql, QueryOutcome(names, shown), statement
    )
    reason = f"there are {rows} rows" if about_rows else f"there are {columns} columns"
    return Example(prompt, f"{reason}\nverdict: {'pass' if right else 'fail'}")


_SHARES: Final[Mapping[str, float]] = {
    "keywords": 25, "linking": 24, "writing": 50, "revising": 0.5, "testing": 0.2, "judging": 0.3,
}  # fmt: skip


def example(pair: Pair, rng: random.Random) -> Example:
    """Return the call of some stage about ``pair``."""
    stage = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    if stage == "keywords":
        return keywords(pair)
    if stage == "linking":
        return linking(pair)
    if stage == "writing":
        return writing(pair, rng.randrange(len(prompts.CANDIDATES)), rng)
    return {"revising": revising, "testing": testing, "judging": judging}[stage](pair, rng)
