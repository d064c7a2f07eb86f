"""Databases as they really are: their names, keys, values, and what is wrong with some."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path

import duckdb
import psycopg
import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql import replies
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.outcome import QueryLimits
from hexgen_vllm.text2sql.schema import Column, Schema, Table
from hexgen_vllm.text2sql.sql_grammar import query_grammar
from tests.text2sql import shops
from tests.text2sql.test_gate import TickingClock

# What every database understands.
ODD = '''
CREATE TABLE "Order" ("ID" INTEGER PRIMARY KEY, "select" VARCHAR(9), "group, by" VARCHAR(9));
CREATE TABLE "Größe" ("Maß" INTEGER PRIMARY KEY, "naïve ""x""" VARCHAR(9));
CREATE TABLE "order details" ("ID" INTEGER PRIMARY KEY, "Order" INTEGER REFERENCES "Order",
  "größe" INTEGER REFERENCES "Größe" ("Maß"));
INSERT INTO "Order" VALUES (1, 'plain', 'It''s');
INSERT INTO "Größe" VALUES (7, 'größer');
INSERT INTO "order details" VALUES (1, 1, 7);
CREATE VIEW "Long View" AS SELECT "ID", "select" FROM "Order";
'''
SHOWN = {
    '"Order":\n  ID INTEGER\n  "select" VARCHAR(9)\n  "group, by" VARCHAR(9)',
    '''"Größe":\n  "Maß" INTEGER\n  "naïve ""x""" VARCHAR(9)''',
    '"order details":\n  ID INTEGER\n  "Order" INTEGER -> "Order".ID\n'
    '  "größe" INTEGER -> "Größe"."Maß"',
    '"Long View":\n  ID INTEGER\n  "select" VARCHAR(9)',
}


def made(path: Path, script: str) -> Path:
    """Write a file of SQLite."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


@pytest.fixture(params=["sqlite", "duckdb", "postgres"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Yield a database with odd names, of every kind."""
    where: str | Path = tmp_path / "odd"
    if request.param == "sqlite":
        made(tmp_path / "odd", ODD)
    elif request.param == "duckdb":
        with duckdb.connect(str(where)) as connection:
            connection.execute(ODD)
    else:
        url: str = request.getfixturevalue("postgres")
        with psycopg.connect(url, autocommit=True) as server:
            server.execute("DROP DATABASE IF EXISTS odd")
            server.execute("CREATE DATABASE odd")
        where = url.rpartition("/")[0] + "/odd"
        with psycopg.connect(where) as server:
            server.execute(ODD.encode())
    with Database.open(where) as database:
        yield database


def test_odd_names_are_read_and_written_as_sql_needs_them(odd: Database) -> None:
    folds = odd.dialect == "postgres"
    said = odd.schema().text().replace("CHARACTER VARYING", "VARCHAR")
    if odd.dialect == "duckdb":
        said = said.replace("VARCHAR", "VARCHAR(9)")
    for table in SHOWN:
        assert (table.replace("ID", '"ID"') if folds else table) in said
    for table in odd.schema().tables:
        for column in table.columns:
            assert odd.run(f"SELECT {table.sql}.{column.sql} FROM {table.sql}").is_telling
    assert odd.run('SELECT * FROM "Long View"').rows == ((1, "plain"),)


def test_the_grammar_of_odd_names_gives_queries_that_run(odd: Database) -> None:
    import random

    from tests.text2sql.test_grammar import derived

    found, rng = query_grammar(odd.schema()), random.Random(1)
    for _ in range(40):
        text = derived(found, rng)
        assert odd.run(replies.query(text, odd.dialect)).rows is not None, text


def test_values_are_found_under_odd_names(odd: Database) -> None:
    found = odd.find_values(odd.schema(), ["GRÖSSER", "it's", "größer", "' OR 1 --"])
    assert found[("Größe", 'naïve "x"')] == ("größer",)
    assert found[("Order", "group, by")] == ("It's",)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('"Order": "select", "group, by"', {"Order": ["select", "group, by"]}),
        ("order: SELECT", {"Order": ["select"]}),
        ("- `order details`: `Order`, größe", {"order details": ["Order", "größe"]}),
        ("Order details: Order details.Order", {"order details": ["Order"]}),
        ("[Größe]: [Maß]", {"Größe": ["Maß"]}),
        ("1. Größe (Maß)", {"Größe": ["Maß"]}),
        ("The order is: ID", {}),
    ],
)
def test_links_to_odd_names_can_be_read(line: str, found: dict[str, list[str]]) -> None:
    names = {"Order": ("ID", "select", "group, by"), "order details": ("ID", "Order", "größe"),
             "Größe": ("Maß",)}  # fmt: skip
    assert replies.links(line, names) == found


def test_values_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    path = made(
        tmp_path / "odd.sqlite",
        "CREATE TABLE t (name TEXT, data BLOB, any);"
        "INSERT INTO t VALUES (CAST(x'ff41' AS TEXT), x'00ff', 1.5);"
        "INSERT INTO t VALUES ('line\nbreak', zeroblob(50), x'414243');"
        "INSERT INTO t VALUES (x'414243', NULL, 'text');",
    )
    with Database.open(path) as database:
        rows = database.run("SELECT * FROM t").rows
        assert rows == (
            ("\ufffdA", b"\0\xff", 1.5), ("line\nbreak", bytes(50), b"ABC"), (b"ABC", None, "text"),
        )  # fmt: skip
        assert database.find_values(database.schema(), ["line", "ABC"]) == {
            ("t", "name"): ("line\nbreak",)
        }
        shown = database.schema().with_values({("t", "name"): ["line\nbreak" + "x" * 500]}).text()
    assert "'line break" in shown
    assert len(shown) < 200


def test_times_that_python_does_not_have_are_text(postgres: str) -> None:
    said = ("infinity", "-infinity", "4713-02-01 BC", "24:00:00", "99999-01-01 00:00:00+00")
    kinds = ("date", "timestamp", "date", "time", "timestamptz")
    shown = ", ".join(f"'{text}'::{kind}" for text, kind in zip(said, kinds, strict=True))
    with Database.open(postgres) as database:
        assert database.run(f"SELECT {shown}, ARRAY['infinity'::date]").rows == (
            (*said, ["infinity"]),
        )
        assert database.run("SELECT '2024-01-02'::date").rows == ((date(2024, 1, 2),),)


def test_values_of_an_enum_are_shown_as_they_are(tmp_path: Path) -> None:
    path, many = tmp_path / "mood.duckdb", ", ".join(f"'value {n}'" for n in range(1000))
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TYPE mood AS ENUM ('sad', 'größer')")
        connection.execute(f"CREATE TYPE many AS ENUM ({many})")
        connection.execute("CREATE TABLE t (m mood, s STRUCT(a INTEGER), n many)")
    with Database.open(path) as database:
        text = database.schema().text()
        assert "m ENUM('sad', 'größer')" in text
        assert len(text) < 500
        assert database.schema().tables[0].columns[0].is_text


def test_all_columns_of_a_wide_table_are_read(tmp_path: Path) -> None:
    columns = ", ".join(f"c{n} TEXT" for n in range(2000))
    path = made(tmp_path / "wide.sqlite", f"CREATE TABLE t ({columns}); CREATE TABLE u (true INT)")
    with Database.open(path) as database:
        assert database.run("SELECT * FROM t").rows == ()
        table = database.schema().table("u")
        assert table is not None
        assert table.columns[0].sql == '"true"', "a name, and not 1"


def test_foreign_keys_without_a_column_mean_the_primary_key(tmp_path: Path) -> None:
    path = made(
        tmp_path / "keys.sqlite",
        "CREATE TABLE a (x INTEGER, code TEXT PRIMARY KEY);"
        "CREATE TABLE pair (p INTEGER, q INTEGER, PRIMARY KEY (q, p));"
        "CREATE TABLE b (a TEXT REFERENCES A, one INTEGER, two INTEGER, gone TEXT REFERENCES none,"
        " FOREIGN KEY (one, two) REFERENCES pair);"
        "CREATE TABLE c (r INTEGER REFERENCES keyless); CREATE TABLE keyless (v INTEGER);",
    )
    with Database.open(path) as database:
        tables = {table.name: table for table in database.schema().tables}
    links = {column.name: column.references for column in tables["b"].columns}
    assert links == {"a": ("a", "code"), "one": ("pair", "q"), "two": ("pair", "p"), "gone": None}
    assert [column.references for column in tables["c"].columns] == [None]


def test_full_text_search_and_generated_columns_work(tmp_path: Path) -> None:
    path = made(
        tmp_path / "fts.sqlite",
        "CREATE VIRTUAL TABLE docs USING fts5(title, body);"
        "INSERT INTO docs VALUES ('one', 'a fat cat'), ('two', 'a thin dog');"
        "CREATE TABLE g (a INTEGER, double AS (a * 2)); INSERT INTO g (a) VALUES (4);",
    )
    with Database.open(path) as database:
        assert [table.name for table in database.schema().tables] == ["docs", "g"]
        run = database.run
        assert run("SELECT title FROM docs WHERE docs MATCH 'cat'").rows == (("one",),)
        found = run("SELECT snippet(docs, 1, '[', ']', '', 9), bm25(docs) FROM docs('dog')")
        assert found.rows is not None or "not allowed" in (found.error or "")
        assert run("SELECT highlight(docs, 1, '<', '>') FROM docs WHERE docs MATCH 'dog'").rows == (
            ("a thin <dog>",),
        )
        assert run("SELECT double FROM g").rows == ((8,),)
        assert run("INSERT INTO docs (docs) VALUES ('optimize')").rows is None


def test_a_huge_table_takes_no_longer_than_a_query_may(tmp_path: Path) -> None:
    path = made(
        tmp_path / "huge.sqlite",
        "CREATE TABLE t (a TEXT);"
        "WITH n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 150000) "
        "INSERT INTO t SELECT 'value ' || x FROM n; CREATE TABLE u (b TEXT);"
        "INSERT INTO u VALUES ('value')",
    )
    with Database.open(path, QueryLimits(time_s=30)) as database:
        assert database.find_values(database.schema(), ["value 149999"]) == {}, "not looked at"
        assert ("u", "b") in database.find_values(database.schema(), ["value"])
    with Database.open(path, QueryLimits(time_s=0.001)) as database:
        database.find_values(database.schema(), ["value 5"])


@pytest.mark.parametrize("kind", ["duckdb", "postgres"])
def test_many_columns_take_no_longer_than_a_query_may(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "duckdb":
        where = str(shops.build_duckdb(tmp_path / "music.duckdb"))
    else:
        where = request.getfixturevalue("postgres")
    words = [letter * 3 for letter in "abcdefgh"] + ["The"]
    with Database.open(where, QueryLimits(time_s=2000.0)) as database:
        whole = database.find_values(database.schema(), words)
    with Database.open(where, QueryLimits(time_s=3.0), TickingClock()) as database:
        part = database.find_values(database.schema(), words)
    assert len(part) < len(whole)


def test_a_schema_too_long_for_a_prompt_keeps_what_the_question_is_about() -> None:
    tables = tuple(
        Table(f"t{n}", (Column("id", "INTEGER"), Column(f"colour{n}", "TEXT"))) for n in range(500)
    )
    schema = Schema((*tables, Table("invoices", (Column("total", "REAL"),))))
    kept = schema.within(2000, "What is the highest total of an invoice?")
    assert "invoices" in kept.names()
    assert 5 < len(kept.tables) < 100
    assert len(kept.text()) <= 2000
    assert schema.within(10**6, "") is schema
    wide = Schema((Table("w", tuple(Column(f"column{n}", "TEXT") for n in range(5000))),))
    assert 0 < len(wide.within(2000, "?").text()) <= 2000


def test_tables_of_other_schemas_are_named_with_them(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as server:
        server.execute('CREATE SCHEMA IF NOT EXISTS "Sales"')
        server.execute('CREATE TABLE IF NOT EXISTS "Sales".deal (id INT PRIMARY KEY, note TEXT)')
        server.execute("INSERT INTO \"Sales\".deal VALUES (1, 'big') ON CONFLICT DO NOTHING")
    with Database.open(postgres) as database:
        table = database.schema().table("Sales.deal")
        assert table is not None
        assert table.sql == '"Sales".deal'
        assert database.run('SELECT note FROM "Sales".deal').rows == (("big",),)
        found = database.find_values(database.schema(), ["big"])
        assert found == {("Sales.deal", "note"): ("big",)}


def test_a_user_sees_only_what_may_be_read(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as server:
        server.execute("DROP OWNED BY guest") if server.execute(
            "SELECT 1 FROM pg_roles WHERE rolname = 'guest'"
        ).fetchone() else server.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
        server.execute("GRANT SELECT ON genre TO guest")
    url = postgres.replace("admin:s3cret", "guest:guest")
    with Database.open(url) as database:
        assert [table.name for table in database.schema().tables] == ["genre"]
        assert "guest" not in database.name.replace("guest:***", "")
        assert database.run("SELECT COUNT(*) FROM track").rows is None


def test_a_server_that_went_away_is_an_error_and_not_the_end(postgres: str) -> None:
    with Database.open(postgres) as database:
        with psycopg.connect(postgres, autocommit=True) as server:
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'hexgen-vllm text2sql'"
            )
        assert database.run("SELECT COUNT(*) FROM genre").rows == ((8,),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"not a database at all", "is no database of SQLite or DuckDB."),
        (b"SQLite format 3\0" + b"x" * 600, "cannot be read: file is not a database."),
        (b"12345678DUCK" + b"\0" * 5000, "cannot be read: "),
        (b"", "holds no table that can be read."),
    ],
)
def test_what_is_no_database_is_one_sentence(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        Database.open(path)
    assert str(raised.value).startswith(f"database: {path} {said}")
    assert "\n" not in str(raised.value)


def test_a_pipe_is_no_database_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe cannot be read: it is a pipe\.$"):
        Database.open(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://a@b/c", "database: kind 'mysql' is not known; known are sqlite, duckdb"),
        ("sqlite://", "database: sqlite:// names no file."),
        ("sqlite:///:memory:", "database: sqlite:///"),
        ("postgresql://a:secret@127.0.0.1:1/x", "database: postgresql://a:***@127.0.0.1:1/x can"),
        ("postgresql://a@127.0.0.1:nan/x", "database: the URL cannot be read"),
        ("://", "database: the URL cannot be read"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_sentence(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Database.open(url)
    assert str(raised.value).startswith(said)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_password_is_one_sentence(postgres: str) -> None:
    with pytest.raises(ConfigError, match="password authentication failed") as raised:
        Database.open(postgres.replace("s3cret", "wr0ng"))
    assert "wr0ng" not in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="does not exist"):
        Database.open(postgres.rpartition("/")[0] + "/nothing")


def test_a_locked_database_is_one_sentence(tmp_path: Path) -> None:
    path = made(tmp_path / "busy.sqlite", "CREATE TABLE t (a INTEGER)")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"cannot be read: database is locked\.$"):
            Database.open(path)
        writer.execute("ROLLBACK")
    with Database.open(path) as database, closing(sqlite3.connect(path)) as writer:
        writer.isolation_level = None
        writer.execute("BEGIN EXCLUSIVE")
        assert database.run("SELECT a FROM t").error == "database is locked"


def test_a_file_of_wal_mode_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    path = made(folder / "wal.sqlite", "PRAGMA journal_mode = WAL; CREATE TABLE t (a INTEGER);")
    folder.chmod(0o555)
    try:
        with Database.open(f"sqlite:///{path}") as database:
            assert database.run("SELECT COUNT(*) FROM t").rows == ((0,),)
        if os.getuid():
            assert {one.name for one in folder.iterdir()} == {"wal.sqlite"}
    finally:
        folder.chmod(0o755)


def test_a_database_in_memory_of_nobody_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a sqlite file, and no duckdb one"):
        Database.open(f"duckdb:///{made(tmp_path / 'x.db', 'CREATE TABLE t (a)')}")
    assert [one.name for one in tmp_path.iterdir()] == ["x.db"]
