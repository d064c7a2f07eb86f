"""Policies in scenario files: which of their parts an entry may set."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.scenario_file import load


def write(tmp_path: Path, entry: str) -> Path:
    path = tmp_path / "scenario.yaml"
    text = f"fleet: reference-4\narrivals: {{loads: [0.5]}}\npolicies:\n  - {entry}\n"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("order", ["fcfs", "edf", "slack", "paper"])
def test_an_entry_sets_the_order_inside_our_engines(tmp_path: Path, order: str) -> None:
    path = write(tmp_path, f"{{policy: slack, engine: {{order: {order}, displace: false}}}}")
    (policy,) = load(path).policies
    assert (policy.engine.order, policy.engine.displace) == (order, False)


def test_other_options_leave_the_order_of_the_policy(tmp_path: Path) -> None:
    path = write(tmp_path, "{policy: paper, engine: {displace: false}}")
    (policy,) = load(path).policies
    assert policy.engine.order == "paper"


def test_stock_engines_take_no_order_from_us(tmp_path: Path) -> None:
    path = write(tmp_path, "{policy: least_outstanding+fcfs, engine: {order: slack}}")
    with pytest.raises(ConfigError, match=r"least_outstanding\+fcfs has an order of its own"):
        load(path)


@pytest.mark.timeout(300)
def test_demoted_calls_that_age_while_they_are_left_out_go_on(tmp_path: Path) -> None:
    path = tmp_path / "overload.yaml"
    path.write_text(
        "fleet: reference-4\n"
        "workload: {workflows: 60, warmup: 0}\n"
        "arrivals: {loads: [4.0]}\n"
        "deadline: {scale: 1.5}\n"
        "policies:\n"
        "  - {policy: slack, dispatch: {overload: protect, reject_at_entry: false},"
        " engine: {background_max_wait_s: 5}}\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    assert main(["sim", str(path)]) == 0
