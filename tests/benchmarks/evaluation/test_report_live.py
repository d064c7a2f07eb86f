"""The part of the evaluation about runs on real engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.report_live import (
    KEY,
    least_margin,
    ratio,
    section,
)
from hexgen_vllm import cli


def run(policy: str, seed: int, min_deadline_95_s: float | None) -> dict[str, Any]:
    return {
        "policy": policy,
        "seed": seed,
        "min_deadline_95_s": min_deadline_95_s,
        "workflows": 120,
        "rate": 3.0,
        "deadline_s": 4.0,
    }


LIVE = [
    run("slack", 0, 2.0),
    run("slack", 1, 4.0),
    run("vllm_router", 0, 3.0),
    run("vllm_router", 1, 4.0),
    run("vllm_router_program", 0, 6.0),
    run("vllm_router_program", 1, 8.0),
    run("paper", 0, 4.0),
    run("paper", 1, None),
]
SIMULATED = [run("paper a=0.2", 7, 5.0), run("paper a=0.4", 7, 3.5), run("slack", 7, 2.5)]


def test_the_ratio_is_the_mean_of_ratios_seed_by_seed() -> None:
    assert ratio(LIVE) == pytest.approx((6.0 / 2.0 + 8.0 / 4.0) / 2)
    assert ratio(LIVE, "vllm_router") == pytest.approx(1.25)


@pytest.mark.parametrize("missing", ["slack", "vllm_router_program"])
def test_there_is_no_ratio_without_both_sides_on_every_seed(missing: str) -> None:
    rows = [row for row in LIVE if (row["policy"], row["seed"]) != (missing, 1)]
    assert ratio(rows) is None
    never = [*rows, run(missing, 1, None)]
    assert ratio(never) is None
    assert ratio([]) is None


def test_the_page_shows_every_seed_and_the_simulator_beside_it() -> None:
    text = section(LIVE, SIMULATED)
    assert "| slack | 2.00 | 4.00 | 3.00 | 2.50 |" in text
    assert "| paper | 4.00 | - | - | 3.50 |" in text
    assert "| vllm_router | 3.00 | 4.00 | 3.50 | - |" in text
    assert "vllm_router_program needs 2.50× the deadline of slack" in text


def test_the_command_takes_live_results(tmp_path: Path) -> None:
    live = tmp_path / "live.json"
    live.write_text(json.dumps(LIVE))
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "text2sql-tiny.yaml").write_text(
        "# tiny\n"
        "fleet: [{device: A100}]\n"
        "workload: {workflows: 4, warmup: 0, length_scale: 0.02}\n"
        "arrivals: {loads: [0.8]}\n"
        "deadline: {scale: 2.0}\n"
        "seeds: [1]\n"
    )
    words = ["bench", "report", "--quick", "--workflows", "6", "--scenarios", str(folder)]
    words += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    words += ["--no-plots", "--live", str(live)]
    assert cli.main(words) == 0
    summary = json.loads((tmp_path / "out/evaluation.json").read_text())["summary"]
    assert summary[KEY] == least_margin(LIVE) == pytest.approx(1.25)
    assert "## Live" in (tmp_path / "out/evaluation.md").read_text()


def test_a_live_file_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.json"
    assert cli.main(["bench", "report", "--live", str(missing)]) == 2
    assert f"there is no file {missing}" in capsys.readouterr().err
