"""``hexgen-vllm bench sim``, on workloads that take no time; its figures are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import sim
from hexgen_vllm.cli import main

TINY = ["--speed-workflows=3", "--repeats=2", "--memory-workflows=3", "--grid-workflows=2"]


def test_it_prints_and_writes_the_three_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "sim.json"
    assert main(["bench", "sim", *TINY, "--jobs=1", f"--json={out}"]) == 0
    figures = json.loads(out.read_text())
    speeds = [f"calls_per_s_per_core{which}" for which in ("", "_64", "_overload")]
    assert list(figures) == [*speeds, "alpha_grid_s", "peak_rss_mib"]
    assert min(figures[name] for name in speeds) > 0
    assert figures["alpha_grid_s"] >= 0
    assert figures["peak_rss_mib"] > 10
    said = capsys.readouterr().out
    assert f"{figures['calls_per_s_per_core']:,}" in said
    assert "11 x 3 runs of 2 workflows" in said


def test_the_peak_is_of_the_process_that_plays_not_of_the_one_that_asks() -> None:
    ballast = b"x" * (512 * 2**20)
    assert 10 < sim.peak_rss_mib(3) < 400
    assert len(ballast) == 512 * 2**20


def test_the_load_is_what_it_says() -> None:
    specs = sim.workload(200, seed=1)
    assert sim.workload(200, seed=1) == specs
    assert sim.workload(200, seed=2) != specs
    rate = len(specs) / specs[-1].arrival_s
    assert rate == pytest.approx(0.8 * sim.capacity_per_s(), rel=0.15)


@pytest.mark.parametrize("option", ["--speed-workflows", "--repeats", "--jobs"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sim", *TINY, f"{option}=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"hexgen-vllm bench sim: {option} must be at least 1.\n"
