"""The benchmark of effort by slack plays what it says, on a router and an engine of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.text2sql import effort
from hexgen_vllm.text2sql import prompts


async def test_both_efforts_get_the_same_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--questions=4", "--warmup=1", "--rates", "20", "--step-s=0.001", "--deadline-s=30",
             f"--out={tmp_path}/effort.json"]  # fmt: skip
    assert await asyncio.to_thread(effort.main, words) == 0
    same, by_slack = json.loads((tmp_path / "effort.json").read_text())
    assert (same["policy"], by_slack["policy"]) == ("same effort", "by slack")
    assert same["questions"] == by_slack["questions"] == 4
    assert same["failed"] == by_slack["failed"] == 0
    assert by_slack["calls"] > same["calls"], "all of them are early"
    assert "right and on time" in capsys.readouterr().out


def test_every_prompt_is_known_to_the_engine() -> None:
    said = [prompts._KEYWORDS, prompts._LINKS, *prompts.CANDIDATES, prompts._REVISE,
            prompts._UNIT_TEST, prompts._EVALUATE]  # fmt: skip
    assert {effort.stage_of(text) for text in said} == set(effort.TOKENS)


def test_options_that_make_no_sense_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert effort.main(["--right=2"]) == 2
    assert capsys.readouterr().err == "effort: right must be at most 1, not 2.\n"
