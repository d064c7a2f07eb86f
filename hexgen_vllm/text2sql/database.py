"""Databases that only answer: opened for reading, asked through a gate, within limits.

    with Database.open("chinook.sqlite") as database:
        print(database.schema().text())
        print(database.run("SELECT COUNT(*) FROM artist"))

Two walls keep what a model wrote from doing more than it should: :class:`~hexgen_vllm.text2sql.
gate.Gate` reads the query before it runs, and the database itself is opened so that it cannot
write (SQLite: ``mode=ro`` and an authorizer; PostgreSQL: a read-only transaction; DuckDB:
``read_only`` without access to other files).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from hexgen_vllm.clock import Clock, SystemClock
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql.outcome import QueryLimits, QueryOutcome, refusal
from hexgen_vllm.text2sql.schema import Schema

EXTRA: Final = "pip install 'hexgen-vllm[text2sql]'"
MIN_CHARS: Final = 3
MOST_PER_COLUMN: Final = 3
_ADAPTERS: Final = {
    "sqlite": ("hexgen_vllm.text2sql.sqlite", "SqliteFile"),
    "duckdb": ("hexgen_vllm.text2sql.duckdb", "DuckdbFile"),
    "postgresql": ("hexgen_vllm.text2sql.postgres", "PostgresServer"),
}


class Adapter(Protocol):
    """One kind of database."""

    dialect: str
    product: str

    def schema(self) -> Schema:
        """Read tables, views and their keys."""

    def schemas(self) -> Sequence[str]:
        """Return what may stand before the name of a table that needs nothing there."""

    def catalog(self) -> str:
        """Return the database's own name, which may stand before that; empty if none may."""

    def run(self, sql: str) -> QueryOutcome:
        """Run a query that has passed the gate."""

    def values(
        self, schema: Schema, words: Sequence[str]
    ) -> Mapping[tuple[str, str], Sequence[str]]:
        """Find values of text columns that hold one of ``words``, as long as time allows."""

    def close(self) -> None:
        """Let go of connections."""


class Database:
    """A database that questions are asked about; use it with ``with`` or :meth:`close` it.

    Attributes:
        name: what it is called in reports, without a password.
    """

    def __init__(self, name: str, adapter: Adapter, limits: QueryLimits) -> None:
        from hexgen_vllm.text2sql.gate import Gate

        self.name = name
        self._adapter = adapter
        self._limits = limits
        self._schema = adapter.schema()
        tables = [table.name for table in self._schema.tables]
        self._gate = Gate(adapter.dialect, tables, adapter.schemas(), adapter.catalog())

    @classmethod
    def open(
        cls, where: str | Path, limits: QueryLimits | None = None, clock: Clock | None = None
    ) -> Database:
        """Open a file of SQLite or DuckDB, or a SQLAlchemy URL of those or of PostgreSQL.

        Args:
            where: ``shop.sqlite``, ``sqlite:///shop.sqlite``, ``duckdb:///shop.duckdb``,
                ``postgresql://user:password@host/name``.
            limits: what a query may use.
            clock: what the time of a query in SQLite is measured on.

        Raises:
            ConfigError: it is not there, no such database, cannot be read, or holds no table.
        """
        limits, clock = limits or QueryLimits(), clock or SystemClock()
        kind, place, name = _kind_of(where)
        module, adapter = _ADAPTERS[kind]
        try:
            made = getattr(import_module(module), adapter)(place, limits, clock)
            database = cls(name, made, limits)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("hexgen_vllm"):
                raise
            raise ConfigError(f"database: {error.name} is not installed; {EXTRA}.") from None
        if not database.schema().tables:
            database.close()
            raise ConfigError(f"database: {name} holds no table that can be read.")
        return database

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def product(self) -> str:
        """What it is: ``SQLite``, ``DuckDB`` or ``PostgreSQL``."""
        return self._adapter.product

    @property
    def dialect(self) -> str:
        """What sqlglot calls its SQL: ``sqlite``, ``duckdb`` or ``postgres``."""
        return self._adapter.dialect

    def schema(self) -> Schema:
        """Return tables and views as they were when it was opened."""
        return self._schema

    def run(self, sql: str) -> QueryOutcome:
        """Run one query; whatever is wrong with it comes back as an error."""
        if len(sql.encode(errors="replace")) > self._limits.sql_bytes:
            return refusal(f"the query is longer than {self._limits.sql_bytes} bytes")
        objection = self._gate.objection(sql)
        return self._adapter.run(sql) if objection is None else objection

    def find_values(
        self, schema: Schema, words: Iterable[str]
    ) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return values of text columns that contain one of ``words``, by table and column.

        The words come from a model: they are bound as parameters, never made part of a query.
        Of large tables only the first rows are looked at, and no longer than a query may run.
        """
        wanted = sorted({word.strip() for word in words if len(word.strip()) >= MIN_CHARS})
        found = self._adapter.values(schema, wanted) if wanted else {}
        return {
            where: tuple(dict.fromkeys(values))[:MOST_PER_COLUMN]
            for where, values in found.items()
            if values
        }

    def close(self) -> None:
        """Let go of its connections."""
        self._adapter.close()


def _kind_of(where: str | Path) -> tuple[str, Any, str]:
    """Return the kind of a database, its path or URL, and its name."""
    if isinstance(where, str) and "://" in where:
        return _kind_of_url(where)
    path = Path(where)
    return _kind_of_file(path), path, str(where)


def _kind_of_url(where: str) -> tuple[str, Any, str]:
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ModuleNotFoundError:
        raise ConfigError(f"database: a URL needs SQLAlchemy; {EXTRA}.") from None
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "database: the URL cannot be read; write KIND://USER@HOST/NAME."
        ) from None
    kind = url.get_backend_name()
    kind = "postgresql" if kind == "postgres" else kind
    if kind not in _ADAPTERS:
        raise ConfigError(
            f"database: kind {kind!r} is not known; known are {', '.join(_ADAPTERS)}."
        )
    name = url.render_as_string(hide_password=True)
    if kind == "postgresql":
        return kind, url, name
    if not url.database or url.database == ":memory:":
        raise ConfigError(f"database: {name} names no file.")
    path = Path(url.database)
    if (found := _kind_of_file(path)) != kind:
        raise ConfigError(f"database: {path} is a {found} file, and no {kind} one.")
    return kind, path, name


def _kind_of_file(path: Path) -> str:
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # whose other end nobody may open
            raise ValueError("it is a pipe")
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"database: {path} cannot be read: {said}.") from None
    if head[8:12] == b"DUCK":
        return "duckdb"
    if head in (b"", b"SQLite format 3\0"):
        return "sqlite"
    raise ConfigError(f"database: {path} is no database of SQLite or DuckDB.")
