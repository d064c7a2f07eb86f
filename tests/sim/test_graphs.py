"""Think times, calls that wait for named others, own deadlines, recorded arrivals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.calls import Tail
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.limits import uncontended
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.simulator import SimOptions, Simulation, true_tails
from hexgen_vllm.sim.workloads.workload import CallSpec, Layer, WorkflowSpec
from hexgen_vllm.types import StepCost

# Prefill takes 1 ms a token and a decode step 10 ms, whatever else there is.
COST = StepCost(c0=0.01, c1=0.0, c2=0.0, p0=0.0, p1=1e-3, p2=0.0)
ENGINE = EngineModel("e", COST, max_num_seqs=8, kv_tokens=100_000)
EXACT = SimOptions(router_latency_s=0.0, step_noise=0.0, rates="true")


def call(stage: str, think_s: float = 0.0, after: tuple[int, ...] | None = None) -> CallSpec:
    return CallSpec(stage, 100, 11, (), think_s, after)


def ended(
    spec: WorkflowSpec, policy: str = "slack"
) -> tuple[dict[str, tuple[float, float]], float]:
    """Return when each call was sent and ended, and how long the workflow took."""
    simulation = Simulation([ENGINE], named(policy), lambda _: 1e3, EXACT)
    simulation.run([spec])
    calls = {c.stage: (c.sent_s, c.sent_s + c.latency_s) for c in simulation.calls}
    latency_s = simulation.workflows[0].latency_s
    assert latency_s is not None
    return calls, latency_s


@pytest.mark.parametrize("policy", ["slack", "oracle", "least_outstanding+edf"])
def test_a_call_is_sent_when_its_think_time_is_over(policy: str) -> None:
    stages = ((call("a", 2.0),), (call("b", 7.5), call("c", 0.5)))
    calls, latency_s = ended(WorkflowSpec("w", "t", stages), policy)
    assert calls["a"][0] == pytest.approx(2.0)
    assert calls["b"][0] == pytest.approx(calls["a"][1] + 7.5)
    assert calls["c"][0] == pytest.approx(calls["a"][1] + 0.5)
    assert latency_s == pytest.approx(calls["b"][1])


@pytest.mark.parametrize("policy", ["slack", "least_outstanding+edf"])
@pytest.mark.parametrize("think_s", [0.0, 1e8])
def test_years_without_calls_are_passed_over(policy: str, think_s: float) -> None:
    stages = ((call("a"),), (call("b", think_s),))
    workflows = [replace(WorkflowSpec(f"w{n}", "t", stages), arrival_s=n * 1e8) for n in (1, 2, 3)]
    simulation = Simulation([ENGINE], named(policy), lambda _: 1e9, EXACT)
    simulation.run(workflows)
    assert [w.latency_s for w in simulation.workflows] == pytest.approx([0.42 + think_s] * 3)
    assert simulation.events < 20_000


@pytest.mark.parametrize("policy", ["slack", "oracle", "wlcaff+fcfs"])
def test_calls_of_a_graph_wait_for_those_they_name_only(policy: str) -> None:
    stages = (
        (call("a"), call("slow", 30.0)),
        (call("b", 1.0, (0,)), call("end", 0.0, (0, 1))),
        (call("c", 0.0, (2,)),),
    )
    calls, latency_s = ended(WorkflowSpec("w", "t", stages), policy)
    assert calls["c"][1] < calls["slow"][0], "it does not wait for the group before it"
    assert calls["b"][0] == pytest.approx(calls["a"][1] + 1.0)
    assert calls["end"][0] == pytest.approx(calls["slow"][1])
    assert latency_s == pytest.approx(calls["end"][1])


def test_a_failed_call_ends_a_workflow_whatever_else_thinks() -> None:
    too_long = CallSpec("long", 200_000, 5, (), 0.0, None)
    spec = WorkflowSpec("w", "t", ((too_long, call("a", 5.0)), (call("b", 0.0, (1,)),)))
    simulation = Simulation([ENGINE], named("slack"), lambda _: 1e3, EXACT)
    simulation.run([spec])
    (record,) = simulation.workflows
    assert record.error == "too-long"
    assert [c.stage for c in simulation.calls] == ["long"]


def test_true_paths_follow_the_graph() -> None:
    stages = ((call("a"), call("b")), (call("c", 0.0, (0,)),), (call("d", 0.0, (2,)),))
    tails = true_tails(WorkflowSpec("w", "t", stages))
    assert tails["a", 0] == Tail(2, 200, 22)
    assert tails["b", 0] == Tail(0, 0, 0)


def test_a_call_cannot_wait_for_a_later_one() -> None:
    with pytest.raises(ConfigError, match="waits for one that comes later"):
        WorkflowSpec("w", "t", ((call("a", 0.0, (1,)), call("b")),))
    with pytest.raises(ConfigError, match="think time"):
        call("a", -1.0)


def test_an_own_deadline_multiplies_work_and_not_thinking() -> None:
    layer = Layer("workflow:w", 60)
    first = CallSpec("a", 100, 11, (layer,))
    spec = WorkflowSpec("w", "t", ((first,), (replace(first, think_s=9.0),)))
    alone = uncontended([ENGINE], spec)
    _, latency_s = ended(spec)
    assert alone.total_s == pytest.approx(latency_s, rel=0.15), "the second prompt is half cached"
    assert alone.total_s - alone.work_s == pytest.approx(9.0)
    assert alone.deadline_s(3.0) == pytest.approx(9.0 + 3.0 * alone.work_s)
    assert alone.scale(alone.deadline_s(1.7)) == pytest.approx(1.7)


def scenario(tmp_path: Path, **sections: object) -> Path:
    engine = {
        "name": "e",
        "cost": {k: getattr(COST, k) for k in ("c0", "c1", "c2", "p0", "p1", "p2")},
    }
    rows = [
        {
            "timestamp": 900 * n * (1 + n % 3),
            "input_length": 300,
            "output_length": 10,
            "hash_ids": [n],
        }
        for n in range(60)
    ]
    rows.sort(key=lambda row: row["timestamp"])  # type: ignore[arg-type,return-value]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: dict[str, object] = {
        "fleet": [{**engine, "kv_tokens": 50_000}, {**engine, "name": "f", "kv_tokens": 50_000}],
        "workload": {"trace": "trace.jsonl", "workflows": 20, "order": "recorded"},
        "arrivals": {"pattern": "recorded"},
        "deadline": {"by": "own", "scale": 3.0},
        "policies": ["slack", "wlcaff+edf"],
        **sections,
    }
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def test_a_scenario_plays_a_trace_with_own_deadlines_and_recorded_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["sim", str(scenario(tmp_path)), f"--json={out}"]) == 0
    assert "own time alone" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["policy"] for row in rows} == {"slack", "wlcaff+edf"}
    for row in rows:
        assert row["min_deadline_95_x"] >= 0.9
        assert row["min_deadline_95_s"] is None
        assert row["arrivals_s"][:3] == [0.0, 1.8, 2.7]
        assert 0 < row["deadline_s"] < 60


def test_recorded_gaps_are_stretched_to_a_rate(tmp_path: Path) -> None:
    path = scenario(tmp_path, arrivals={"pattern": "recorded", "rates": [2.0]})
    found = load(path)
    (run, _) = found.runs(found.limits().rate_per_s)
    times = [spec.arrival_s for spec in found.specs(run)]
    assert len(times) / (times[-1] - times[0]) == pytest.approx(2.0)
    assert times[2] / times[1] == pytest.approx(2.7 / 1.8)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"workload": {"workflows": 20}}, ("pattern recorded needs a trace",)),
        ({"arrivals": {}}, ("exactly one of loads, rates and times_s",)),
        ({"arrivals": {"pattern": "recorded", "times_s": [0.0]}}, ("pattern recorded takes",)),
        ({"workload": {"trace": "trace.jsonl", "format": "mooncak"}}, ("workload", "mooncake")),
        ({"workload": {"trace": "absent.jsonl", "order": "recorded"}}, ("absent.jsonl",)),
    ],
)
def test_a_bad_section_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, object],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    assert main(["sim", str(scenario(tmp_path, **sections))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_plot_needs_one_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", str(scenario(tmp_path)), f"--plot={tmp_path / 'p.png'}"]) == 2
    assert "one deadline" in capsys.readouterr().err
