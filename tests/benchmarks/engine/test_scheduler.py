"""The scheduler benchmark measures all sides on the same load and says so in its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import scheduler
from hexgen_vllm.cli import main

pytestmark = pytest.mark.engine


def test_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "bench.json"
    sizes = ["--waiting", "10", "40", "--running", "8", "--steps", "12"]
    assert main(["bench", "scheduler", *sizes, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    for stock in ("priority", "fcfs"):
        ratios = found[f"ratio_to_{stock}"]
        assert list(ratios) == ["10", "40"]
        for case, value in zip(found["cases"], ratios.values(), strict=True):
            times = case["schedule_us"]
            assert value == round(times["urgency"]["median"] / times[stock]["median"], 3)
    ours, stock_bytes = (found["bytes_per_waiting_call"]["40"][s] for s in ("urgency", "priority"))
    assert 0 < ours - stock_bytes < 2500
    printed = capsys.readouterr().out
    assert len(printed.strip().splitlines()) == 4


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--running", "0"], ["--waiting", "5", "-1"]])
def test_refuses_what_cannot_be_measured(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "scheduler", *wrong]) == 2
    error = capsys.readouterr().err
    assert wrong[0].removeprefix("--") in error
    assert len(error.strip().splitlines()) == 1


def test_ratio_and_table() -> None:
    times = {"urgency": {"median": 21.0}, "priority": {"median": 20.0}, "fcfs": {"median": 10.0}}
    result = {
        "waiting": 1000,
        "schedule_us": times,
        "update_us": times,
        "bytes_per_waiting_call": {"urgency": 900, "priority": 500},
    }
    assert scheduler.ratio(result, "priority") == 1.05
    assert scheduler.ratio(result, "fcfs") == 2.1
    row = scheduler.table([result]).splitlines()[-1].split()
    assert row == ["1,000", "21", "20", "10", "1.050", "2.100", "1.050", "900", "500"]
