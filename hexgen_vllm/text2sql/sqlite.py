"""A file of SQLite: read-only, and asked before it compiles each action.

The file is opened with ``mode=ro``. SQLite asks :class:`_Guard` before each action: reading the
database's own tables and plain functions pass; writes, PRAGMA, ATTACH, transactions, schema tables
and unknown functions do not. Values, depth and time are bounded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.gate import FUNCTIONS, READS
from hexgen_vllm.text2sql.outcome import QueryLimits, QueryOutcome, Result, failure, refusal
from hexgen_vllm.text2sql.schema import Column, Schema, Table, quoted, spelled

SEARCHED_ROWS: Final = 100_000  # of a table, for values
_BUSY_S: Final = 2.0  # to wait for who is writing
_RESERVED_WORDS: Final = """
    abort action add after all alter always analyze and as asc attach autoincrement before begin
    between by cascade case cast check collate column commit conflict constraint create cross
    current current_date current_time current_timestamp database default deferrable deferred
    delete desc detach distinct do drop each else end escape except exclude exclusive exists
    explain fail false filter first following for foreign from full generated glob group groups
    having if ignore immediate in index indexed initially inner insert instead intersect into is
    isnull join key last left like limit match materialized natural no not nothing notnull null
    nulls of offset on or order others outer over partition plan pragma preceding primary
    query raise range recursive references regexp reindex release rename replace restrict
    returning right rollback row rows savepoint select set table temp temporary then ties to
    transaction trigger true unbounded union unique update using vacuum values view virtual
    when where window with without
