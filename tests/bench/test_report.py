"""The evaluation: ratios, collapse, sustained rates, best alphas, a whole run of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm import cli
from hexgen_vllm.bench.evaluation import GOALS, Figures, goals, summary
from hexgen_vllm.bench.report_runs import Size, best_alphas, collapsed, planned
from hexgen_vllm.sim.scenario_file import load

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "examples/scenarios/evaluation").glob("*.yaml"))
TINY = """# a tiny scenario
fleet: reference-4
workload: {workflows: 6}
arrivals: {loads: [0.3, 0.8, 1.3]}
policies:
  - round_robin+fcfs
  - least_outstanding+edf
  - hexgen
  - slack
  - {policy: slack, name: slack protect, dispatch: {overload: protect}}
  - oracle
seeds: [1, 2]
"""


def run(
    policy: str, at: float, deadline: float | None, on_time: int, **more: Any
) -> dict[str, Any]:
    base = {"policy": policy, "load": at, "min_deadline_95_s": deadline, "p95_s": deadline}
    return {**base, "on_time": on_time, "workflows": 100, "collapsed": False, **more}


def test_a_ratio_leaves_out_baselines_that_collapsed() -> None:
    rows = [run("slack", at, 50.0, 99) for at in (0.3, 0.45, 0.6)]
    rows += [
        run("round_robin+fcfs", 0.3, 100.0, 90),
        run("round_robin+fcfs", 0.45, 200.0, 50),
        run("round_robin+fcfs", 0.6, 9000.0, 5, collapsed=True),
    ]
    assert goals(Figures(rows))["min_deadline_95_vs_stock"] == pytest.approx(3.0)


def test_our_own_collapse_still_counts() -> None:
    rows = [run("slack", 0.8, 500.0, 9, collapsed=True), run("hexgen", 0.8, 250.0, 50)]
    assert goals(Figures(rows))["min_deadline_95_vs_hexgen"] == pytest.approx(0.5)


def test_sustained_rate_is_where_the_line_crosses_95_percent() -> None:
    shares = ((0.3, 100), (0.6, 97), (0.8, 93), (0.95, 99))
    figures = Figures([run("slack", at, 1.0, share) for at, share in shares])
    assert figures.sustained("slack") == pytest.approx(0.7)
    assert Figures([run("slack", 0.3, 1.0, 80)]).sustained("slack") is None
    assert Figures([run("slack", 0.3, 1.0, 96)]).sustained("slack") == 0.3


def test_a_baseline_that_sustains_nothing_counts_as_sustaining_the_lowest_load() -> None:
    rows = [run("slack", at, 1.0, 99) for at in (0.2, 0.8)]
    rows += [run("round_robin+fcfs", at, 1.0, share) for at, share in ((0.2, 90), (0.8, 10))]
    assert goals(Figures(rows))["sustained_vs_stock"] == pytest.approx(4.0)


def test_overload_compares_demotion_with_the_best_baseline() -> None:
    rows = []
    for at in (1.3, 2.0):
        rows += [run("slack protect", at, 1.0, 60), run("hexgen", at, 1.0, 20)]
        rows += [run("least_outstanding+edf", at, 1.0, 30), run("slack", at, 1.0, 10)]
    values = goals(Figures(rows))
    assert values["goodput_overload_vs_hexgen"] == pytest.approx(3.0)
    assert values["goodput_overload_vs_best_baseline"] == pytest.approx(2.0)


def test_means_are_over_text2sql_and_the_worst_is_of_all() -> None:
    found = summary({
        "text2sql-a": {"sustained_over_lp": 0.8, "p95_over_oracle": 1.1},
        "text2sql-b": {"sustained_over_lp": 0.9, "p95_over_oracle": None},
        "react": {"sustained_over_lp": 0.5, "p95_over_oracle": 1.3},
    })  # fmt: skip
    assert found["summary"]["sustained_over_lp"] == pytest.approx(0.85)
    assert found["summary"]["live_min_deadline_95_vs_vllm_router"] is None
    assert found["worst"]["sustained_over_lp"] == {"value": 0.5, "scenario": "react"}
    assert found["worst"]["p95_over_oracle"] == {"value": 1.3, "scenario": "react"}
    assert set(found["summary"]) == {goal.key for goal in GOALS}


def test_growing_latency_is_a_collapse() -> None:
    assert collapsed([float(i) for i in range(100)])
    assert not collapsed([10.0] * 100)
    assert not collapsed([1.0] * 25 + [10.0] * 75), "a cold start is no collapse"
    assert collapsed([1.0] * 75 + [None] * 25)


def test_best_alpha_is_judged_by_what_matters_at_the_load() -> None:
    trials = [
        run("hexgen", 0.8, 90.0, 10, alpha=0.1),
        run("hexgen", 0.8, 80.0, 5, alpha=0.2),
        run("hexgen", 1.3, 900.0, 30, alpha=0.1),
        run("hexgen", 1.3, 800.0, 5, alpha=0.2),
    ]
    assert best_alphas(trials) == {0.8: 0.2, 1.3: 0.1}


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_committed_scenarios_have_the_wanted_size(path: Path) -> None:
    scenario = load(path)
    assert len(scenario.seeds) >= 3
    assert scenario.workload.workflows * len(scenario.seeds) >= 2000
    cells = planned(path, scenario, Size())
    assert len({cell.key() for cell in cells}) == len(cells)


def test_the_command_writes_page_figures_and_plots_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "text2sql-tiny.yaml").write_text(TINY)
    out, work = tmp_path / "docs", tmp_path / "work"
    words = ["bench", "report", "--scenarios", str(folder), "--out", str(out), "--work", str(work)]
    assert cli.main(words) == 0
    page = (out / "evaluation.md").read_text()
    figures = json.loads((out / "evaluation.json").read_text())
    assert set(figures["summary"]) == set(figures["worst"]) == {goal.key for goal in GOALS}
    assert figures["summary"]["min_deadline_95_vs_hexgen"] > 0
    assert "of 6 workflows, seeds 1, 2" in page
    for name in ("text2sql-tiny-0.8.png", "text2sql-tiny-1.3.png"):
        assert (out / "evaluation" / name).stat().st_size > 1000
        assert f"](evaluation/{name})" in page
    known = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    capsys.readouterr()
    assert cli.main(words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in work.iterdir()} == known
    assert (out / "evaluation.md").read_text() == page


def test_an_unknown_scenario_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(ROOT / "examples/scenarios/evaluation")
    assert cli.main(["bench", "report", "--scenarios", folder, "--only", "nothing"]) == 2
    assert "there is no scenario 'nothing'" in capsys.readouterr().err
