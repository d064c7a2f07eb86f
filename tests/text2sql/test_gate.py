"""SQL of a model can read, within limits, and do nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from examples.text2sql import hostile
from hexgen_vllm.testing.manual_clock import ManualClock
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.gate import Gate
from hexgen_vllm.text2sql.outcome import QueryLimits
from tests.text2sql import music, shops

FINE = (
    "SELECT COUNT(*) FROM loan",
    "SELECT COUNT(*) FROM (SELECT id FROM loan)",
    "WITH late AS (SELECT id FROM loan WHERE returned_on > due_on) SELECT COUNT(*) FROM late",
    "SELECT name, RANK() OVER (ORDER BY born_year) FROM author",
    "SELECT upper(substr(title, 1, 3)), round(avg(pages), 1) FROM book GROUP BY 1",
    "SELECT strftime('%Y', loaned_on), CAST(julianday(due_on) AS INTEGER) FROM loan LIMIT 3",
    "SELECT CASE WHEN pages > 300 THEN 'long' ELSE 'short' END FROM book UNION SELECT 'x'",
    "SELECT id FROM loan WHERE EXISTS (SELECT 1 FROM copy WHERE copy.id = loan.copy_id) LIMIT 9;",
    "-- what was asked\nSELECT 1",
)
ALL_PAIRS = "SELECT COUNT(*) FROM loan a, loan b, loan c"
SLOW = f"{ALL_PAIRS}, loan d, loan e WHERE a.id + b.id * c.id = d.id - e.id"
BIG = "SELECT replace(s, 'e', s) FROM (SELECT group_concat(title) AS s FROM book)"
HASTY = QueryLimits(time_s=0.3)
SERVERS = ("duckdb", "postgres")


class TickingClock(ManualClock):
    """A clock that moves by a second each time it is read."""

    def now(self) -> float:
        """Return the time and move on."""
        return self.advance(1.0)


@pytest.fixture(scope="module")
def library(paths: Mapping[str, Path]) -> Path:
    return paths["library"]


@pytest.fixture(scope="module")
def loans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of DuckDB with a table of numbers."""
    path = tmp_path_factory.mktemp("duckdb") / "loans.duckdb"
    with duckdb.connect(str(path)) as connection:
        for sql in shops.numbers():
            connection.execute(sql)
    return path


@pytest.mark.parametrize("sql", FINE)
def test_what_reads_runs(library: Path, sql: str) -> None:
    outcome = Database.open(library).run(sql)
    assert outcome.error is None
    assert outcome.is_telling


def test_there_are_many_of_both_kinds() -> None:
    bad = {sql for dialect in ("sqlite", *SERVERS) for sql in hostile.statements(dialect)}
    good = {sql for dialect in ("sqlite", *SERVERS) for sql in shops.ordinary(dialect)}
    assert len(bad) >= 200
    assert len(good) >= 150


def test_nothing_hostile_runs_on_sqlite(library: Path) -> None:
    before = library.read_bytes()
    database = Database.open(library, clock=TickingClock())
    for sql in hostile.statements("sqlite"):
        outcome = database.run(sql.replace("{table}", "loan"))
        assert (outcome.rows, outcome.columns) == (None, ()), sql
        assert outcome.error, sql
    assert library.read_bytes() == before
    assert not Path("/tmp/stolen.db").exists()
    assert {path.name for path in library.parent.iterdir()} <= {
        "library.sqlite", "clinic.sqlite", "shop.sqlite",
    }  # fmt: skip


def test_nothing_hostile_runs_on_duckdb(loans: Path) -> None:
    before = loans.read_bytes()
    with Database.open(loans, HASTY) as database:
        for sql in hostile.statements("duckdb"):
            outcome = database.run(sql.replace("{table}", "loan"))
            assert outcome.rows is None, sql
            assert outcome.error, sql
    assert loans.read_bytes() == before


def test_nothing_hostile_runs_on_postgres(postgres: str) -> None:
    """The server is asked as its superuser: neither wall may need the other."""
    with Database.open(postgres, HASTY) as database:
        for sql in hostile.statements("postgres"):
            outcome = database.run(sql.replace("{table}", "loan"))
            assert outcome.rows is None, sql
            assert outcome.error, sql


