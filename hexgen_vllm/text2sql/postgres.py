"""A server of PostgreSQL: read-only transactions, without the rights of a superuser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import sqlalchemy
from psycopg import sql as composed
from psycopg.adapt import Loader
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.outcome import QueryLimits, QueryOutcome, Result, failure, refusal
from hexgen_vllm.text2sql.schema import Column, Schema, Table, spelled

SEARCHED_ROWS: Final = 100_000  # of a table, for values
CONNECT_S: Final = 10
_READERS: Final = "pg_read_all_data"  # reads all tables and may nothing else; PostgreSQL 14 on
_OPTIONS: Final = (
    "-c default_transaction_read_only=on -c statement_timeout={time_ms} -c lock_timeout={time_ms} "
    "-c idle_in_transaction_session_timeout=60000 -c standard_conforming_strings=on"
)
_TABLES: Final = """
SELECT n.nspname, c.relname, a.attname, upper(format_type(a.atttypid, a.atttypmod)), t.typtype,
       pg_table_is_visible(c.oid)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND NOT c.relispartition
  AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
  AND has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT')
ORDER BY n.nspname, c.relname, a.attnum
"""
_KEYS: Final = """
SELECT n.nspname, c.relname, k.contype, a.attname, fn.nspname, fc.relname, fa.attname
FROM pg_constraint k
JOIN pg_class c ON c.oid = k.conrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL unnest(k.conkey) WITH ORDINALITY AS u(num, place)
JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.num
LEFT JOIN pg_class fc ON fc.oid = k.confrelid
LEFT JOIN pg_namespace fn ON fn.oid = fc.relnamespace
LEFT JOIN pg_attribute fa ON fa.attrelid = k.confrelid AND fa.attnum = k.confkey[u.place]
WHERE k.contype IN ('p', 'f')
"""


class PostgresServer:
    """Reads one database of a server, through a few connections that are kept."""

    dialect: Final = "postgres"
    product: Final = "PostgreSQL"

    def __init__(self, url: URL, limits: QueryLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._url = url
        self._name = url.render_as_string(hide_password=True)
        driver = url.set(drivername="postgresql+psycopg").difference_update_query(["options"])
        options = _OPTIONS.format(time_ms=max(int(limits.time_s * 1000), 1))
        self._engine = sqlalchemy.create_engine(
            driver,
            connect_args={"options": options, "connect_timeout": CONNECT_S,
                          "application_name": "hexgen-vllm text2sql"},
            pool_size=8, max_overflow=0, pool_pre_ping=True,
        )  # fmt: skip
        sqlalchemy.event.listen(self._engine, "connect", _load_all_times)
        self._reserved: frozenset[str] = frozenset()
        self._home: tuple[str, ...] = ()

    def schemas(self) -> Sequence[str]:
        """Return what may stand before the name of a table that is found without."""
        return self._home

    def catalog(self) -> str:
        """Return the name of the database."""
        return self._url.database or self._url.username or ""

    def schema(self) -> Schema:
        """Read tables and views that the user may read.

        Raises:
            ConfigError: the server cannot be reached or does not let the user in.
        """
        try:
            with self._transaction() as connection:
                words = connection.execute(
                    "SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')"
                )
                self._reserved = frozenset(word for (word,) in words)
                found = connection.execute(_TABLES).fetchall()
                keys = connection.execute(_KEYS).fetchall()
        except (psycopg.Error, SQLAlchemyError) as error:
            said = _said(error)
            self.close()
            raise ConfigError(f"database: {self._name} cannot be used: {said}.") from None
        seen = {(home, table): visible for home, table, *_, visible in found}
        self._home = tuple({home for (home, _), visible in seen.items() if visible})
        return self._made(found, keys, seen)

    def run(self, sql: str) -> QueryOutcome:
        """Run one query."""
        try:
            with self._transaction() as connection, connection.cursor() as cursor:
                # The extended protocol takes one statement only, and row by row no large result
                # is held in memory.
                rows: Any = cursor.stream(sql)
                try:
                    return self._result(cursor, rows)
                finally:
                    rows.close()
        except psycopg.errors.QueryCanceled:
            return refusal(f"the query ran longer than {self._limits.time_s:g} s")
        except (
            psycopg.errors.ReadOnlySqlTransaction,
            psycopg.errors.InsufficientPrivilege,
        ) as error:
            return refusal(_said(error))
        except (psycopg.Error, SQLAlchemyError, UnicodeError) as error:
            return failure(_said(error))

    def values(self, schema: Schema, words: Sequence[str]) -> dict[tuple[str, str], list[str]]:
        """Find values that hold one of ``words``, as long as a query may run."""
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        until_s = self._clock.now() + self._limits.time_s
        try:
            with self._transaction() as connection:
                for table in schema.tables:
                    for column in (one for one in table.columns if one.is_text):
                        query = composed.SQL(
                            "SELECT DISTINCT v FROM (SELECT {}::text AS v FROM {} LIMIT {}) s "
                            "WHERE strpos(lower(v), lower(%s)) > 0 ORDER BY v LIMIT 3"
                        ).format(
                            composed.Identifier(column.name),
                            composed.Identifier(*self._parts(table)),
                            composed.Literal(SEARCHED_ROWS),
                        )
                        for word in words:
                            if self._clock.now() > until_s:
                                return found
                            rows = connection.execute(query, (word.replace("\0", ""),))
                            found[table.name, column.name] += [str(value) for (value,) in rows]
        except (psycopg.Error, SQLAlchemyError):
            pass  # late, or a view that does not work: what was found is enough
        return found

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Connection[Any]]:
        """Open a transaction that reads, as a role that may not do more than that."""
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            connection.execute("SET TRANSACTION READ ONLY")
            (mighty,) = connection.execute(
                "SELECT current_setting('is_superuser') = 'on' AND "
                "EXISTS (SELECT 1 FROM pg_roles WHERE rolname = %s)", (_READERS,)
            ).fetchone()  # fmt: skip
            if mighty:  # who could read the server's files
                connection.execute(f"SET LOCAL ROLE {_READERS}")
            yield connection
        except BaseException:
            if connection.closed:
                pooled.invalidate()
            raise
        finally:
            if not connection.closed:
                connection.rollback()
            pooled.close()

    def _result(self, cursor: Any, rows: Any) -> QueryOutcome:
        result: Result | None = None
        for row in rows:
            if result is None:
                result = self._empty(cursor)
            if why := result.take(row):
                return refusal(why)
        return (result or self._empty(cursor)).outcome()

    def _empty(self, cursor: Any) -> Result:
        return Result(tuple(column.name for column in cursor.description or ()), self._limits)

    def _parts(self, table: Table) -> tuple[str, ...]:
        return self._names[table.name]

    def _made(self, found: list[Any], keys: list[Any], seen: dict[tuple[str, str], bool]) -> Schema:
        def whole(home: str, table: str) -> str:
            return table if seen.get((home, table)) else f"{home}.{table}"

        primary: set[tuple[str, str]] = set()
        links: dict[tuple[str, str], tuple[str, str]] = {}
        for home, table, kind, column, far, target, to in keys:
            if kind in ("p", b"p"):
                primary.add((whole(home, table), column))
            elif (far, target) in seen:
                links[whole(home, table), column] = whole(far, target), to
        columns: dict[str, list[Column]] = defaultdict(list)
        self._names: dict[str, tuple[str, ...]] = {}
        for home, table, column, kind, type_kind, visible in found:
            name = whole(home, table)
            self._names[name] = (table,) if visible else (home, table)
            shown = f"{kind} ENUM" if type_kind in ("e", b"e") else kind
            columns[name].append(
                Column(column, shown, (name, column) in primary, links.get((name, column)),
                       sql=self._spelled(column))
            )  # fmt: skip
        return Schema(
            tuple(
                Table(name, tuple(of), ".".join(map(self._spelled, self._names[name])))
                for name, of in columns.items()
            )
        )

    def _spelled(self, name: str) -> str:
        return spelled(name, self._reserved, folds=True)


def _load_all_times(connection: Any, *_: object) -> None:
    """Let times that Python does not have, such as ``infinity``, come as their text."""
    for name in ("date", "time", "timetz", "timestamp", "timestamptz", "interval"):
        connection.adapters.register_loader(name, _TimeLoader)


class _TimeLoader(Loader):
    """Loads what psycopg itself would load, and else the text."""

    def __init__(self, oid: int, context: Any = None) -> None:
        super().__init__(oid, context)
        known = psycopg.adapters.get_loader(oid, self.format)
        assert known is not None
        self._known = known(oid, context)

    def load(self, data: Any) -> Any:
        """Return a time, or its text."""
        try:
            return self._known.load(data)
        except (psycopg.DataError, OverflowError, ValueError):
            return bytes(data).decode()


def _said(error: BaseException) -> str:
    """Return what the server said, in one sentence without a full stop."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    first = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(first[0].split())[:300].rstrip(".")
