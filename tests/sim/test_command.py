"""``hexgen-vllm sim``: what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hexgen_vllm.cli import main
from hexgen_vllm.sim.policies import NAMES

COST = {"c0": 0.02, "c1": 1e-4, "c2": 0, "p0": 0, "p1": 2e-4, "p2": 0}
SCENARIO: dict[str, Any] = {
    "fleet": [
        {"name": "fast", "cost": COST, "max_num_seqs": 4, "kv_tokens": 40_000},
        {"name": "slow", "cost": {k: 3 * v for k, v in COST.items()}, "kv_tokens": 40_000},
    ],
    "workload": {"workflows": 8, "length_scale": 0.1},
    "arrivals": {"loads": [0.8]},
    "seeds": [1],
}


def written(tmp_path: Path, scenario: dict[str, Any]) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(scenario, sort_keys=False))
    return path


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    return written(tmp_path, SCENARIO)


def result(scenario: Path, *argv: str) -> bytes:
    out = scenario.with_name("out.json")
    assert main(["sim", str(scenario), *argv, f"--json={out}"]) == 0
    return out.read_bytes()


def test_equal_seeds_give_equal_bytes_and_others_do_not(scenario: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    steps = [{"step": s, "input_length": 900, "output_length": 30} for s in ("revise", "evaluate")]
    trace.write_text(json.dumps([{"Text2SQLRequest": steps}, {"Text2SQLRequest": steps * 2}]))
    for source in ([], ["--trace", str(trace)]):
        first = result(scenario, *source)
        assert result(scenario, *source) == first
        assert result(scenario, *source, "--seed", "2") != first


def test_every_policy_can_be_compared(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(result(scenario, "--policy", *NAMES))
    assert [row["policy"] for row in rows] == list(NAMES)
    for row in rows:
        assert {"horizon_95_s", "capacity_per_s", "min_deadline_95_x"} <= set(row)
    captured = capsys.readouterr()
    assert all(name in captured.out for name in NAMES)
    first = f"1/{len(NAMES)}: {NAMES[0]} at load 0.80, seed 1"
    assert first in captured.err  # progress


@pytest.mark.parametrize(
    "arrivals",
    [{"rates": [2.0], "burstiness": 3.0}, {"times_s": [0.5 * i for i in range(8)], "speed": 2.0}],
)
def test_bursts_and_recorded_arrivals(tmp_path: Path, arrivals: dict[str, Any]) -> None:
    (row,) = json.loads(result(written(tmp_path, {**SCENARIO, "arrivals": arrivals})))
    times = row["arrivals_s"]
    if "times_s" in arrivals:
        assert times == [0.25 * i for i in range(8)]
    assert times == sorted(times)
    assert len(row["latencies_s"]) == 8


def test_a_plot_for_each_load(scenario: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result(scenario, "--load", "0.5", "0.9", f"--plot={plot}")
    for name in ("plot-0.50.png", "plot-0.90.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_timeline_has_every_step_call_and_workflow(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "timeline.json"
    (row,) = json.loads(result(scenario, f"--timeline={out}"))
    events = json.loads(out.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"workflows", "fast", "slow"}
    slices = [e for e in events if e["ph"] == "X"]
    flows = sorted(e["dur"] for e in slices if names[e["pid"]] == "workflows")
    assert flows == pytest.approx([1e6 * s for s in sorted(row["latencies_s"])], abs=1.0)
    calls = [e for e in slices if names[e["pid"]] != "workflows" and e["tid"] > 0]
    assert len(calls) == sum(row["calls"]["engines"].values())
    for pid in names:
        _assert_no_overlap([e for e in slices if e["pid"] == pid])


def _assert_no_overlap(slices: list[dict[str, Any]]) -> None:
    ends: dict[int, float] = {}
    for event in sorted(slices, key=lambda e: e["ts"]):
        assert event["ts"] >= ends.get(event["tid"], 0.0) - 0.2
        ends[event["tid"]] = event["ts"] + event["dur"]


def test_a_timeline_shows_one_run(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sim", str(scenario), "--seed", "1", "2", f"--timeline={scenario.with_name('t.json')}"]
    assert main(argv) == 2
    assert "--timeline shows one run, not 2" in capsys.readouterr().err


def changed(**sections: object) -> dict[str, Any]:
    return {**SCENARIO, **sections}


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("fleet: [", ("line 1", "not YAML")),
        ("- a\n", ("line 1", "must be a mapping")),
        ("arrivals: {loads: [1]}\n", ("line 1", "'fleet' is missing")),
        ("fleet: reference-4\n", ("line 1", "'arrivals' is missing")),
        ("fleet: reference-4\nfleet: x\n", ("line 2", "fleet is there twice")),
        ("fleet: nowhere\narrivals: {loads: [1]}\n", ("line 1", "fleet", "reference-8")),
        (changed(fleets=1), ("line 29", "unknown key 'fleets'")),
        (changed(workload={"workflow": 3}), ("workload", "'workflow'")),
        (changed(workload={"workflows": 0}), ("workload", "workflows must be")),
        (changed(workload={"kind": "poetry"}), ("workload", "kind", "mac_sql")),
        (changed(workload={"trace": "no.json"}), ("no.json", "cannot be read")),
        (changed(arrivals={"loads": [0.5], "rates": [1]}), ("arrivals", "exactly one of")),
        (changed(arrivals={"loads": [-1]}), ("arrivals", "more than 0")),
        (changed(arrivals={"times_s": [1.0]}), ("line 25", "arrivals: times_s has 1 arr")),
        (changed(arrivals={"times_s": [2.0] * 7 + [1.0]}), ("arrivals", "recorded arrival 8")),
        (changed(deadline={"scale": "long"}), ("deadline", "scale")),
        (changed(policies=["fifo"]), ("policies[0]", "'fifo'")),
        (changed(policies=[{"policy": "paper", "dispatch": {"alpha": 2}}]), ("alpha", "line")),
        (changed(policies=[{"policy": "slack", "engine": {"oder": 1}}]), ("'oder'", "line")),
        (changed(seeds=[1, 1]), ("seeds", "different whole numbers")),
        (changed(fleet=[{"device": "abacus"}]), ("fleet[0]", "A100")),
        (changed(fleet=[{"cost": {"c0": 1}}]), ("fleet[0].cost", "line 2", "c1")),
        (changed(fleet=[{"cost": {**COST, "c0": -1}}]), ("fleet[0].cost", "c0")),
        (changed(fleet=[{"device": "A100", "kv_tokens": 0}]), ("fleet[0]", "kv_tokens")),
        (changed(fleet=[{"device": "A100", "count": 0}]), ("count", "1 to 10000")),
        (changed(simulation={"router_latency_s": -1}), ("simulation", "router_latency_s")),
    ],
)
def test_a_mistake_is_one_sentence_with_file_place_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scenario: str | dict[str, Any],
    words: tuple[str, ...],
) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(
        scenario if isinstance(scenario, str) else yaml.safe_dump(scenario, sort_keys=False)
    )
    assert main(["sim", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert str(tmp_path) in captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--policy", "fifo"], ("policy must be one of", "'fifo'")),
        (["--load", "0"], ("more than 0",)),
        (["--seed", "-1"], ("--seed must be 0 or more",)),
        (["--workflows", "0"], ("workflows must be",)),
        (["--trace", "nowhere.json"], ("nowhere.json cannot be read",)),
        (["--json", "/dev/null/x"], ("/dev/null/x cannot be written",)),
        (["--against", "nowhere.json"], ("nowhere.json",)),
    ],
)
def test_a_bad_option_is_one_sentence(
    scenario: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: tuple[str, ...]
) -> None:
    assert main(["sim", str(scenario), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_a_scenario_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
