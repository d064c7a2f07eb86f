"""Live runs played again: what is taken from them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.bench.scenario import LiveConfig
from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim import against
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.results import row, simulate
from hexgen_vllm.sim.scenario import ScenarioRun

FLEET = fleet("reference-4")


def a_live_row(**changes: Any) -> dict[str, Any]:
    """Return the row of a live run on an ideal machine: a simulated one under a live name."""
    config = LiveConfig(policy="paper", seed=3, workflows=12, warmup=2, rate=0.3, deadline_s=120.0)
    specs = config.specs()
    live = {
        "policy": "paper",
        "seed": 3,
        "rate": 0.3,
        "workflows": 12,
        "warmup": 2,
        "workload": "text2sql/skewed",
        "length_scale": 1.0,
        "burstiness": 1.0,
        "deadline_s": 120.0,
        "latencies_s": [1.0] * 12,
        "arrivals_s": [spec.arrival_s for spec in specs[2:]],
    }
    scenario = against.scenario_of(live, FLEET)
    run = ScenarioRun(scenario.policies[0], 0.3, 0.0, 3)
    bounds = scenario.limits(specs)
    ideal = row(scenario, run, bounds, simulate(scenario, run, bounds, specs))
    return {**live, "latencies_s": ideal["latencies_s"], **changes}


def test_an_ideal_live_run_has_no_error() -> None:
    (one,) = against.compare([a_live_row()], FLEET)
    assert (one.error("P50"), one.error("P95")) == (0.0, 0.0)


def test_errors_are_relative_to_the_live_run() -> None:
    slower = [2 * v for v in a_live_row()["latencies_s"]]
    (one,) = against.compare([a_live_row(latencies_s=slower)], FLEET)
    assert one.error("P50") == pytest.approx(-0.5)
    assert "-50.0%" in against.comparison_table([one])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "arrivals of a live run are not those of its seed"),
        ({"rate": None}, "lacks rate"),
        ({"policy": "mine"}, "say with --policy"),
        ({"hints": "all"}, "hints cannot be simulated"),
    ],
)
def test_what_cannot_be_played_again_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        against.compare([a_live_row(**changes)], FLEET)


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, known = tmp_path / "live.json", tmp_path / "fleet.yaml"
    live.write_text(json.dumps([a_live_row(policy="mine")]))
    known.write_text("fleet: reference-4\n")
    out = tmp_path / "simulated.json"
    argv = ["sim", str(known), f"--against={live}", "--policy", "paper", f"--json={out}"]
    assert main(argv) == 0
    assert "P50 within 0.0% (goal 10%)" in capsys.readouterr().out
    assert json.loads(out.read_text())[0]["policy"] == "paper"
