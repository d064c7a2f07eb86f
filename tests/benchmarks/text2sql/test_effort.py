"""The benchmark of effort by slack plays what it says, on a router and an engine of its own."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import virtual_time
from benchmarks.text2sql import effort
from benchmarks.text2sql.answers import ModelAnswers
from hexgen_vllm.text2sql import prompts


def played(folder: Path, *words: str) -> list[dict[str, Any]]:
    assert effort.main([*words, "--seeds=1", f"--out={folder}/effort.json"]) == 0
    found: list[dict[str, Any]] = json.loads((folder / "effort.json").read_text())
    return found


async def test_both_efforts_get_the_same_questions_in_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--drawn", "--questions=4", "--warmup=1", "--rates", "0.01", "--step-s=1",
             "--deadline-s=3600"]  # fmt: skip
    found = await asyncio.to_thread(played, tmp_path, *words)
    same, by_slack = found
    assert (same["policy"], by_slack["policy"]) == ("same effort", "by slack")
    assert same["questions"] == by_slack["questions"] == 4
    assert same["failed"] == by_slack["failed"] == 0
    assert same["p50_s"] > 100, "virtual seconds: really, the test would be stopped"
    assert by_slack["calls"] > same["calls"], "all of them are early"
    assert "right and on time" in capsys.readouterr().out
    assert await asyncio.to_thread(played, tmp_path, *words) == found


async def test_the_answers_of_the_demos_model_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, model and answers belong together: one that is not known would be computed."""
    monkeypatch.setattr(ModelAnswers, "_computed", lambda *_: pytest.fail("a prompt has changed"))
    monkeypatch.setattr(ModelAnswers, "keep", lambda _: None)
    words = "--questions=24", "--warmup=0", "--rates", "0.5", "--deadline-s=20"
    same, by_slack = await asyncio.to_thread(played, tmp_path, *words)
    assert same["execution_match"] >= 12
    assert by_slack["failed"] == 0


def test_every_prompt_is_known_to_the_engine() -> None:
    said = [prompts._KEYWORDS, prompts._LINKS, *prompts.CANDIDATES, prompts._REVISE,
            prompts._UNIT_TEST, prompts._EVALUATE]  # fmt: skip
    assert {effort.stage_of(text) for text in said} == set(effort.TOKENS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--right=2"], "right must be at most 1, not 2."),
        (["--model=/nowhere"], "model: /nowhere is no folder with a model."),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert effort.main(words) == 2
    assert capsys.readouterr().err == f"effort: {said}\n"


def test_virtual_time_goes_on_when_all_wait() -> None:
    async def main() -> tuple[float, str, list[int]]:
        clock, order = virtual_time.LoopClock(), []
        start_s = clock.now()

        async def late(seconds: int) -> None:
            await asyncio.sleep(seconds)
            order.append(seconds)

        await asyncio.gather(late(7200), late(3600), asyncio.to_thread(time.sleep, 0.0))
        server = await asyncio.start_server(lambda _, w: w.write(b"hi\n"), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            said = (await reader.readline()).decode()
            writer.close()
        return clock.now() - start_s, said, order

    assert virtual_time.run(main()) == (pytest.approx(7200), "hi\n", [3600, 7200])
