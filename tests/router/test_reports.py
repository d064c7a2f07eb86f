"""What engines say of themselves: our snapshots and stock metrics; missing means unknown."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen_vllm.router import reports
from hexgen_vllm.router.reports import Telemetry
from hexgen_vllm.types import EngineReport, StepCost

SNAPSHOT: dict[str, Any] = {
    "order": "slack",
    "cost": {"c0": 0.01, "c1": 0.002, "c2": 0.0, "p0": 0.0, "p1": 0.001, "p2": 0.0},
    "fit_error": 0.07,
    "steps": 1234,
    "running": 3,
    "waiting": 2,
    "kv_usage": 0.5,
    "kv_tokens": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "preemptions": {"displaced": 1, "kv": 2, "reset": 0},
    "prefill_share": 0.25,
    "something_new": [1, 2],
}

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 4.0
vllm:num_requests_waiting{engine="0",model_name="a"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.2
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.4
vllm:num_preemptions_total{engine="0",model_name="a"} 5.0
vllm:num_preemptions_created{engine="0",model_name="a"} 1.7e+09
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="50"} 1.0
"""


def test_our_snapshot() -> None:
    assert reports.from_stats(SNAPSHOT) == Telemetry(
        EngineReport(StepCost(0.01, 0.002, 0.0, 0.0, 0.001, 0.0), 0.07, 3, 2, 0.5, 3, 0.25),
        max_num_seqs=8,
        kv_tokens=4096,
        max_num_batched_tokens=512,
        steps=1234,
    )


@pytest.mark.parametrize("value", [None, "x", -1, float("nan"), float("inf"), [], {}, True])
@pytest.mark.parametrize("key", [k for k in SNAPSHOT if k not in ("order", "something_new")])
def test_what_is_missing_or_odd_is_unknown(key: str, value: object) -> None:
    """And everything else is still read."""
    odd = reports.from_stats({**SNAPSHOT, key: value})
    gone = reports.from_stats({k: v for k, v in SNAPSHOT.items() if k != key})
    assert odd == gone != reports.from_stats(SNAPSHOT)
    assert reports.from_stats({}) == Telemetry(EngineReport())


def test_a_cost_with_a_hole_is_unknown() -> None:
    cost = {k: v for k, v in SNAPSHOT["cost"].items() if k != "p1"}
    assert reports.from_stats({**SNAPSHOT, "cost": cost}).report.cost is None


def test_stock_metrics_add_up_over_ranks() -> None:
    found = reports.from_metrics(METRICS)
    assert found.kv_tokens == 2400
    assert found.report.running == 7
    assert found.report.waiting == 1
    assert found.report.kv_usage == pytest.approx(0.3)
    assert found.report.preemptions == 5
    assert found.report.cost is None


def test_old_and_missing_names() -> None:
    old = METRICS.replace("kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert reports.from_metrics(old).report.kv_usage == pytest.approx(0.3)
    for text in ("", "not metrics at all\n{}", 'vllm:num_requests_running{a="b"} NaN\n'):
        assert reports.from_metrics(text) == Telemetry(EngineReport())
    partly = METRICS.replace('num_gpu_blocks="100"', 'num_gpu_blocks="None"')
    assert reports.from_metrics(partly).kv_tokens is None


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"vllm_config": {"scheduler_config": {"policy": "priority", "max_num_seqs": 8}}},
         ("priority", 8)),
        ({"vllm_config": {"scheduler_config": {"policy": 3}}}, (None, None)),
        ({"vllm_config": "text"}, (None, None)),
        ([], (None, None)),
    ],
)  # fmt: skip
def test_server_info(info: object, expected: tuple[str | None, int | None]) -> None:
    assert reports.scheduling(info) == expected
