"""A file of DuckDB: opened read-only, without access to other files, settings locked."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import duckdb

from hexgen_vllm.clock import Clock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.outcome import QueryLimits, QueryOutcome, Result, failure, refusal
from hexgen_vllm.text2sql.schema import Column, Schema, Table, quoted, spelled

SEARCHED_ROWS: Final = 100_000  # of a table, for values
_SETTINGS: Final[dict[str, str | bool | int | float | list[str]]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "memory_limit": "1GB",
    "threads": "2",
    "lock_configuration": "true",
}


class DuckdbFile:
    """Reads one file; queries run on cursors of one connection, which may be used at once."""

    dialect: Final = "duckdb"
    product: Final = "DuckDB"

    def __init__(self, path: Path, limits: QueryLimits, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._limits = limits
        try:
            self._connection = duckdb.connect(str(path), read_only=True, config=_SETTINGS)
        except duckdb.Error as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise ConfigError(f"database: {path} cannot be read: {said}.") from None

    def schemas(self) -> Sequence[str]:
        """Return what may stand before a table's name."""
        return ("main",)

    def schema(self) -> Schema:
        """Read tables and views.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            return self._schema()
        except duckdb.Error as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise ConfigError(f"database: {self._path} cannot be read: {said}.") from None

    def run(self, sql: str) -> QueryOutcome:
        """Run one query."""
        try:
            with self._timed() as cursor:
                cursor.execute(sql)
                names = tuple(str(column[0]) for column in cursor.description or ())
                result = Result(names, self._limits)
                while batch := cursor.fetchmany(50):
                    for row in batch:
                        if why := result.take(row):
                            return refusal(why)
                return result.outcome()
        except duckdb.InterruptException:
            return refusal(f"the query ran longer than {self._limits.time_s:g} s")
        except (duckdb.PermissionException, duckdb.OutOfMemoryException) as error:
            return refusal(" ".join(str(error).split())[:300])
        except (duckdb.Error, RuntimeError, ValueError, OverflowError) as error:
            return failure(error)

    def values(self, schema: Schema, words: Sequence[str]) -> dict[tuple[str, str], list[str]]:
        """Find values that hold one of ``words``, as long as a query may run."""
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        until_s = self._clock.now() + self._limits.time_s
        with suppress(duckdb.InterruptException), self._timed() as cursor:
            for table in schema.tables:
                for column in (one for one in table.columns if one.is_text):
                    name = quoted(column.name)
                    query = (
                        f"SELECT DISTINCT {name}::VARCHAR FROM "
                        f"(SELECT {name} FROM {table.sql} LIMIT {SEARCHED_ROWS}) "
                        f"WHERE contains(lower({name}::VARCHAR), lower(?)) ORDER BY 1 LIMIT 3"
                    )
                    for word in words:
                        if self._clock.now() > until_s:
                            return found
                        rows = cursor.execute(query, [word]).fetchall()
                        found[table.name, column.name] += [str(value) for (value,) in rows]
        return found

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _timed(self) -> Any:
        cursor = self._connection.cursor()
        timer = threading.Timer(self._limits.time_s, cursor.interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield cursor
        finally:
            timer.cancel()
            cursor.close()

    def _schema(self) -> Schema:
        cursor = self._connection.cursor()
        reserved = {
            word for (word,) in cursor.execute(
                "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
            ).fetchall()
        }  # fmt: skip
        keys: dict[str, set[str]] = defaultdict(set)
        links: dict[tuple[str, str], tuple[str, str]] = {}
        for home, table, kind, columns, target, targets in cursor.execute(
            "SELECT schema_name, table_name, constraint_type, constraint_column_names, "
            "referenced_table, referenced_column_names FROM duckdb_constraints() "
            "WHERE database_name = current_database()"
        ).fetchall():
            name = _whole(home, table)
            if kind == "PRIMARY KEY":
                keys[name] |= set(columns)
            elif kind == "FOREIGN KEY":
                ends = zip(columns, targets, strict=False)
                links |= {(name, one): (_whole(home, target), to) for one, to in ends}
        found: dict[str, list[Column]] = defaultdict(list)
        spelling: dict[str, str] = {}
        for home, table, column, kind in cursor.execute(
            "SELECT schema_name, table_name, column_name, data_type FROM duckdb_columns() "
            "WHERE database_name = current_database() AND NOT internal "
            "ORDER BY schema_name, table_name, column_index"
        ).fetchall():
            name = _whole(home, table)
            parts = (table,) if home == "main" else (home, table)
            spelling[name] = ".".join(spelled(part, reserved) for part in parts)
            found[name].append(
                Column(column, str(kind).upper(), column in keys[name], links.get((name, column)),
                       sql=spelled(column, reserved))
            )  # fmt: skip
        return Schema(tuple(Table(n, tuple(columns), spelling[n]) for n, columns in found.items()))


def _whole(schema: str, table: str) -> str:
    return table if schema == "main" else f"{schema}.{table}"
