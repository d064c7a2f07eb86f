"""A file of DuckDB: opened read-only, without access to other files, settings locked.

Queries run in processes of their own. DuckDB can be interrupted between the rows of a query, but
not within a function, and ``range(1000000000)`` is one: such a query ends with its process.
"""

from __future__ import annotations

import pickle
import resource
import signal
import subprocess
import sys
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
MOST_PROCESSES: Final = 4
MEMORY_GB: Final = 4  # of a process; what DuckDB counts of its own memory is below its limit
_GRACE_S: Final = 1.0  # to hear of an interrupt, before the process is ended
_SERVE: Final = "from hexgen_vllm.text2sql.duckdb import serve; serve()"


class DuckdbFile:
    """Reads one file; its queries may run at once, each in a process."""

    dialect: Final = "duckdb"
    product: Final = "DuckDB"

    def __init__(self, path: Path, limits: QueryLimits, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._limits = limits
        self._room = threading.BoundedSemaphore(MOST_PROCESSES)
        self._idle: list[_QueryProcess] = []
        try:
            self._connection = _connect(path)
        except duckdb.Error as error:
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise ConfigError(f"database: {path} cannot be read: {said}.") from None

    def schemas(self) -> Sequence[str]:
        """Return what may stand before a table's name."""
        return ("main", self.catalog())

    def catalog(self) -> str:
        """Return the name of the database, which DuckDB makes of the file's."""
        found = self._connection.cursor().execute("SELECT current_database()").fetchone()
        return str(found[0]) if found else ""

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
        with self._room:
            try:
                process = self._idle.pop()
            except IndexError:
                process = _QueryProcess(self._path, self._limits)
            try:
                outcome = process.run(sql)
            except BaseException:
                process.close()
                raise
            if process.lives:
                self._idle.append(process)
            return outcome

    def values(self, schema: Schema, words: Sequence[str]) -> dict[tuple[str, str], list[str]]:
        """Find values that hold one of ``words``, as long as a query may run."""
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        until_s = self._clock.now() + self._limits.time_s
        with suppress(duckdb.InterruptException), _timed(self._connection, self._limits) as cursor:
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
        while self._idle:
            self._idle.pop().close()
        self._connection.close()

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
                Column(column, str(kind), column in keys[name], links.get((name, column)),
                       sql=spelled(column, reserved))
            )  # fmt: skip
        return Schema(tuple(Table(n, tuple(columns), spelling[n]) for n, columns in found.items()))


def _whole(schema: str, table: str) -> str:
    return table if schema == "main" else f"{schema}.{table}"


class _QueryProcess:
    """A process that runs one query after the other, and ends with one that cannot be stopped."""

    def __init__(self, path: Path, limits: QueryLimits) -> None:
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._tell((str(path.absolute()), limits))
        self.lives = True

    def run(self, sql: str) -> QueryOutcome:
        """Run one query."""
        assert self._process.stdout is not None
        try:
            self._tell(sql)
            outcome: QueryOutcome = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            if self.close() == -signal.SIGALRM:
                return refusal(_late(self._limits))
            return refusal(f"the query needs more than {MEMORY_GB} GB of memory")
        return outcome

    def close(self) -> int:
        """End it; returns how it ended, as ``subprocess`` tells it."""
        self.lives = False
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return self._process.wait()

    def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(what, self._process.stdin)
        self._process.stdin.flush()


def serve() -> None:
    """Run the queries that come on standard input until it ends: the process of a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever reads the answers
    path, limits = pickle.load(sys.stdin.buffer)
    connection = _connect(Path(path))
    with suppress(ValueError, OSError):  # a lower limit than this one
        resource.setrlimit(
            resource.RLIMIT_AS, (MEMORY_GB << 30, resource.getrlimit(resource.RLIMIT_AS)[1])
        )
    while True:
        try:
            sql = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        # Nothing handles it: it ends the process, also from within a function of DuckDB.
        signal.setitimer(signal.ITIMER_REAL, limits.time_s + _GRACE_S)
        outcome = _outcome(connection, sql, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pickle.dump(outcome, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _outcome(connection: Any, sql: str, limits: QueryLimits) -> QueryOutcome:
    try:
        with _timed(connection, limits) as cursor:
            cursor.execute(sql)
            names = tuple(str(column[0]) for column in cursor.description or ())
            result = Result(names, limits)
            while batch := cursor.fetchmany(50):
                for row in batch:
                    if why := result.take(row):
                        return refusal(why)
            return result.outcome()
    except duckdb.InterruptException:
        return refusal(_late(limits))
    except (duckdb.PermissionException, duckdb.OutOfMemoryException) as error:
        return refusal(" ".join(str(error).split())[:300])
    except MemoryError:
        return refusal(f"the query needs more than {MEMORY_GB} GB of memory")
    except (duckdb.Error, RuntimeError, ValueError, OverflowError) as error:
        return failure(error)


def _late(limits: QueryLimits) -> str:
    return f"the query ran longer than {limits.time_s:g} s"


def _connect(path: Path) -> Any:
    return duckdb.connect(str(path), read_only=True, config=_SETTINGS)


@contextmanager
def _timed(connection: Any, limits: QueryLimits) -> Any:
    """Yield a cursor that is interrupted when a query runs too long."""
    cursor = connection.cursor()
    timer = threading.Timer(limits.time_s, cursor.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield cursor
    finally:
        timer.cancel()
        cursor.close()
