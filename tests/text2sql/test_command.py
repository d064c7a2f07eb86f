"""``hexgen-vllm text2sql`` on a database that it has never seen: the first day of a user."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hexgen_vllm import cli
from tests.text2sql import music
from tests.text2sql.scripted import Body, Scripted, fenced

ANSWERS = {
    "How many tracks are there?": "SELECT COUNT(*) AS tracks FROM Track",
    "Which artist has most albums?": "SELECT a.Name, COUNT(*) FROM Artist a JOIN Album USING "
    "(ArtistId) GROUP BY a.ArtistId ORDER BY COUNT(*) DESC, a.Name LIMIT 1",
    "What did each country spend?": "SELECT BillingCountry, ROUND(SUM(Total), 2) FROM Invoice "
    "GROUP BY 1",
    "Which genre sells best?": "SELECT g.Name FROM InvoiceLine JOIN Track USING (TrackId) JOIN "
    "Genre g USING (GenreId) GROUP BY g.GenreId ORDER BY SUM(Quantity) DESC, g.Name LIMIT 1",
    "Who is the manager of Cleo?": "SELECT m.FirstName FROM Employee e JOIN Employee m ON "
    "e.ReportsTo = m.EmployeeId WHERE e.FirstName = 'Cleo'",
}


def knowing(body: Body) -> str:
    """Answer as a model does that knows the questions."""
    return fenced(ANSWERS[body["messages"][1]["content"].rpartition("Question: ")[2]])


async def command(*words: str) -> int:
    """Run the command beside the server of this process."""
    return await asyncio.to_thread(cli.main, ["text2sql", *words])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(music.build_sqlite(tmp_path_factory.mktemp("music") / "music.sqlite"))


@pytest.fixture
def asked(scripted: Scripted, shop: str) -> Sequence[str]:
    scripted.answers["generate_candidate"] = knowing
    return "--database", shop, "--base-url", scripted.url


async def test_five_questions_get_the_whole_query_and_a_table(
    asked: Sequence[str], scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await command(*asked, "--ask", *ANSWERS) == 0
    said = capsys.readouterr().out
    for question, sql in ANSWERS.items():
        assert f"question: {question}\n\n{sql}\n" in said
    assert "tracks\n------\n200" in said.replace(" ", "") or "200" in said
    assert len(scripted.finished) == 5
    prompt = scripted.prompts("generate_candidate")[0]
    assert (
        "InvoiceLine:\n  InvoiceLineId INTEGER\n  InvoiceId INTEGER -> Invoice.InvoiceId" in prompt
    )
    assert "one SQLite query" in scripted.calls[2][2]["messages"][0]["content"]


async def test_json_has_everything(
    asked: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = ANSWERS
    assert await command(*asked, "--json", "--ask", first, second) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["question"], one["sql"], one["columns"]) == (first, ANSWERS[first], ["tracks"])
    assert (one["rows"], one["end"], one["on_time"]) == ([[200]], "completed", True)
    assert two["calls"] == 4


async def test_many_users_ask_at_their_own_rate(
    asked: Sequence[str], scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    entries = [{"q": question, "sql": sql} for question, sql in ANSWERS.items()]
    file.write_text(json.dumps(entries))
    words = (*asked, f"--questions={file}", "--users=20", "--rate=500", f"--out={tmp_path}")
    assert await command(*words) == 0
    said = capsys.readouterr().out
    assert said.count("on time") == 20 + 1
    assert len(scripted.finished) == 20
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["questions"], found["execution_match"], found["failed"]) == (20, 20, 0)
    assert await command(*words, "--json") == 0
    *answers, figures = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(answers) == figures["questions"] == 20


async def test_a_question_without_an_answer_is_told_and_makes_the_command_fail(
    asked: Sequence[str], scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.answers["generate_candidate"] = scripted.answers["revise"] = fenced("DROP TABLE Track")
    assert await command(*asked, "--ask", "Tidy up!") == 1
    said = capsys.readouterr().out
    assert "no result: refused: changing the schema is not allowed; only a SELECT" in said


async def test_the_schema_is_shown_without_a_model(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await command("--database", shop, "--schema") == 0
    said = capsys.readouterr().out
    assert sum(not line.startswith(" ") for line in said.splitlines()) == 11 + 1, "and a view"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ask", "x"], "database must name a file or URL."),
        (["--database=/none.sqlite", "--ask", "x"], "database: /none.sqlite cannot be read: No"),
        (["--database={file}", "--ask", "x"], "database: {file} is no database of SQLite or"),
        (["--database={shop}"], "ask or questions must say what is asked."),
        (["--database={shop}", "--ask", " "], "ask: a question must have 1 to 20000 characters"),
        (["--database={shop}", "--ask", "x" * 1_000_000], "ask: a question must have 1 to 20000"),
        (["--database={shop}", "--questions=/none"], "/none cannot be read: No such"),
        (["--database={shop}", "--ask", "x", "--base-url=nowhere"], "base_url must be URL or NAME"),
        (["--database={shop}", "--ask", "x", "--base-url=http://[::1"], "base_url must be URL or"),
        (["--database={shop}", "--ask", "x", "--base-url=n=http://a:99999"], "base_url must be"),
        (["--database={shop}", "--ask", "x", "--base-url=http://127.0.0.1:9/v1"],
         "http://127.0.0.1:9/v1 cannot be used: Connection error. All connection attempts"),
        (["--database={shop}", "--ask", "x", "--query-rows=0"], "query_rows must be at least 1"),
        (["--database=postgresql://a@127.0.0.1:9/x", "--ask", "x"],
         "database: postgresql://a@127.0.0.1:9/x cannot be used: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{shop}", shop).replace("{file}", __file__) for word in words]
    assert cli.main(["text2sql", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"hexgen-vllm text2sql: {sentence.replace('{file}', __file__)}")
    assert len(said[-1]) < 500


def test_without_its_libraries_the_command_says_what_to_install(
    shop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    for name in [name for name in sys.modules if name.startswith("hexgen_vllm.text2sql.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["text2sql", "--database", shop, "--ask", "x"]) == 2
    assert "pip install 'hexgen-vllm[text2sql]'" in capsys.readouterr().err