"""
_RESERVED: Final = frozenset(_RESERVED_WORDS.split())
_ACTIONS: Final = {
    sqlite3.SQLITE_ALTER_TABLE: "changing the schema",
    sqlite3.SQLITE_ATTACH: "ATTACH or VACUUM",
    sqlite3.SQLITE_DELETE: "DELETE",
    sqlite3.SQLITE_INSERT: "INSERT",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
    sqlite3.SQLITE_TRANSACTION: "a transaction",
    sqlite3.SQLITE_UPDATE: "UPDATE",
}
# CREATE, DROP and ANALYZE write the schema's own table; so does, as an UPDATE, a SELECT from a
# virtual table (dbstat, pragma_table_info), which SQLite 3.40 declares on its first use.
_SCHEMA_TABLES: Final = frozenset({"sqlite_master", "sqlite_temp_master"})
_SCHEMA_ACTIONS: Final = {
    sqlite3.SQLITE_DELETE: "changing the schema",
    sqlite3.SQLITE_INSERT: "changing the schema",
    sqlite3.SQLITE_UPDATE: "a virtual table",
}
_CALLED: Final = FUNCTIONS["sqlite"] | {"->", "->>"}  # operators, which it takes for functions
_OF_SQLITE: Final = ("json_each", "json_tree")  # table-valued functions that only read
_UNDECLARED: Final = "vtable constructor failed: "  # SQLite's words before such a table's name
_OPERATIONS_PER_LOOK: Final = 1000  # of SQLite's machine, between two looks at the clock


class SqliteFile:
    """Reads one file; every query has a connection of its own, so threads need no lock."""

    dialect: Final = "sqlite"
    product: Final = "SQLite"

    def __init__(self, path: Path, limits: QueryLimits, clock: Clock) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock

    def schemas(self) -> Sequence[str]:
        """Return what may stand before a table's name."""
        return ("main",)

    def catalog(self) -> str:
        """Return nothing: a name has two parts at most."""
        return ""

    def schema(self) -> Schema:
        """Read tables and views.

        Raises:
            ConfigError: the file cannot be read as a database.
        """
        try:
            with closing(self._connect()) as connection:
                return Schema(tuple(_tables(connection)))
        except sqlite3.Error as error:
            raise ConfigError(f"database: {self._path} cannot be read: {error}.") from None

    def run(self, sql: str) -> QueryOutcome:
        """Run one query."""
        try:
            connection = self._connect()
        except sqlite3.Error as error:
            return failure(error)
        with closing(connection):
            try:
                guard = self._restrict(connection)
                return self._result(connection.execute(sql))
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                return self._explained(error, guard)

    def values(self, schema: Schema, words: Sequence[str]) -> dict[tuple[str, str], list[str]]:
        """Find values that hold one of ``words``, as long as a query may run."""
        found: dict[tuple[str, str], list[str]] = {}
        with suppress(sqlite3.Error), closing(self._connect()) as connection:
            self._stop_late(connection)
            for table in schema.tables:
                for column in (one for one in table.columns if one.is_text):
                    where = table.name, column.name
                    with suppress(sqlite3.OperationalError):  # late, or a view that does not work
                        found[where] = list(_containing(connection, *where, words))
        return found

    def close(self) -> None:
        """Nothing is kept open."""

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._opened("mode=ro")
        except sqlite3.OperationalError as error:
            # In WAL mode readers write beside the file. Where they cannot and nobody else has it
            # open, it does not change, which is what `immutable` promises.
            wal = self._path.with_name(f"{self._path.name}-wal")
            if "unable to open" not in str(error) or (wal.exists() and wal.stat().st_size):
                raise
            return self._opened("mode=ro&immutable=1")

    def _opened(self, mode: str) -> sqlite3.Connection:
        url = f"{self._path.absolute().as_uri()}?{mode}"
        connection = sqlite3.connect(url, uri=True, isolation_level=None, timeout=_BUSY_S)
        try:
            connection.text_factory = lambda data: data.decode(errors="replace")
            # Views of the file may not call what only the program itself may.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _restrict(self, connection: sqlite3.Connection) -> _Guard:
        known = list(_names(connection))
        for name in (
            *_OF_SQLITE,
            *(name for name, sql in known if sql.startswith("create virtual")),
        ):
            with suppress(sqlite3.Error):  # declared now, while nobody objects
                connection.execute(f"SELECT 1 FROM {quoted(name)} LIMIT 0")
        for limit, value in (
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_LENGTH, self._limits.value_bytes),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20),
            (sqlite3.SQLITE_LIMIT_COLUMN, 2000),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200),
            (sqlite3.SQLITE_LIMIT_VDBE_OP, 50_000),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            connection.setlimit(limit, value)
        guard = _Guard((*_OF_SQLITE, *(name for name, _ in known)))
        connection.set_authorizer(guard.allows)
        self._stop_late(connection)
        return guard

    def _stop_late(self, connection: sqlite3.Connection) -> None:
        until_s = self._clock.now() + self._limits.time_s
        connection.set_progress_handler(lambda: self._clock.now() > until_s, _OPERATIONS_PER_LOOK)

    def _result(self, cursor: sqlite3.Cursor) -> QueryOutcome:
        if cursor.description is None:
            return refusal(READS)
        result = Result(tuple(str(column[0]) for column in cursor.description), self._limits)
        for row in cursor:
            if why := result.take(row):
                return refusal(why)
        return result.outcome()

    def _explained(self, error: Exception, guard: _Guard) -> QueryOutcome:
        said = str(error)
        if guard.denied is not None:
            named = said.startswith(_UNDECLARED)
            denied = f"the table {said.removeprefix(_UNDECLARED)}" if named else guard.denied
            return refusal(f"{denied} is not allowed; {READS}")
        if said == "interrupted":
            return refusal(f"the query ran longer than {self._limits.time_s:g} s")
        if "one statement" in said:
            return refusal("only one statement may run")
        if "too big" in said or isinstance(error, ValueError | sqlite3.Warning):
            return refusal(said)
        return failure(said)


