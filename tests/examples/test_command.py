"""The command, its figures and its bad input, without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from examples.text2sql import main as module
from examples.text2sql.endpoints import local_cluster
from examples.text2sql.main import FILE, UNSEEN_FILE, main, run
from examples.text2sql.options import Options
from hexgen_vllm.text2sql.agent import SqlAnswer
from hexgen_vllm.text2sql.calls import TokenUsage
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.options import named_url
from hexgen_vllm.text2sql.questions import Question
from hexgen_vllm.text2sql.report import line, summary, table
from hexgen_vllm.text2sql.session import AskedEndpoint
from hexgen_vllm.text2sql.users import Visit
from tests.text2sql.scripted import Scripted, fenced

NOWHERE = cast("Database", None)  # figures need no database
QUESTIONS = yaml.safe_load(FILE.read_text())


async def command(words: Sequence[str]) -> int:
    """Run the command beside the server of this process."""
    return await asyncio.to_thread(main, words)


async def test_every_question_is_asked_and_reported(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.answers["generate_candidate"] = fenced("SELECT COUNT(*) FROM book")
    words = ["--base-url", f"one={scripted.url}", scripted.url, f"--out={tmp_path}"]
    assert await command([*words, "--rate=1000", "--max-rounds=0"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["questions"], found["databases"]) == (48, 3)
    assert (ends(found), found["on_time"]) == ((16, 0, 32, 0), 48), "only the library has books"
    assert found["execution_match"] == 1, "one library question asks for the number of books"
    assert [one["policy"] for one in found["compare"]] == ["one", scripted.url.split("/")[2]]
    assert len(found["answers"]) == len({answer["id"] for answer in found["answers"]}) == 48
    right = next(answer for answer in found["answers"] if answer["execution_match"])
    assert (right["sql"], right["rows"]) == ("SELECT COUNT(*) FROM book", [[150]])
    out = capsys.readouterr().out
    assert out.count("on time") == 2 * 48 + 1
    assert "execution match" in out
    assert len(scripted.finished) == 2 * 48


async def test_a_model_that_knows_the_answers_matches_all_of_them(
    scripted: Scripted, tmp_path: Path
) -> None:
    gold = {entry["q"]: entry["sql"] for group in QUESTIONS.values() for entry in group}
    scripted.answers["generate_candidate"] = lambda body: fenced(
        gold[body["messages"][1]["content"].rpartition("Question: ")[2]]
    )
    (found,) = await run(Options(base_url=(scripted.url,), out=str(tmp_path), rate=1000.0))
    assert (found["execution_match"], found["completed"], found["revisions"]) == (48, 48, 0)


async def test_two_databases_are_there_that_no_model_was_trained_on(
    scripted: Scripted, tmp_path: Path
) -> None:
    groups = yaml.safe_load(UNSEEN_FILE.read_text())
    assert groups.keys().isdisjoint(QUESTIONS)
    gold = {entry["q"]: entry["sql"] for group in groups.values() for entry in group}
    scripted.answers["generate_candidate"] = lambda body: fenced(
        gold[body["messages"][1]["content"].rpartition("Question: ")[2]]
    )
    options = Options(base_url=(scripted.url,), out=str(tmp_path), rate=1000.0, unseen=True)
    (found,) = await run(options)
    assert (found["questions"], found["execution_match"], found["databases"]) == (24, 24, 2)
    answers = json.loads((tmp_path / "results.json").read_text())["answers"]
    assert all(answer["row_count"] for answer in answers), "every question has an answer"


async def test_an_endpoint_may_hold_answers_to_grammars_where_others_do_not(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endpoints(_: Options) -> AsyncGenerator[AskedEndpoint, None]:
        yield AskedEndpoint("free", scripted.url)
        yield AskedEndpoint("held", scripted.url, constrain=True)

    monkeypatch.setattr(module, "endpoints", endpoints)
    free, held = await run(Options(compare=True, out=str(tmp_path), users=2, max_rounds=0))
    bodies = [body for _, _, body in scripted.calls]
    assert ["structured_outputs" in body for body in bodies] == (
        [False] * free["calls"] + [True] * held["calls"]
    )
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


async def test_other_questions_may_be_asked_and_what_writes_is_refused(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("library: [{q: Delete all loans!}]")
    scripted.answers["generate_candidate"] = scripted.answers["revise"] = fenced("DELETE FROM loan")
    words = [f"--base-url={scripted.url}", f"--out={tmp_path}", f"--questions={file}"]
    assert await command(words) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert ends(found) == (0, 1, 0, 0), "a refused query is no answer"
    (answer,) = found["answers"]
    assert (answer["question"], answer["rows"]) == ("Delete all loans!", None)
    assert answer["error"].startswith("refused: DELETE is not allowed")
    assert answer["end"] == "refused"
    assert " s  refused   no rows " in capsys.readouterr().out


async def test_warm_up_is_played_and_not_counted(scripted: Scripted, tmp_path: Path) -> None:
    options = Options(
        base_url=(scripted.url,), out=str(tmp_path), users=3, warmup=2, rate=500.0, max_rounds=0
    )
    (found,) = await run(options)
    assert (found["questions"], len(scripted.finished)) == (3, 5)


async def test_calls_that_fail_make_the_command_fail(scripted: Scripted, tmp_path: Path) -> None:
    scripted.broken.add("schema_linking")
    words = [f"--base-url={scripted.url}", f"--out={tmp_path}", "--users=2"]
    assert await command(words) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert ends(found) == (0, 0, 0, 2)
    assert (found["on_time"], found["min_deadline_95_s"]) == (0, None)
    assert all("as asked" in answer["error"] for answer in found["answers"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--base-url=nowhere"], "base_url must be URL or NAME=URL, not 'nowhere'."),
        (["--compare", "--model=/none"], "model must be a folder with compare, and /none is none."),
        (["--questions=/none"], "/none cannot be read: No such file or directory."),
        (["--deadline-s=0"], "deadline_s must be at least 0.1, not 0."),
        (["--base-url=http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 cannot be used: Connection"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"text2sql: {sentence}")


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([f"--out={tmp_path}/file"]) == 2
    said = capsys.readouterr().err
    assert said == f"text2sql: out: {tmp_path}/file/databases cannot be written: Not a directory.\n"


def test_ctrl_c_is_no_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(options: Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    assert main([f"--out={tmp_path}"]) == 130


async def test_a_model_that_is_not_served_is_told(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--base-url={scripted.url}", "--model=other", f"--out={tmp_path}"]
    assert await command(words) == 2
    assert "does not serve other, but m." in capsys.readouterr().err


def ends(found: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(found[name] for name in ("completed", "refused", "invalid", "failed"))


def visit(
    latency_s: float, row: int | None = 6, *, refused: bool = False, failed: bool = False
) -> Visit:
    question = Question("q-1", "library", NOWHERE, "How many?", "SELECT 6", ((6,),))
    rows = None if row is None else ((row,),)
    answer = SqlAnswer(
        TokenUsage(calls=4), "SELECT 6", ("6",), rows, refused=refused, failed=failed
    )
    return Visit(question, answer, latency_s, 10.0)


def test_figures_count_what_failed_as_late() -> None:
    visits = [visit(2.0), visit(10.0), visit(10.1, 7), visit(1.0, None, failed=True)]
    found = summary("p", visits, 0.5)
    assert (found["questions"], found["on_time"], ends(found)) == (4, 2, (3, 0, 0, 1))
    assert (found["execution_match"], found["calls"], found["p50_s"]) == (2, 16, 10.0)
    assert found["min_deadline_95_s"] is None, "a quarter never came"
    assert "LATE" in line(visits[2])
    assert "differs" in line(visits[2])
    assert "FAILED" in line(visits[3])


def test_a_question_without_an_answer_is_not_completed() -> None:
    visits = [visit(2.0), visit(3.0, None, refused=True), visit(4.0, None)]
    found = summary("p", visits, 0.5)
    assert ends(found) == (1, 1, 1, 0)
    assert sum(ends(found)) == found["questions"]
    assert found["on_time"] == 3, "its calls were served: what it measures is serving"
    assert "refused" in line(visits[1])
    assert "invalid" in line(visits[2])
    heading, cells = table([found]).splitlines()[0::2][:2]
    assert heading.split()[3:7] == ["completed", "refused", "invalid", "failed"]
    assert cells.split()[3:7] == ["1", "1", "1", "0"]


def test_urls_may_have_names() -> None:
    assert named_url("a=http://h:1/v1?x=y") == ("a", "http://h:1/v1?x=y")
    assert named_url("http://h:1/v1?x=y") == ("h:1", "http://h:1/v1?x=y")


@pytest.mark.parametrize(
    ("fleet", "placement", "scheduler"),
    [("stock", "round_robin", "fcfs"), ("slack", "slack", "hexgen")],
)
def test_the_comparison_differs_in_scheduling_only(
    fleet: str, placement: str, scheduler: str
) -> None:
    spec = local_cluster(Options(compare=True, model="folder"), fleet, placement)
    assert {engine.scheduler for engine in spec.engines} == {scheduler}
    assert [engine.name for engine in spec.engines] == ["fast", "slow"]
    assert spec.router is not None
    assert spec.router.policy == placement
