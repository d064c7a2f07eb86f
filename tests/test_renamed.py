"""``hexgen``, as the paper's policy and order were called, still means ``paper`` everywhere."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm import cluster, option
from hexgen_vllm.cli import main
from hexgen_vllm.cluster.commands import engine_command, router_command
from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.demo import DemoOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results
from hexgen_vllm.router.main import add_arguments, options_from
from hexgen_vllm.sim.command import _changed
from hexgen_vllm.sim.command import add_arguments as add_sim_arguments
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.tune.command import TuneOptions
from hexgen_vllm.tune.command import add_arguments as add_tune_arguments

URL = "http://10.0.0.1:8000"
OLD_POLICY = (
    "the policy and order hexgen is now called paper; the old name goes with the next release."
)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Warnings come once in a process; here once in each test."""
    option._warn.cache_clear()
    yield
    option._warn.cache_clear()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [
        record.getMessage() for record in caplog.records if record.levelname == "WARNING"
    ]


def routed(line: str) -> DispatchOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(line.split()), {})[1]


def test_todays_names_give_no_warning(warned: Callable[[], list[str]]) -> None:
    assert routed(f"--worker-urls {URL} --policy paper --paper-form paper").paper_form == "paper"
    option.from_mapping(EngineOptions, {"order": "paper"})
    assert warned() == []


def test_the_routers_flags(warned: Callable[[], list[str]]) -> None:
    found = routed(f"--worker-urls {URL} --policy hexgen --hexgen-form paper")
    assert (found.policy, found.paper_form) == ("paper", "paper")
    assert sorted(warned()) == [
        "--hexgen-form is now called --paper-form; the old name goes with the next release.",
        OLD_POLICY,
    ]


def test_help_names_only_todays_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["router", "--help"])
    text = capsys.readouterr().out
    assert "--paper-form" in text
    assert "--hexgen-form" not in text


def test_a_wrong_word_under_an_old_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routed(f"--worker-urls {URL} --hexgen-form verse")
    assert "verse" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["hexgen-form", "hexgen_form"])
def test_the_routers_file(tmp_path: Path, warned: Callable[[], list[str]], key: str) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(f"worker-urls: [{URL}]\npolicy: hexgen\n{key}: paper\n")
    found = routed(f"--config {path}")
    assert (found.policy, found.paper_form) == ("paper", "paper")
    assert len(warned()) == 2
    assert routed(f"--config {path} --paper-form code").paper_form == "code"
    assert routed(f"--config {path} --policy slack").policy == "slack"


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("hexgen-form: paper\npaper-form: code\n")
    with pytest.raises(ConfigError, match=r"router\.yaml line .*hexgen_form is the earlier name"):
        routed(f"--config {path} --worker-urls {URL}")


def test_a_wrong_value_under_an_old_key_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text("policy: slack\nhexgen-form: verse\n")
    with pytest.raises(ConfigError, match=r"line 2: .*code, paper"):
        routed(f"--config {path} --worker-urls {URL}")


def test_a_scenario_file_and_the_simulators_command_line(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("""
fleet: reference-4
arrivals: {loads: [0.5]}
policies:
  - hexgen
  - {policy: hexgen, name: with form, dispatch: {hexgen_form: paper}, engine: {order: hexgen}}
  - {policy: slack, engine: {order: hexgen}}
""")
    scenario = load(path)
    assert [one.name for one in scenario.policies] == ["paper", "with form", "slack"]
    assert [one.engine.order for one in scenario.policies] == ["paper"] * 3
    assert scenario.policies[1].dispatch.paper_form == "paper"
    assert len(warned()) == 2
    parser = argparse.ArgumentParser()
    add_sim_arguments(parser)
    argv = [str(path), "--policy", "hexgen", "with form"]
    chosen = _changed(scenario, parser.parse_args(argv)).policies
    assert chosen == scenario.policies[:2]


def test_an_entry_of_a_scenario_without_a_name_is_called_as_today(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    entry = "{policy: hexgen, dispatch: {alpha: 0.4}}"
    path.write_text(f"fleet: reference-4\narrivals: {{loads: [0.5]}}\npolicies: [{entry}]\n")
    (policy,) = load(path).policies
    assert (policy.name, policy.dispatch.policy, policy.dispatch.alpha) == ("paper", "paper", 0.4)


@pytest.mark.parametrize("name", ["hexgen", "paper"])
def test_a_policy_by_name(name: str) -> None:
    found = named(name)
    assert (found.name, found.dispatch.policy, found.engine.order) == ("paper", "paper", "paper")
    assert not found.learns_rates


def test_an_order_behind_a_plus() -> None:
    found = named("examples/policies/wlcaff.py:Wlcaff+hexgen")
    assert (found.name[-6:], found.engine.order) == ("+paper", "paper")


def test_a_cluster_file(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("""
engines: [{name: a, model: m, hexgen: {order: hexgen}}]
router: {policy: hexgen, hexgen-form: paper}
""")
    spec = cluster.load(path)
    (engine,), router = spec.engines, spec.router
    assert router is not None
    assert router.policy == "paper"
    assert len(warned()) == 2
    assert "--hexgen-order=paper" in engine_command(engine, 1)
    command = router_command(router, 1, [], 1.0)
    assert {"--policy=paper", "--paper-form=paper"} <= set(command)


def test_options_of_engines(warned: Callable[[], list[str]]) -> None:
    parser = argparse.ArgumentParser()
    option.add_arguments(parser, EngineOptions, prefix="hexgen-")
    args = parser.parse_args(["--hexgen-order", "hexgen"])
    assert option.given(args, EngineOptions, prefix="hexgen-") == {"order": "paper"}
    assert option.from_mapping(EngineOptions, {"order": "hexgen"}).order == "paper"
    assert warned() == [OLD_POLICY]  # once, however often it is said


def test_the_tuner_and_the_demo() -> None:
    parser = argparse.ArgumentParser()
    add_tune_arguments(parser)
    args = parser.parse_args(["--fleet", "f", "--policy", "hexgen", "--baseline", "hexgen"])
    assert (args.policy, args.baseline) == ("paper", "paper")
    assert option.from_mapping(TuneOptions, {"policy": "hexgen"}).policy == "paper"
    assert DemoOptions(policies=("hexgen", "slack")).policies == ("paper", "slack")


def test_recorded_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows: list[dict[str, Any]] = [
        {"policy": name} for name in ("hexgen", "hexgen a=0.4", "slack", "hexgenerous")
    ]
    path.write_text(json.dumps(rows))
    assert [row["policy"] for row in results.read(path)] == [
        "paper", "paper a=0.4", "slack", "hexgenerous",
    ]  # fmt: skip


def test_a_warning_is_one_line_of_a_command_and_not_in_its_table(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("fleet: reference-4\narrivals: {rates: [1]}\nworkload: {workflows: 3}\n")
    command = [sys.executable, "-m", "hexgen_vllm", "sim", str(path), "--policy", "hexgen"]
    done = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines().count(OLD_POLICY) == 1
    assert "hexgen" not in done.stdout
    assert "paper" in done.stdout
