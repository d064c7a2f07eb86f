"""Runs SQL that a model wrote: it can read the tables, for a while, and nothing else.

Four walls, each enough against most attempts:

1. The file is opened read-only.
2. SQLite asks :class:`_Guard` before it compiles each action: reading the database's own tables
   and plain functions pass; writes, PRAGMA, ATTACH, transactions, schema tables, unknown
   functions and recursive queries do not.
3. One statement per call, of bounded length and depth, whose values are of bounded size.
4. A limit on time, rows and bytes of the result.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from examples.text2sql.schema import connect
from hexgen_vllm.clock import Clock, SystemClock

Row = tuple[Any, ...]

FUNCTIONS: Final = frozenset({
    "abs", "avg", "ceil", "ceiling", "char", "coalesce", "count", "cume_dist", "date", "datetime",
    "dense_rank", "first_value", "floor", "glob", "group_concat", "iif", "ifnull", "instr",
    "julianday", "lag", "last_value", "lead", "length", "like", "lower", "ltrim", "max", "min",
    "mod", "nth_value", "ntile", "nullif", "percent_rank", "power", "rank", "replace", "round",
    "row_number", "rtrim", "sign", "sqrt", "strftime", "substr", "substring", "sum", "time",
    "total", "trim", "typeof", "unicode", "unixepoch", "upper",
})  # fmt: skip
_ACTIONS: Final = {
    sqlite3.SQLITE_ALTER_TABLE: "changing the schema",
    sqlite3.SQLITE_ATTACH: "ATTACH or VACUUM",
    sqlite3.SQLITE_DELETE: "DELETE",
    sqlite3.SQLITE_INSERT: "INSERT",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
    sqlite3.SQLITE_RECURSIVE: "a recursive query",
    sqlite3.SQLITE_TRANSACTION: "a transaction",
    sqlite3.SQLITE_UPDATE: "UPDATE",
}
# CREATE, DROP and ANALYZE write the schema's own table; so does, as an UPDATE, a SELECT from a
# virtual table (json_each, dbstat, pragma_table_info), which SQLite 3.40 declares on its first use.
_SCHEMA_TABLES: Final = frozenset({"sqlite_master", "sqlite_temp_master"})
_SCHEMA_ACTIONS: Final = {
    sqlite3.SQLITE_DELETE: "changing the schema",
    sqlite3.SQLITE_INSERT: "changing the schema",
    sqlite3.SQLITE_UPDATE: "a virtual table",
}
_UNDECLARED: Final = "vtable constructor failed: "  # SQLite's words before such a table's name
_OPERATIONS_PER_LOOK: Final = 1000  # of SQLite's machine, between two looks at the clock


@dataclass(frozen=True)
class Limits:
    """What a query may use: seconds, rows of the result, bytes of query, value and result."""

    time_s: float = 2.0
    rows: int = 1000
    sql_bytes: int = 10_000
    value_bytes: int = 100_000
    result_bytes: int = 1_000_000


@dataclass(frozen=True)
class Outcome:
    """What came of a query.

    Attributes:
        columns: names of the result's columns.
        rows: the result, ``None`` when there is none.
        error: why there is none, in one sentence.
        refused: whether that is because it may not run.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] | None = None
    error: str | None = None
    refused: bool = False

    @property
    def is_telling(self) -> bool:
        """Whether there is a row with a value: an answer that may be right."""
        return any(value is not None for row in self.rows or () for value in row)


class Sandbox:
    """Runs queries on one database file."""

    def __init__(
        self, path: Path, limits: Limits | None = None, clock: Clock | None = None
    ) -> None:
        self._path = path
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()

    def run(self, sql: str) -> Outcome:
        """Run one query; whatever is wrong with it comes back as an error."""
        if len(sql.encode(errors="replace")) > self._limits.sql_bytes:
            return _refusal(f"the query is longer than {self._limits.sql_bytes} bytes")
        with closing(connect(self._path)) as connection:
            guard = _Guard(_tables(connection))
            self._restrict(connection, guard)
            try:
                return self._result(connection.execute(sql))
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                return self._explained(error, guard)

    def _restrict(self, connection: sqlite3.Connection, guard: _Guard) -> None:
        for limit, value in (
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_LENGTH, self._limits.value_bytes),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20),
            (sqlite3.SQLITE_LIMIT_COLUMN, 200),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200),
            (sqlite3.SQLITE_LIMIT_VDBE_OP, 50_000),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            connection.setlimit(limit, value)
        connection.set_authorizer(guard.allows)
        until_s = self._clock.now() + self._limits.time_s
        connection.set_progress_handler(lambda: self._clock.now() > until_s, _OPERATIONS_PER_LOOK)

    def _result(self, cursor: sqlite3.Cursor) -> Outcome:
        if cursor.description is None:
            return _refusal("only a SELECT may run")
        rows: list[Row] = []
        size = 0
        for row in cursor:
            size += sum(len(v) if isinstance(v, str | bytes) else 8 for v in row)
            if len(rows) == self._limits.rows:
                return _refusal(f"the result has more than {self._limits.rows} rows")
            if size > self._limits.result_bytes:
                return _refusal(f"the result is larger than {self._limits.result_bytes} bytes")
            rows.append(row)
        return Outcome(tuple(column[0] for column in cursor.description), tuple(rows))

    def _explained(self, error: Exception, guard: _Guard) -> Outcome:
        said = str(error)
        if guard.denied is not None:
            named = said.startswith(_UNDECLARED)
            denied = f"the table {said.removeprefix(_UNDECLARED)}" if named else guard.denied
            return _refusal(f"{denied} is not allowed; only a SELECT on the tables may run")
        if said == "interrupted":
            return _refusal(f"the query ran longer than {self._limits.time_s:g} s")
        if "one statement" in said:
            return _refusal("only one statement may run")
        if (
            "too big" in said
            or "null char" in said
            or isinstance(error, ValueError | sqlite3.Warning)
        ):
            return _refusal(said)
        return Outcome(error=said)


class _Guard:
    """Says which actions may be compiled, and remembers the first that may not."""

    def __init__(self, tables: Iterable[str]) -> None:
        self.denied: str | None = None
        self._tables = frozenset(tables)

    def allows(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """Answer SQLite; see https://sqlite.org/c3ref/set_authorizer.html."""
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            # No column: a subquery of which no column is used, such as under COUNT(*).
            if first in self._tables or (not second and not (first or "").startswith("sqlite_")):
                return sqlite3.SQLITE_OK
            return self._deny(f"the table {first}")
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() in FUNCTIONS:
                return sqlite3.SQLITE_OK
            return self._deny(f"function {second}")
        known = _SCHEMA_ACTIONS if first in _SCHEMA_TABLES else _ACTIONS
        return self._deny(known.get(action, "this kind of statement"))

    def _deny(self, what: str) -> int:
        self.denied = self.denied or what
        return sqlite3.SQLITE_DENY


def _tables(connection: sqlite3.Connection) -> list[str]:
    found = connection.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")
    return [name for (name,) in found if not name.startswith("sqlite_")]


def _refusal(why: str) -> Outcome:
    return Outcome(error=f"refused: {why}", refused=True)
