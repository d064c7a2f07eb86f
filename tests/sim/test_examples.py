"""The scenarios that ship with the package can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.sim.scenario_file import load

SCENARIOS = sorted((Path(__file__).resolve().parents[2] / "examples/scenarios").glob("*.yaml"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_shipped_scenario_is_sound(path: Path) -> None:
    scenario = load(path)
    assert len(scenario.fleet) >= 2
    assert len(scenario.runs(1.0)) >= len(scenario.policies) * len(scenario.seeds)


def test_there_are_scenarios() -> None:
    assert {"reference", "paper", "paper-speeds"} <= {path.stem for path in SCENARIOS}
