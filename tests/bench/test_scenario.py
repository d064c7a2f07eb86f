"""What a live run plays, what its result says, and which options are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from hexgen_vllm.bench.scenario import LiveConfig, LiveResult
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.sim.workloads.workload import WorkflowSpec

CONFIG = LiveConfig("http://h:1", "slack", seed=4, run_id="r", workflows=40, rate=2.0)


def gaps(specs: tuple[WorkflowSpec, ...]) -> list[float]:
    return [b.arrival_s - a.arrival_s for a, b in pairwise(specs)]


def test_the_seed_determines_what_is_played() -> None:
    assert CONFIG.specs() == CONFIG.specs()
    assert CONFIG.specs() == replace(CONFIG, policy="other", url="http://x", run_id="s").specs()
    assert CONFIG.specs() != replace(CONFIG, seed=5).specs()


def test_arrivals_have_the_rate_and_can_come_in_bursts() -> None:
    poisson = gaps(replace(CONFIG, workflows=3000).specs())
    assert fmean(poisson) == pytest.approx(0.5, rel=0.06)
    bursts = gaps(replace(CONFIG, workflows=3000, burstiness=3.0).specs())
    assert fmean(bursts) == pytest.approx(0.5, rel=0.2)
    assert pstdev(bursts) > 2 * pstdev(poisson)


def test_the_warm_up_comes_first_and_on_top() -> None:
    warmed = replace(CONFIG, warmup=10).specs()
    assert len(warmed) == 50
    assert warmed[:40] == CONFIG.specs()


def test_lengths_are_scaled() -> None:
    small = replace(CONFIG, length_scale=0.1).specs()
    ratio = sum(s.prompt_tokens for s in small) / sum(s.prompt_tokens for s in CONFIG.specs())
    assert ratio == pytest.approx(0.1, rel=0.01)


def test_a_trace_replaces_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    step = {"step": "revise", "input_length": 100, "output_length": 7}
    path.write_text(json.dumps([{"Text2SQLRequest": [step]}]))
    specs = replace(CONFIG, trace=str(path)).specs()
    assert {call.prompt_tokens for spec in specs for call in spec.calls()} == {100}
    assert len({spec.workflow_id for spec in specs}) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate must be at least"),
        ({"rate": float("nan")}, "rate must be finite"),
        ({"workflows": 0}, "workflows must be at least 1"),
        ({"deadline_s": -1.0}, "deadline_s must be at least"),
        ({"length_scale": 0.0}, "length_scale must be at least"),
        ({"hints": "some"}, "hints must be one of none, output, all"),
        ({"url": "localhost:8000"}, "url must start with http"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_urls_may_be_written_as_clients_write_them(url: str) -> None:
    assert LiveConfig(url).url == "http://h:1"


def test_runs_get_prompts_of_their_own() -> None:
    assert LiveConfig("http://h:1").run_id != LiveConfig("http://h:1").run_id


def result() -> LiveResult:
    flows = [WorkflowRecord(f"w{k}", k, 30.0, 1.5 * k) for k in range(1, 40)]
    flows.append(WorkflowRecord("w40", 40.0, 30.0, None, "revise: HTTP 500: boom"))
    calls = (
        CallRecord("w1", "revise", 1.0, 0.5, 10, 5, 0.1, "fast"),
        CallRecord("w2", "revise", 1.0, 0.5, 10, 5, 0.3, "slow"),
    )
    return LiveResult(CONFIG, tuple(flows), calls)


def test_a_row_has_what_tables_and_other_tools_read() -> None:
    row = result().row()
    expected = {
        "policy": "slack",
        "workflows": 40,
        "on_time": 20,
        "p50_s": 30.0,
        "p95_s": 57.0,
        "p99_s": 58.5,
        "min_deadline_95_s": 57.0,
        "min_deadline_99_s": None,
        "ttft_p50_s": 0.1,
        "ttft_p95_s": 0.3,
        "errors": 1,
        "lost": 0,
        "seed": 4,
        "rate": 2.0,
        "error_messages": {"revise: HTTP 500: boom": 1},
    }
    assert {key: row[key] for key in expected} == expected
    assert row["latencies_s"][0] == 1.5
    assert row["latencies_s"][-1] is None
    assert row["calls"]["engines"] == {"fast": 1, "slow": 1}
    assert row["calls"]["stages"]["revise"]["calls"] == 2
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_deadlines_are_multiples_of_the_base_slo() -> None:
    assert result().row()["min_deadline_95_x"] == 1.9
    based = replace(result(), config=replace(CONFIG, base_s=5.7))
    assert based.row()["min_deadline_95_x"] == 10.0


def test_secrets_stay_out_of_results() -> None:
    secret = replace(result(), config=replace(CONFIG, api_key="hush"))
    assert "hush" not in json.dumps(secret.row())