@pytest.mark.parametrize("dialect", ["sqlite", *SERVERS])
def test_the_database_alone_keeps_what_writes_and_looks_elsewhere_out(
    dialect: str, library: Path, loans: Path, request: pytest.FixtureRequest
) -> None:
    """The second wall, with the first one taken away."""
    places: dict[str, object] = {"sqlite": library, "duckdb": loans}
    where = places.get(dialect) or request.getfixturevalue("postgres")
    own = {
        "sqlite": ["PRAGMA user_version = 3", "ATTACH 'x.db' AS x", "VACUUM INTO '/tmp/stolen.db'",
                   "SELECT sql FROM sqlite_master", "SELECT name FROM pragma_table_info('loan')"],
        "duckdb": ["SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'",
                   "COPY loan TO '/tmp/stolen.csv'", "SET enable_external_access = true",
                   "ATTACH '/tmp/stolen.db' AS s"],
        "postgres": ["SELECT pg_read_file('/etc/passwd')", "COPY loan TO PROGRAM 'id'",
                     "SELECT pg_ls_dir('/')",
                     "SELECT 1; SELECT 2",
                     "SELECT 1; COMMIT; SET default_transaction_read_only = off; DROP TABLE x"],
    }[dialect]  # fmt: skip
    with Database.open(str(where), HASTY) as database:
        for sql in (
            "DELETE FROM loan", "UPDATE loan SET id = 0", "DROP TABLE loan",
            "INSERT INTO loan (id) VALUES (9999)", "CREATE TABLE stolen (a INTEGER)",
            "CREATE INDEX i ON loan (id)", *own,
        ):  # fmt: skip
            outcome = database._adapter.run(sql)
            assert outcome.rows is None, sql
            assert outcome.error, sql
        assert database.run("SELECT COUNT(*) FROM loan").is_telling


@pytest.mark.parametrize("dialect", ["sqlite", *SERVERS])
def test_ordinary_queries_run(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = {
        "sqlite": lambda: music.build_sqlite(tmp_path / "music.sqlite"),
        "duckdb": lambda: shops.build_duckdb(tmp_path / "music.duckdb"),
        "postgres": lambda: request.getfixturevalue("postgres"),
    }[dialect]()
    with Database.open(made, QueryLimits(time_s=30.0)) as database:
        failed = {sql: outcome.error for sql in shops.ordinary(dialect)
                  if (outcome := database.run(sql)).rows is None}  # fmt: skip
    assert not failed


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM loan", "refused: DELETE is not allowed; only a SELECT on the tables may run"),
        ("SELECT 1; SELECT 2", "refused: only one statement may run"),
        ("PRAGMA user_version", "refused: PRAGMA is not allowed; only a SELECT on"),
        ("CREATE TABLE copied AS SELECT 1", "refused: changing the schema is not allowed"),
        ("DROP TABLE loan", "refused: changing the schema is not allowed"),
        ("ALTER TABLE loan RENAME TO lent", "refused: changing the schema is not allowed"),
        ("VACUUM INTO '/tmp/stolen.db'", "refused: VACUUM is not allowed"),
        ("EXPLAIN SELECT 1", "refused: EXPLAIN is not allowed"),
        ("LOCK TABLE loan", "refused: LOCK is not allowed"),
        ("SELECT b.id FROM book b, fsdir(b.title)", "refused: function fsdir is not allowed"),
        ("SELECT name FROM sqlite_master", "refused: the table sqlite_master is not allowed;"),
        ("SELECT writefile('f', 'x')", "refused: function writefile is not allowed; text, date"),
        ("SELECT strtime('%Y', '2024-01-01')", "refused: function strtime is not allowed (close to "
         "it: strftime"),
        ("SELECT colour FROM loan", "no such column: colour"),
        ("SELECT id FROM lone", "no such table: lone"),
        ("SELEC 1", "the query cannot be read: "),
        ("SELECT (1", "the query cannot be read: "),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
         "refused: recursion without a bound is not allowed; give it a WHERE or a LIMIT"),
        ("", "refused: there is no statement"),
    ],
)  # fmt: skip
def test_the_model_can_read_what_was_wrong(library: Path, sql: str, said: str) -> None:
    error = Database.open(library).run(sql).error
    assert error is not None
    assert error.startswith(said)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM (SELECT 1 AS x) pg_shadow, (SELECT 2) t",
        "WITH x AS (SELECT 1 AS a) SELECT a FROM x UNION SELECT a FROM x",
        "SELECT public.orders.id FROM public.orders",
        "SELECT id FROM sales.orders2",
        "SELECT ORDERS.id FROM ORDERS",
    ],
)
def test_names_are_known_by_scope_and_schema(sql: str) -> None:
    assert Gate("postgres", ["orders", "sales.orders2"], ["public"]).objection(sql) is None


@pytest.mark.parametrize(
    "sql", ["SELECT id FROM orders2", "SELECT id FROM other.orders", "SELECT 1 FROM a.b.orders"]
)
def test_a_table_elsewhere_is_none_of_ours(sql: str) -> None:
    found = Gate("postgres", ["orders", "sales.orders2"], ["public"]).objection(sql)
    assert found is not None
    assert (found.error or "").startswith("no such table: ")