class _Guard:
    """Says which actions may be compiled, and remembers the first that may not."""

    def __init__(self, tables: Iterable[str]) -> None:
        self.denied: str | None = None
        self._tables = frozenset(tables)

    def allows(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """Answer SQLite; see https://sqlite.org/c3ref/set_authorizer.html."""
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            # No column: a subquery of which no column is used, such as under COUNT(*).
            if first in self._tables or (not second and not (first or "").startswith("sqlite_")):
                return sqlite3.SQLITE_OK
            return self._deny(f"the table {first}")
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() in _CALLED:
                return sqlite3.SQLITE_OK
            return self._deny(f"function {second}")
        if action == sqlite3.SQLITE_PRAGMA and first == "data_version" and second is None:
            return sqlite3.SQLITE_OK  # full-text search looks whether its index has changed
        known = _SCHEMA_ACTIONS if first in _SCHEMA_TABLES else _ACTIONS
        return self._deny(known.get(action, "this kind of statement"))

    def _deny(self, what: str) -> int:
        self.denied = self.denied or what
        return sqlite3.SQLITE_DENY


def _names(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield tables and views with the beginning of how they were made."""
    found = connection.execute(
        "SELECT name, lower(substr(sql, 1, 20)) FROM sqlite_schema WHERE type IN ('table', 'view')"
    )
    for name, sql in found:
        if not name.lower().startswith("sqlite_"):
            yield name, sql or ""


def _tables(connection: sqlite3.Connection) -> Iterator[Table]:
    names = [name for name, _ in _names(connection)]
    try:
        found = connection.execute("SELECT name, type FROM pragma_table_list WHERE schema = 'main'")
        shadows = {name for name, kind in found if kind == "shadow"}
    except sqlite3.OperationalError:  # older than SQLite 3.37
        shadows = set()
    keys = {name: _keys(connection, name) for name in names if name not in shadows}
    lower = {name.lower(): name for name in keys}
    for name, own in keys.items():
        links = _links(connection, name, lower, keys)
        try:
            infos = connection.execute(
                "SELECT name, type, pk, hidden FROM pragma_table_xinfo(?)", (name,)
            ).fetchall()
        except sqlite3.OperationalError:  # a view of what is gone
            continue
        columns = tuple(
            Column(column, str(kind).upper(), column in own, links.get(column.lower()),
                   sql=spelled(column, _RESERVED))
            for column, kind, _, hidden in infos
            if hidden != 1
        )  # fmt: skip
        if columns:
            yield Table(name, columns, spelled(name, _RESERVED))


def _keys(connection: sqlite3.Connection, table: str) -> list[str]:
    try:
        found = connection.execute(
            "SELECT name FROM pragma_table_info(?) WHERE pk ORDER BY pk", (table,)
        )
        return [name for (name,) in found]
    except sqlite3.OperationalError:
        return []


def _links(
    connection: sqlite3.Connection,
    table: str,
    names: dict[str, str],
    keys: dict[str, list[str]],
) -> dict[str, tuple[str, str]]:
    """Return the targets of foreign keys, by column in lower case."""
    try:
        found: list[Any] = connection.execute(
            'SELECT "from", "table", "to", seq FROM pragma_foreign_key_list(?)', (table,)
        ).fetchall()
    except sqlite3.OperationalError:
        return {}
    links: dict[str, tuple[str, str]] = {}
    for column, other, to, number in found:
        target = names.get(str(other).lower())
        if target is None:
            continue
        of = keys[target]  # a foreign key without a column means the primary key
        link = to if to is not None else of[number] if number < len(of) else None
        if link is not None:
            links.setdefault(column.lower(), (target, link))
    return links


def _containing(
    connection: sqlite3.Connection, table: str, column: str, words: Sequence[str]
) -> Iterator[str]:
    name = quoted(column)
    query = (
        f"SELECT DISTINCT {name} FROM (SELECT {name} FROM {quoted(table)} LIMIT {SEARCHED_ROWS}) "
        f"WHERE typeof({name}) = 'text' AND instr(lower({name}), lower(?)) ORDER BY 1 LIMIT 3"
    )
    for word in words:
        yield from (str(value) for (value,) in connection.execute(query, (word,)))
