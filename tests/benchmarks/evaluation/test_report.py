"""The evaluation: who is compared with whom, growing queues, tuned knobs, a run of the command."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.evaluation import (
    FIGURES,
    ORACLE,
    OURS,
    PROTECT,
    TRUE_RATES,
    Results,
    behind,
    queue_grows,
    summary,
    surely,
    tenths,
)
from benchmarks.evaluation.report_runs import (
    RIVALS,
    Cell,
    Size,
    best_alpha,
    best_caps,
    best_knobs,
    capping,
    planned,
)
from hexgen_vllm import cli
from hexgen_vllm.sim.policies import NAMES
from hexgen_vllm.sim.scenario_file import load

ROOT = Path(__file__).resolve().parents[3]
SCENARIOS = sorted((ROOT / "examples/scenarios/evaluation").glob("[!a]*.yaml"))
AT_95 = FIGURES["best_rival_md95"]
TINY = """# a tiny scenario
fleet: reference-4
workload: {workflows: 6}
arrivals: {loads: [0.8, 1.3]}
seeds: [1, 2]
"""


def run(
    policy: str, deadline: float | None, on_time: float = 0.9, at: float = 0.8, **more: Any
) -> dict[str, Any]:
    base = {"scenario": "s", "policy": policy, "load": at, "seed": 1, "grows": False}
    figures = {"min_deadline_95_s": deadline, "min_deadline_99_s": deadline, "p50_s": deadline}
    shares = {"share_on_time": on_time, "longest_tenth": on_time}
    return {**base, **figures, **shares, "latencies_s": [], **more}


def margin(*rows: dict[str, Any]) -> float | None:
    found = Results(rows).margin(AT_95)
    return None if found is None else found.mean


def test_ours_stands_against_the_best_rival_of_each_cell() -> None:
    rows = [run(OURS, 50.0), run("a", 60.0), run("b", 55.0)]
    rows += [run(OURS, 50.0, seed=2), run("a", 45.0, seed=2), run("b", 80.0, seed=2)]
    found = Results(rows).margin(AT_95)
    assert found is not None
    assert found.mean == pytest.approx((1.1 * 0.9) ** 0.5)
    assert (found.worst, found.at.seed) == (pytest.approx(0.9), 2)
    assert (found.lost, found.cells) == (1, 2)


def test_the_oracle_and_true_rates_are_no_rivals() -> None:
    rows = [run(OURS, 50.0), run(ORACLE, 10.0), run(TRUE_RATES, 10.0), run(PROTECT, 9.0)]
    assert margin(*rows) is None
    assert margin(*rows, run("a", 60.0)) == pytest.approx(1.2)


def test_a_rival_whose_queue_grows_is_left_out_and_ours_that_grows_has_lost() -> None:
    assert margin(run(OURS, 50.0), run("a", 10.0, grows=True), run("b", 60.0)) == pytest.approx(1.2)
    assert margin(run(OURS, 50.0, grows=True), run("a", 500.0)) == pytest.approx(0.5)
    assert margin(run(OURS, 50.0), run("a", 500.0, grows=True)) is None
    assert Results([run("a", 1.0, grows=True)]).growing() == [("a", "s at 0.8, seed 1")]


def test_what_is_above_capacity_is_compared_by_share_with_capped_rivals() -> None:
    rows = [run(PROTECT, None, 0.66, at=1.3), run("a capped", None, 0.6, at=1.3)]
    rows += [run("b capped", None, 0.5, at=1.3), run(OURS, 50.0), run("a", 50.0)]
    found = summary(Results(rows))
    assert found["summary"]["overload_vs_best_capped"] == pytest.approx(1.1)
    assert found["summary"]["best_rival_md95"] == pytest.approx(1.0)
    assert found["summary"]["cells_lost_pct"] == 0.0


def test_the_luckiest_rival_of_a_cell_is_not_the_one_that_anybody_would_have_chosen() -> None:
    """Two rivals as good as ours on the whole, each with a lucky half."""
    rows = [run(OURS, 10.0, latencies_s=[10.0] * 80)]
    rows += [run("a", 10.0, latencies_s=[*[5.0] * 40, *[20.0] * 40])]
    rows += [run("b", 10.0, latencies_s=[*[20.0] * 40, *[5.0] * 40])]
    rows += [run("c", 1.0, latencies_s=[1.0] * 80, grows=True)]
    assert Results(rows).apart(AT_95) == pytest.approx(2.0)
    assert summary(Results(rows))["summary"]["best_rival_md95_chosen_apart"] == pytest.approx(2.0)
    assert Results([run(OURS, 10.0, latencies_s=[10.0] * 80)]).apart(AT_95) is None


def test_one_rival_for_all_cells_is_the_best_of_means() -> None:
    rows = [run(OURS, 50.0, 0.8), run("a", 40.0, 0.8), run("b", 60.0, 0.6)]
    rows += [run(OURS, 50.0, 0.8, seed=2), run("a", 90.0, 0.2, seed=2), run("b", 60.0, 0.6, seed=2)]
    found = summary(Results(rows))["summary"]
    assert found["best_rival_md95_one_rival"] == pytest.approx(1.2)
    assert found["longest_tenth_vs_best_rival"] == pytest.approx(0.8 / 0.7)
    assert found["longest_tenth_vs_best_rival_one_rival"] == pytest.approx(0.8 / 0.6)


def test_a_cell_is_lost_beyond_noise_only_where_most_draws_say_so() -> None:
    rng = random.Random(1)
    ours = [rng.expovariate(0.1) for _ in range(300)]
    assert surely([0.8 * v for v in ours], ours, 0.95) == -1
    assert surely([1.2 * v for v in ours], ours, 0.95) == 1
    other = [rng.expovariate(0.1) for _ in range(300)]
    assert surely(other, ours, 0.95) == surely(ours, ours, 0.95) == 0
    rows = [run(OURS, 50.0, latencies_s=ours), run("a", 40.0, latencies_s=[v / 2 for v in ours])]
    found = summary(Results(rows))["summary"]
    assert (found["cells_lost_beyond_noise_pct"], found["cells_won_beyond_noise_pct"]) == (100, 0)


def test_behind_lists_cells_with_fewer_on_time_where_a_rival_has_half() -> None:
    rows = [run(OURS, 50.0, 0.7), run("a", 60.0, 0.8)]
    rows += [run(OURS, 50.0, 0.3, seed=2), run("a", 60.0, 0.45, seed=2)]
    rows += [run(OURS, 50.0, 0.895, seed=3), run("a", 60.0, 0.9, seed=3)]
    assert [(cell.seed, ours, best) for cell, ours, best in behind(Results(rows))] == [
        (1, pytest.approx(70.0), pytest.approx(80.0))
    ]


def test_fitted_rates_are_compared_with_true_ones() -> None:
    found = summary(Results([run(OURS, 51.0), run(TRUE_RATES, 50.0)]))
    assert found["summary"]["fitted_over_true_md95"] == pytest.approx(1.02)


def spans(arrivals: Sequence[float], service_s: float, servers: int) -> list[tuple[float, float]]:
    """Return arrivals and ends of first come, first served."""
    free = [0.0] * servers
    found = []
    for at in arrivals:
        first = min(range(servers), key=lambda i: free[i])
        free[first] = max(free[first], at) + service_s
        found.append((at, free[first]))
    return found


@pytest.mark.parametrize("count", [200, 2000])
@pytest.mark.parametrize(("load", "grows"), [(0.5, False), (0.9, False), (1.15, True), (1.6, True)])
def test_a_queue_grows_above_capacity_however_long_the_run(
    load: float, grows: bool, count: int
) -> None:
    rng = random.Random(1)
    at, arrivals = 0.0, []
    for _ in range(count):
        at += rng.expovariate(load * 10)
        arrivals.append(at)
    assert queue_grows(spans(arrivals, 1.0, 10)) is grows


def test_workflows_that_never_end_make_a_queue_grow() -> None:
    assert queue_grows([(float(i), None) for i in range(100)])
    assert not queue_grows([(float(i), i + 5.0) for i in range(100)])


def test_tenths_are_by_size() -> None:
    sizes = [float(i) for i in range(100)]
    assert tenths(sizes, [size < 90 for size in sizes]) == [*[1.0] * 9, 0.0]


def cell(policy: str, **knobs: float) -> Cell:
    return Cell(Path("x"), policy, policy, 0.8, 1, 10, tuple(knobs.items()))


def test_knobs_are_the_best_in_the_geometric_mean() -> None:
    cells = [cell("a", k=1.0), cell("a", k=1.0), cell("a", k=2.0), cell("a", k=2.0)]
    deadlines = [10.0, 100.0, 20.0, 40.0]
    rows = [run("a", deadline) for deadline in deadlines]
    assert best_knobs(cells, rows) == {"a": (("k", 2.0),)}
    rows[3] = run("a", None)
    assert best_knobs(cells, rows) == {"a": (("k", 1.0),)}


def test_the_best_cap_has_most_on_time() -> None:
    cells = [cell("a", max_workflows=8.0), cell("a", max_workflows=16.0)]
    rows = [run("a", None, 0.4), run("a", None, 0.5)]
    assert best_caps(cells, rows) == {"a": 16}


def test_the_paper_has_its_best_alpha_in_each_cell() -> None:
    rows = [run("paper alpha=0.1", 60.0), run("paper alpha=0.9", 50.0), run("slack", 40.0)]
    rows += [run("paper alpha=0.1", 60.0, seed=2), run("paper alpha=0.9", 70.0, seed=2)]
    kept = best_alpha(rows)
    assert [(r["policy"], r["seed"], r["min_deadline_95_s"]) for r in kept] == [
        ("slack", 1, 40.0), ("paper", 1, 50.0), ("paper", 2, 60.0),
    ]  # fmt: skip


def test_every_rival_is_a_policy() -> None:
    assert set(RIVALS) <= set(NAMES)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_committed_scenarios_have_the_wanted_size(path: Path) -> None:
    scenario = load(path)
    assert len(scenario.seeds) >= 3
    assert scenario.workload.workflows * len(scenario.seeds) >= 2000
    cells = planned(path, scenario, Size(), {}, {"wlcaff+edf": 40})
    assert len({cell.key() for cell in cells}) == len(cells)
    assert {cell.seed for cell in capping(path, scenario, Size())}.isdisjoint(scenario.seeds)


def test_the_command_writes_page_figures_and_plots_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "text2sql-tiny.yaml").write_text(TINY)
    out, work = tmp_path / "docs", tmp_path / "work"
    words = ["bench", "report", "--quick", "--workflows", "6", "--scenarios", str(folder)]
    words += ["--out", str(out), "--work", str(work)]
    assert cli.main(words) == 0
    page = (out / "evaluation.md").read_text()
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["summary"]["best_rival_md95"] > 0
    assert figures["summary"]["overload_vs_best_capped"] is not None
    assert {"cells_lost_pct", "best_rival_md99", "p50_vs_best_rival"} <= set(figures["summary"])
    assert "wlcaff+edf" in page
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
