"""What an engine has learned survives its restart, in a file that may be broken or missing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.wire import CallMeta
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine

AGENT: dict[str, Any] = {"workflow_type": "agent", "workflow_deadline_ms": 60_000.0}


def learn(engine: FakeEngine) -> None:
    """Play workflows of two stages: 5 tokens, then 100."""
    for i in range(12):
        for stage, tokens in (("plan", 5), ("write", 100)):
            meta = CallMeta(
                workflow_id=f"w{i}", stage=stage, workflow_final=stage == "write", **AGENT
            )
            engine.add(f"w{i}.{stage}", [5 + i] * 8, tokens, meta)
            engine.run()


def expected(engine: FakeEngine) -> tuple[int, float]:
    call = engine.add("new", [5] * 8, 400, CallMeta(workflow_id="n", stage="plan", **AGENT)).hexgen
    return call.expected_tokens, call.tail_s


def test_lengths_and_tails_survive_a_restart(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "learned.json"
    before = build(max_num_seqs=4, hexgen={"learned_file": str(file)})
    assert expected(before)[1] == 0.0
    before.run()
    learn(before)
    lengths = before.scheduler.hexgen_stats()["lengths"]
    assert lengths["agent"]["plan"]["tail_p80"] == 100
    before.scheduler.shutdown()
    after = build(max_num_seqs=4, hexgen={"learned_file": str(file)})
    assert after.scheduler.hexgen_stats()["lengths"] == lengths
    tokens, tail_s = expected(after)
    assert tokens == 5
    assert tail_s > 0.0
    assert expected(build(max_num_seqs=4))[0] != 5, "without the file nothing is known"


def test_it_is_written_from_time_to_time(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "learned.json"
    engine = build(max_num_seqs=4, hexgen={"learned_file": str(file)})
    learn(engine)
    assert not file.exists()
    engine.clock.now += 61.0
    learn(engine)
    engine.scheduler._learned_file._thread.join()
    assert json.loads(file.read_text())["shapes"]
    assert [path.name for path in tmp_path.iterdir()] == ["learned.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": 99, "shapes": []}',
        b'{"format": 1, "shapes": {}}',
        b'{"format": 1, "shapes": [{"key": ["a"], "outputs": [1.5], "tails": []}]}',
        b'{"format": 1, "shapes": [{"key": ["a"], "outputs": [1], "tails": [[1, 2]]}]}',
        b'{"format": 1, "shapes": [{"key": ["a"], "outputs": [1], "tails": [[1, 2, NaN]]}]}',
        b'{"format": 1, "shapes": [{"key": [], "outputs": [], "tails": []}]}',
        b"[" * 100_000,
    ],
)
def test_a_broken_file_is_a_warning(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file = tmp_path / "learned.json"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "vllm.hexgen"):
        engine = build(max_num_seqs=4, hexgen={"learned_file": str(file)})
    assert str(file) in caplog.text
    assert engine.scheduler.hexgen_stats()["lengths"] == {}
    learn(engine)
    engine.scheduler.shutdown()
    assert json.loads(file.read_text())["shapes"], "it is written anew"


def test_a_file_that_cannot_be_written_is_one_warning(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "missing" / "learned.json"
    engine = build(max_num_seqs=4, hexgen={"learned_file": str(file)})
    learn(engine)
    with caplog.at_level(logging.WARNING, "vllm.hexgen"):
        engine.scheduler.shutdown()
        engine.scheduler.shutdown()
    assert caplog.text.count(f"{file}: ") == 1
