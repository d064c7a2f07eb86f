"""What engines say of themselves: our snapshots and stock metrics; missing means unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hexgen_vllm.router.engines import telemetry
from hexgen_vllm.router.engines.telemetry import Telemetry
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

UNKNOWN = Telemetry(EngineReport())

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
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="150"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="150"} 1.0
"""


def snapshot(**changes: Any) -> Telemetry:
    (found,) = telemetry.from_stats({**SNAPSHOT, **changes})
    return found


def test_our_snapshot() -> None:
    assert snapshot() == Telemetry(
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
    (gone,) = telemetry.from_stats({k: v for k, v in SNAPSHOT.items() if k != key})
    assert snapshot(**{key: value}) == gone != snapshot()
    assert telemetry.from_stats({}) == (UNKNOWN,)


def test_a_cost_with_a_hole_is_unknown() -> None:
    cost = {k: v for k, v in SNAPSHOT["cost"].items() if k != "p1"}
    assert snapshot(cost=cost).report.cost is None


def test_our_snapshots_of_several_ranks() -> None:
    ranks = [SNAPSHOT, {**SNAPSHOT, "running": 7}, "broken"]
    assert telemetry.from_stats({"ranks": ranks}) == (snapshot(), snapshot(running=7), UNKNOWN)
    assert telemetry.from_stats({**SNAPSHOT, "ranks": []}) == (snapshot(),)


def test_stock_metrics_tell_ranks_apart() -> None:
    first, second = telemetry.from_metrics(METRICS)
    assert first == Telemetry(EngineReport(None, None, 3, 1, 0.2, 5), kv_tokens=1200)
    assert second == Telemetry(EngineReport(None, None, 4, None, 0.4, None), kv_tokens=1200)


def test_ranks_of_a_node_that_has_not_the_first_ones() -> None:
    text = METRICS.replace('engine="1"', 'engine="10"').replace('engine="0"', 'engine="9"')
    assert telemetry.from_metrics(text) == telemetry.from_metrics(METRICS)


def test_a_long_label_is_read_once() -> None:
    """Tried again from each of its letters, it would hold everything up for hours."""
    (found,) = telemetry.from_metrics("vllm:cache_config_info{" + "a" * 10**6 + "} 1\n")
    assert found.kv_tokens is None


def test_ranks_together() -> None:
    both = telemetry.together(telemetry.from_metrics(METRICS))
    assert both.kv_tokens == 2400
    assert both.report.kv_usage == pytest.approx(0.3)
    assert replace(both.report, kv_usage=None) == EngineReport(running=7)
    assert telemetry.together((snapshot(),)) == snapshot()
    pair = telemetry.together((snapshot(), snapshot(max_num_seqs=4)))
    assert (pair.max_num_seqs, pair.steps, pair.max_num_batched_tokens) == (12, 2468, 1024)
    assert (pair.report.preemptions, pair.report.cost) == (6, None)


def test_old_and_missing_names() -> None:
    old = METRICS.replace("kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert telemetry.from_metrics(old) == telemetry.from_metrics(METRICS)
    for text in ("", "not metrics at all\n{}", 'vllm:num_requests_running{a="b"} NaN\n'):
        assert telemetry.from_metrics(text) == ()
    unlabelled = telemetry.from_metrics("vllm:num_requests_running 3.0\n")
    assert unlabelled == (Telemetry(EngineReport(running=3)),)
    partly = METRICS.replace('num_gpu_blocks="150"', 'num_gpu_blocks="None"', 1)
    assert [one.kv_tokens for one in telemetry.from_metrics(partly)] == [None, 1200]
    assert telemetry.together(telemetry.from_metrics(partly)).kv_tokens is None


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
    assert telemetry.scheduling(info) == expected
