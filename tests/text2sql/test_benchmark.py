"""BIRD and Spider: read, answered, written and counted as they do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hexgen_vllm import cli
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.text2sql import benchmark
from hexgen_vllm.text2sql.benchmark import BenchmarkQuestion
from hexgen_vllm.text2sql.database import Database
from tests.text2sql import benchmarks
from tests.text2sql.scripted import Body, Scripted, fenced
from tests.text2sql.test_command import command

BUILD = {"bird": benchmarks.build_bird, "spider": benchmarks.build_spider}


@pytest.fixture(params=["bird", "spider"])
def folder(request: pytest.FixtureRequest, paths: Mapping[str, Path], tmp_path: Path) -> Path:
    (tmp_path / request.param).mkdir()
    return BUILD[request.param](tmp_path / request.param, paths)


def test_questions_are_read_in_their_order(folder: Path) -> None:
    with benchmark.opened(folder, "dev") as found:
        assert found.kind == folder.name
        known = [(one.name, one.gold) for one in found.questions]
        assert known == [(name, sql) for name, _, sql in benchmarks.entries()]
        hint = " (Hint: books refers to book)" if found.kind == "bird" else ""
        assert found.questions[0].text == f"How many books does the library know?{hint}"
        for one in found.questions:
            assert one.is_matched_by(one.database.run(one.gold).rows, one.gold), one.gold
            assert not one.is_matched_by(((-1,),), "SELECT -1")
            assert not one.is_matched_by(None, "DROP TABLE x")
    with benchmark.opened(folder, "dev", most=2) as found:
        assert len(found.questions) == 2


async def test_the_command_writes_predictions_that_their_evaluators_read(
    folder: Path, scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = {text: sql for _, text, sql in benchmarks.entries()}

    def answer(body: Body) -> str:
        text = body["messages"][1]["content"].rpartition("Question: ")[2].partition(" (Hint")[0]
        return "no idea" if text.startswith("Which five") else fenced(gold[text].replace(" ", "\n"))

    scripted.answers["generate_candidate"] = answer
    words = (f"--benchmark={folder}", f"--base-url={scripted.url}", f"--out={tmp_path}", "--json")
    assert await command(*words, "--rate=500", "--max-rounds=0") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["questions"], figures["execution_match"]) == (9, 8)
    expected = ["" if t.startswith("Which five") else s for _, t, s in benchmarks.entries()]
    if folder.name == "bird":
        said = json.loads((tmp_path / "predict_dev.json").read_text())
        assert list(said) == [str(number) for number in range(9)]
        assert said["0"] == "SELECT COUNT(*) FROM book\t----- bird -----\tlibrary"
        assert [value.partition("\t")[0] for value in said.values()] == expected
    else:
        lines = (tmp_path / "predict_dev.txt").read_text().splitlines()
        assert lines == [sql or "SELECT 1" for sql in expected]


def question(kind: str, database: Database, gold: str) -> BenchmarkQuestion:
    return BenchmarkQuestion("q", "library", database, "?", gold, kind=kind)


ROWS = "SELECT genre, COUNT(*) FROM book GROUP BY genre"


@pytest.mark.parametrize(
    ("gold", "said", "bird", "spider"),
    [
        (ROWS, ROWS, True, True),
        (ROWS, f"{ROWS} ORDER BY 2", True, True),
        (f"{ROWS} ORDER BY 1", f"{ROWS} ORDER BY 1 DESC", True, False),
        (ROWS, "SELECT COUNT(*), genre FROM book GROUP BY genre", False, True),
        ("SELECT genre FROM book", "SELECT DISTINCT genre FROM book", True, True),
        ("SELECT genre FROM book", "SELECT genre FROM book GROUP BY genre", True, False),
        ("SELECT genre FROM book", "SELECT genre FROM book LIMIT 1", False, False),
        ("SELECT 1 WHERE 0", "SELECT 2 WHERE 0", True, True),
        ("SELECT 1, 2", "SELECT 1", False, False),
        ("SELECT 1, 1, 2", "SELECT 2, 1, 1", False, True),
        ("SELECT 2", "SELECT 2.0", True, True),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", False, False),
        ("SELECT 'DISTINCT'", "SELECT ''", False, False),
        ("SELECT broken", "SELECT 1", False, False),
    ],
)
def test_a_match_is_counted_as_they_do(
    gold: str, said: str, bird: bool, spider: bool, databases: Mapping[str, Database]
) -> None:
    library = databases["library"]
    rows = library.run(said).rows
    assert question("bird", library, gold).is_matched_by(rows, said) is bird
    assert question("spider", library, gold).is_matched_by(rows, said) is spider


def test_many_columns_that_are_alike_take_no_time() -> None:
    rows: Sequence[tuple[int, ...]] = [tuple(range(12)), tuple(range(12))]
    assert benchmark.same_columns(rows, [row[::-1] for row in rows], ordered=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (None, "", "has none of dev.json, mini_dev_sqlite.json, dev_spider.json."),
        ("dev.json", "[", "dev.json cannot be read: "),
        ("dev.json", "[]", "dev.json is neither of BIRD nor of Spider."),
        ("dev.json", '[{"question": "x", "db_id": "y"}]', "is neither of BIRD nor of Spider."),
        ("dev.json", '[{"question": "x", "db_id": "y", "SQL": "z"}]', "the database y is in none"),
    ],
)
def test_what_is_no_benchmark_is_one_sentence(
    name: str | None, content: str, said: str, tmp_path: Path
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as raised, benchmark.opened(tmp_path, "dev"):
        pass
    assert str(raised.value).startswith("benchmark: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmark=/none"], "benchmark: /none has none of dev.json"),
        (["--benchmark=x", "--ask", "y"], "benchmark goes without database, ask, questions"),
        (["--benchmark=x", "--split=../x"], "split must be a word, as dev, not '../x'."),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["text2sql", *words]) == 2
    assert said in capsys.readouterr().err
