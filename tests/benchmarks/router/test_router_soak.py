"""The soak: a short one passes, and each thing that may go wrong is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.router import router_engine, soak
from benchmarks.router.router_load import Call
from hexgen_vllm.cli import main

CLEAN = {
    "open_calls": 0, "tries": 0, "held": 0, "waiting": 0, "in_flight": 0, "open_workflows": 0,
    "engine_connections": 0, "tasks": 5, "files": 20, "arrived": 10, "answered": 8,
    "failed": {"engine-lost": 2},
}  # fmt: skip


def found(**changes: Any) -> dict[str, Any]:
    after = {**CLEAN, **changes.pop("after", {})}
    seen = changes.pop("seen", {"answered": 8, "refused": 2})
    return {"before": CLEAN, "after": after, "seen": seen, "asked": 10,
            "without_cause": changes.pop("without_cause", []),
            "rss_mib": {"growth": changes.pop("growth", 0.5)}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"after": {"open_workflows": 1}}, "open_workflows"),
        ({"after": {"engine_connections": 3}}, "engine_connections"),
        ({"after": {"tasks": 6}}, "tasks"),
        ({"after": {"files": 21}}, "files"),
        ({"after": {"answered": 7}}, "balance"),
        ({"seen": {"answered": 8, "dropped": 2}}, "dropped"),
        ({"seen": {"answered": 9, "wrong bytes": 1}}, "wrong bytes"),
        ({"seen": {"answered": 9}}, "9 came to an end"),
        ({"growth": 4.1}, "memory grew"),
        ({"without_cause": [("e1", 3.0)]}, "without cause"),
    ],
)
def test_what_is_wrong_is_noticed(changes: dict[str, Any], word: str) -> None:
    (wrong,) = soak.verdict(found(**changes), 4.0)
    assert word in wrong


def test_nothing_wrong_is_said_of_a_clean_run() -> None:
    assert soak.verdict(found(), 4.0) == []


async def test_calls_are_sorted_by_what_their_clients_saw() -> None:
    judge = soak._Judge(0)
    events = router_engine.events(3)
    error = b'data: {"error":{"message":"x"}}\n\n'
    cases = {
        "answered": Call(1, 3, True, body=list(events), status=200),
        "error event": Call(2, 3, True, body=[events[0], error], status=200),
        "refused": Call(3, 3, False, body=[b'{"error":{}}'], status=503),
        "dropped": Call(4, 3, False, status=0),
        "wrong bytes": Call(5, 3, True, body=[events[1], error], status=200),
        "left": Call(6, 3, True, body=[events[0]], status=0),
        "cut off": Call(7, 3, True, body=[events[0]], status=0),
        "turned away": Call(8, 3, True, status=0, sent_s=5.0),
    }
    judge.left.add(6)
    judge.stuck.add(7)
    judge.short.append((4.0, 6.0))
    for call in cases.values():
        judge.judge(call)
    assert judge.seen == dict.fromkeys(cases, 1)


def test_only_what_was_away_is_taken_out_with_cause() -> None:
    away = {"a": [(10.0, 12.0)], "b": []}
    assert soak.without_cause([("a", 11.0), ("a", 13.0)], away) == []
    wrong = [("a", 9.0), ("a", 60.0), ("b", 11.0)]
    assert soak.without_cause(wrong, away) == wrong


@pytest.mark.slow
@pytest.mark.e2e
def test_a_short_soak_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    words = ["--minutes", "0.17", "--every", "0.5", "--max-growth-mib", "20", "--json", str(out)]
    assert main(["bench", "soak", *words]) == 0, capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["wrong"] == []
    assert result["seen"]["answered"] > 100
    assert result["deaths"] >= 1
    assert len(result["samples"]) > 10


def test_refuses_a_soak_without_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "soak", "--minutes", "0"]) == 2
    assert "minutes" in capsys.readouterr().err