def test_a_long_query_is_stopped(library: Path) -> None:
    outcome = Database.open(library, QueryLimits(time_s=3.0), TickingClock()).run(ALL_PAIRS)
    assert outcome.error == "refused: the query ran longer than 3 s"


def test_a_long_query_is_stopped_on_duckdb(loans: Path) -> None:
    with Database.open(loans, HASTY) as database:
        outcome = database.run(SLOW)
        assert outcome.error == "refused: the query ran longer than 0.3 s"
        assert database.run("SELECT 1").rows == ((1,),), "the next one runs"


def test_what_duckdb_cannot_interrupt_is_stopped(loans: Path) -> None:
    """Within one function it looks at nothing; the first of these take a minute or all memory."""
    with Database.open(loans, HASTY) as database:
        for sql in (
            "SELECT generate_series(TIMESTAMP '1000-01-01', TIMESTAMP '9999-01-01', INTERVAL 1 "
            "MICROSECOND)",
            "SELECT list_sum(list_transform(range(1000000000), lambda x : x * 2))",
        ):
            outcome = database.run(sql)
            assert outcome.refused, sql
        rows = database.run("SELECT 1.5::DECIMAL(3, 1), [1], DATE '2024-01-01'").rows
        assert rows == ((Decimal("1.5"), [1], date(2024, 1, 1)),), "the next one runs"


def test_a_long_query_is_stopped_on_postgres(postgres: str) -> None:
    with Database.open(postgres, HASTY) as database:
        assert database.run(SLOW).error == "refused: the query ran longer than 0.3 s"
        assert database.run("SELECT 1").rows == ((1,),), "the next one runs"


@pytest.mark.parametrize(
    ("limits", "sql", "said"),
    [
        (QueryLimits(rows=1199), "SELECT id FROM loan", "more than 1199 rows"),
        (QueryLimits(result_bytes=500), "SELECT title FROM book", "larger than 500 bytes"),
        (QueryLimits(sql_bytes=20), "SELECT id FROM loan WHERE id > 0", "longer than 20 bytes"),
        (QueryLimits(), BIG, "too big"),
        (QueryLimits(), "SELECT 1" + " + 1" * 200, "depth"),
        (QueryLimits(), "SELECT " + "(" * 5000 + "1" + ")" * 5000, "nested too deeply"),
    ],
)
def test_a_query_cannot_be_too_large(
    library: Path, limits: QueryLimits, sql: str, said: str
) -> None:
    outcome = Database.open(library, limits).run(sql)
    assert outcome.rows is None
    assert said in (outcome.error or "")


def test_a_result_is_cut_off_on_servers_too(loans: Path, postgres: str) -> None:
    for where, table in ((str(loans), "loan"), (postgres, "track")):
        with Database.open(where, QueryLimits(rows=10, result_bytes=400)) as database:
            many = database.run(f"SELECT * FROM {table}")
            assert many.error in (
                "refused: the result has more than 10 rows",
                "refused: the result is larger than 400 bytes",
            )
            assert len(database.run(f"SELECT 1 FROM {table} LIMIT 10").rows or ()) == 10


def test_exactly_the_limit_is_fine(library: Path) -> None:
    outcome = Database.open(library, QueryLimits(rows=1200)).run("SELECT id FROM loan")
    assert outcome.rows is not None
    assert len(outcome.rows) == 1200


def test_a_result_without_a_value_tells_nothing(databases: Mapping[str, Database]) -> None:
    run = databases["library"].run
    assert not run("SELECT id FROM loan WHERE id < 0").is_telling
    assert not run("SELECT MAX(id) FROM loan WHERE id < 0").is_telling
    assert run("SELECT COUNT(*) FROM loan WHERE id < 0").is_telling


def test_a_view_of_the_file_may_not_do_more_than_a_query(tmp_path: Path) -> None:
    path = tmp_path / "trap.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE t (a INTEGER);"
        "CREATE VIEW trap AS SELECT load_extension('/tmp/evil.so') AS a FROM t;"
        "CREATE VIEW spy AS SELECT sql AS a FROM sqlite_master;"
    )
    connection.close()
    with Database.open(path) as database:
        for name in ("trap", "spy"):
            assert database.run(f"SELECT a FROM {name}").rows is None


def test_the_command_reports_what_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostile, "statements", lambda _: ("SELECT 1", "DROP TABLE {table}"))
    assert hostile.main() == 1
    assert "3 of 6 statements ran, 0 of 3 databases changed" in capsys.readouterr().out
