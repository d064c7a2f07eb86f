"""The command line of ``hexgen-vllm tune``, on a fleet and a workload that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hexgen_vllm.cli import main
from hexgen_vllm.recent import RecentCall, RecentWorkflow, Ring
from hexgen_vllm.router.main import read_options
from hexgen_vllm.sim.scenario_file import load

FAST = ["--workflows=30", "--warmup=0", "--seed", "1", "2"]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    cost = {"c0": 0.02, "c1": 1e-4, "c2": 0, "p0": 0, "p1": 2e-4, "p2": 0}
    slow = {key: 4 * value for key, value in cost.items()}
    engines = [
        {"name": name, "cost": c, "max_num_seqs": 4, "kv_tokens": 40_000}
        for name, c in (("fast", cost), ("slow", slow))
    ]
    path.write_text(yaml.safe_dump({"fleet": engines}))
    return path


@pytest.fixture
def recent(tmp_path: Path) -> Path:
    ring = Ring()
    for i in range(40):
        calls = tuple(RecentCall("think", float(k), 1.0, 500 + i, 20, 300) for k in range(3))
        ring.add(RecentWorkflow("loop", 0.7 * i, calls, deadline_s=8.0, latency_s=3.0))
    path = tmp_path / "recent.jsonl"
    path.write_text(ring.text())
    return path


def test_it_proposes_a_configuration_that_simulator_and_router_take(
    fleet: Path, recent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "proposed.yaml", tmp_path / "tuning.json"
    router = tmp_path / "router.yaml"
    argv = ["tune", f"--fleet={fleet}", f"--trace={recent}", "--policy=paper", "--grid=3", *FAST]
    argv += [f"--out={out}", f"--router-out={router}", f"--json={data}"]
    assert main([*argv, "--baseline=round_robin+fcfs"]) == 0
    text = capsys.readouterr().out
    assert "at 1.429/s" in text  # the recorded rate
    assert "deadline 8.0 s" in text
    (row,) = json.loads(data.read_text())
    assert row["simulations"] == 2 * 4
    assert row["baseline"]["deadline_ratio_95%"] > 0
    proposed = yaml.safe_load(out.read_text())
    assert proposed["policies"][0]["dispatch"]["alpha"] == row["proposed"]["alpha"]
    scenario = tmp_path / "scenario.yaml"
    rest = {"arrivals": {"rates": [1.0]}, "policies": proposed["policies"]}
    scenario.write_text(yaml.safe_dump({**yaml.safe_load(fleet.read_text()), **rest}))
    assert load(scenario).policies[0].dispatch.alpha == row["proposed"]["alpha"]
    _, dispatch = read_options(router)
    assert dispatch == {"policy": "paper", "alpha": row["proposed"]["alpha"]}
    assert proposed["router"] == f"--policy paper --alpha {row['proposed']['alpha']:g}"


def test_equal_tunings_are_equal(fleet: Path, recent: Path, tmp_path: Path) -> None:
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    argv = ["tune", f"--fleet={fleet}", f"--trace={recent}", "--budget=6", *FAST]
    for path in files:
        assert main([*argv, f"--json={path}"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_plot_is_drawn(fleet: Path, recent: Path, tmp_path: Path) -> None:
    plot = tmp_path / "tune.png"
    argv = ["tune", f"--fleet={fleet}", f"--trace={recent}", "--budget=6", *FAST]
    assert main([*argv, "--knobs", "externality", f"--plot={plot}"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate=1", "--load=0.5"], "rate and load cannot both be given"),
        (["--grid=3"], "grid takes exactly one knob"),
        (["--knobs", "alpha"], "'alpha' is not a knob of slack"),
        (["--objective=tenants", "--weight", "b"], "--weight must be NAME=NUMBER"),
        (["--dispatch", "speed=1"], "unknown placement option 'speed'"),
        (["--seed", "1", "1"], "--seed must be different"),
    ],
)
def test_a_bad_option_is_one_sentence(
    fleet: Path, recent: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["tune", f"--fleet={fleet}", f"--trace={recent}", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("fleet", "fleet: [{device: abacus}]", ("fleet.yaml line 1", "fleet[0]", "A100")),
        ("fleet", "fleet:\n- {cost: {c0: x}}", ("fleet.yaml line 2", "fleet[0].cost", "c0")),
        ("fleet", "engines: []", ("fleet.yaml line 1", "'fleet' is missing")),
        ("recent", "\n{}\n", ("recent.jsonl, line 2", '"type" is missing')),
        ("recent", "", ("recent.jsonl holds no workflow",)),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_place(
    fleet: Path,
    recent: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    words: tuple[str, ...],
) -> None:
    {"fleet": fleet, "recent": recent}[name].write_text(text)
    assert main(["tune", f"--fleet={fleet}", f"--trace={recent}"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert error.count("\n") == 1


def test_a_workload_without_times_needs_a_rate(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", f"--fleet={fleet}"]) == 2
    assert "give --rate or --load" in capsys.readouterr().err


def test_sustained_rates_end_at_the_capacity(
    fleet: Path, recent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "tuning.json"
    argv = ["tune", f"--fleet={fleet}", f"--trace={recent}", "--policy=paper", "--grid=2", *FAST]
    argv += ["--deadline-s=20", "--baseline=round_robin+fcfs", "--sustained", f"--json={data}"]
    assert main(argv) == 0
    found = json.loads(data.read_text())[0]["baseline"]
    worse, better = found["sustained_per_s"]
    assert 0 < worse <= better <= found["capacity_per_s"]
    assert f"rate_ratio: {found['rate_ratio']}" in capsys.readouterr().out
