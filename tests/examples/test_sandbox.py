"""SQL of a model can read, within limits, and do nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from examples.text2sql import hostile
from examples.text2sql.sandbox import Limits, Sandbox
from hexgen_vllm.testing.manual_clock import ManualClock

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


BIG = "SELECT replace(s, 'e', s) FROM (SELECT group_concat(title) AS s FROM book)"


class TickingClock(ManualClock):
    """A clock that moves by a second each time it is read."""

    def now(self) -> float:
        """Return the time and move on."""
        return self.advance(1.0)


@pytest.fixture
def library(databases: Mapping[str, Path]) -> Path:
    return databases["library"]


@pytest.mark.parametrize("sql", FINE)
def test_what_reads_runs(library: Path, sql: str) -> None:
    outcome = Sandbox(library).run(sql)
    assert outcome.error is None
    assert outcome.is_telling


@pytest.mark.parametrize("sql", hostile.HOSTILE)
def test_what_does_more_is_refused(library: Path, sql: str) -> None:
    before = library.read_bytes()
    outcome = Sandbox(library, clock=TickingClock()).run(sql.format(table="loan"))
    assert (outcome.rows, outcome.columns) == (None, ())
    assert outcome.error is not None
    assert outcome.refused or "no such function" in outcome.error
    assert library.read_bytes() == before


def test_attempts_leave_nothing_behind(library: Path) -> None:
    assert not Path("/tmp/stolen.db").exists()
    assert {path.name for path in library.parent.iterdir()} <= {
        "library.sqlite", "clinic.sqlite", "shop.sqlite",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM loan", "refused: DELETE is not allowed; only a SELECT on the tables may run"),
        ("SELECT 1; SELECT 2", "refused: only one statement may run"),
        ("PRAGMA user_version", "refused: PRAGMA is not allowed; only a SELECT on"),
        ("CREATE TABLE copied AS SELECT 1", "refused: changing the schema is not allowed"),
        ("DROP TABLE loan", "refused: changing the schema is not allowed"),
        ("ALTER TABLE loan RENAME TO lent", "refused: changing the schema is not allowed"),
        ("VACUUM INTO '/tmp/stolen.db'", "refused: ATTACH or VACUUM is not allowed"),
        ("SELECT value FROM json_each('[1]')", "refused: the table json_each is not allowed;"),
        ("SELECT b.id FROM book b, json_tree(b.title)", "refused: the table json_tree is not"),
        ("SELECT name FROM sqlite_master", "refused: the table sqlite_master is not allowed;"),
        ("SELECT writefile('f', 'x')", "no such function: writefile"),
        ("SELECT colour FROM loan", "no such column: colour"),
        ("SELEC 1", 'near "SELEC": syntax error'),
    ],
)
def test_the_model_can_read_what_was_wrong(library: Path, sql: str, said: str) -> None:
    error = Sandbox(library).run(sql).error
    assert error is not None
    assert error.startswith(said)


@pytest.mark.parametrize("table", ["dbstat", "pragma_table_info('loan')", "sqlite_stmt"])
def test_a_table_of_sqlite_is_refused_as_a_table(library: Path, table: str) -> None:
    """SQLite may name it or not, and may be built without it."""
    error = Sandbox(library).run(f"SELECT name FROM {table}").error
    assert error is not None
    assert " table" in error.partition(";")[0]


def test_a_long_query_is_stopped(library: Path) -> None:
    outcome = Sandbox(library, Limits(time_s=3.0), TickingClock()).run(ALL_PAIRS)
    assert outcome.error == "refused: the query ran longer than 3 s"


@pytest.mark.parametrize(
    ("limits", "sql", "said"),
    [
        (Limits(rows=1199), "SELECT id FROM loan", "more than 1199 rows"),
        (Limits(result_bytes=500), "SELECT title FROM book", "larger than 500 bytes"),
        (Limits(sql_bytes=20), "SELECT id FROM loan WHERE id > 0", "longer than 20 bytes"),
        (Limits(), BIG, "too big"),
        (Limits(), "SELECT 1" + " + 1" * 200, "depth"),
    ],
)
def test_a_query_cannot_be_too_large(library: Path, limits: Limits, sql: str, said: str) -> None:
    outcome = Sandbox(library, limits).run(sql)
    assert outcome.rows is None
    assert said in (outcome.error or "")


def test_exactly_the_limit_is_fine(library: Path) -> None:
    outcome = Sandbox(library, Limits(rows=1200)).run("SELECT id FROM loan")
    assert outcome.rows is not None
    assert len(outcome.rows) == 1200


def test_a_result_without_a_value_tells_nothing(library: Path) -> None:
    sandbox = Sandbox(library)
    assert not sandbox.run("SELECT id FROM loan WHERE id < 0").is_telling
    assert not sandbox.run("SELECT MAX(id) FROM loan WHERE id < 0").is_telling
    assert sandbox.run("SELECT COUNT(*) FROM loan WHERE id < 0").is_telling


def test_the_command_reports_what_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostile, "HOSTILE", ("SELECT 1", "DROP TABLE {table}"))
    monkeypatch.setattr(hostile.that_ran, "__defaults__", (hostile.HOSTILE,))
    assert hostile.main() == 1
    assert "3 of 6 statements ran, 0 of 3 databases changed" in capsys.readouterr().out
