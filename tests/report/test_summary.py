"""Figures of a run, each against its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.records import CallRecord, WorkflowRecord
from hexgen_vllm.report.summary import (
    attainment,
    goodput,
    min_deadline,
    percentile,
    spread,
    stage_figures,
    summarise,
)

values = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)
shares = st.floats(0.01, 1.0)


def flow(
    latency_s: float | None, *, arrived_s: float = 0.0, error: str | None = None
) -> WorkflowRecord:
    return WorkflowRecord("w", arrived_s, 10.0, latency_s, error)


def call(stage: str = "revise", **changes: object) -> CallRecord:
    fields: dict[str, object] = {
        "workflow_id": "w",
        "stage": stage,
        "sent_s": 0.0,
        "latency_s": 2.0,
        "prompt_tokens": 10,
        "output_tokens": 5,
    }
    return CallRecord(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "value"), [(0.05, 1), (0.5, 10), (0.51, 11), (0.95, 19), (0.96, 20), (1.0, 20)]
)
def test_percentiles_are_nearest_ranks(share: float, value: float) -> None:
    assert percentile(list(range(20, 0, -1)), share) == value


@given(values=values, share=shares)
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    needed = share * len(values) - 1e-6
    assert found in values
    assert sum(v <= found for v in values) >= needed
    smaller = [v for v in values if v < found]
    assert not smaller or sum(v <= max(smaller) for v in values) < needed + 1e-5


def test_percentiles_of_nothing_are_nan_and_bad_shares_are_refused() -> None:
    assert math.isnan(percentile([], 0.5))
    for share in (0.0, 1.01, -1.0):
        with pytest.raises(ValueError, match="share"):
            percentile([1.0], share)


@given(values=values, share=shares)
def test_the_min_deadline_is_met_by_the_share_and_nothing_below_it_is(
    values: list[float], share: float
) -> None:
    found = min_deadline(values, share, 2.0)
    assert attainment(values, found.seconds) >= share - 1e-6
    below = math.nextafter(found.seconds, -math.inf)
    assert attainment(values, below) < share + 1e-6
    assert found.scale == found.seconds / 2.0


def test_workflows_that_did_not_finish_meet_no_deadline() -> None:
    latencies = [1.0] * 18 + [None, 7.0]
    assert min_deadline(latencies, 0.95, 1.0).seconds == 7.0
    assert min_deadline(latencies, 0.96, 1.0).seconds == math.inf
    assert attainment(latencies, 1e9) == 0.95
    assert math.isnan(attainment([], 1.0))
    with pytest.raises(ValueError, match="base_s"):
        min_deadline(latencies, 0.5, 0.0)


def test_goodput_counts_only_what_is_on_time() -> None:
    assert goodput([flow(10.0), flow(10.1), flow(None), flow(1.0)], 4.0) == 0.5
    assert math.isnan(goodput([], 0.0))


def test_spread_over_seeds() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.least, found.most, found.seeds) == (2.0, 1.0, 3.0, 3)
    assert found.deviation == pytest.approx(math.sqrt(2 / 3))
    assert spread([1.0, math.inf]).mean == math.inf
    assert math.isnan(spread([1.0, math.inf]).deviation)
    assert spread([]).seeds == 0


def test_a_run_is_summed_up_with_failed_and_lost_counted_late() -> None:
    flows = [flow(float(k), arrived_s=float(k)) for k in range(1, 18)]
    flows += [flow(None, error="HTTP 500"), flow(None), flow(10.0)]
    calls = [call(ttft_s=0.1), call(ttft_s=0.3), call(error="HTTP 500"), call()]
    found = summarise(flows, calls, policy="slack", seed=3, rate=0.5, base_s=5.0)
    assert (found.workflows, found.on_time, found.errors, found.lost) == (20, 11, 1, 1)
    assert (found.p50_s, found.p95_s, found.p99_s) == (9.0, 17.0, 17.0)
    assert found.min_deadline_95_s == math.inf
    assert found.min_deadline_99_x == math.inf
    assert (found.ttft_p50_s, found.ttft_p95_s, found.answered_calls) == (0.1, 0.3, 3)
    assert found.goodput_per_s == pytest.approx(11 / 34)
    assert (found.policy, found.seed, found.rate) == ("slack", 3, 0.5)


def test_a_run_without_an_answer_has_no_latencies() -> None:
    found = summarise([flow(None)], [], policy="p", seed=0, rate=1.0, base_s=1.0)
    assert math.isnan(found.p50_s)
    assert math.isnan(found.ttft_p95_s)
    assert (found.on_time, found.lost) == (0, 1)


def test_stage_figures_count_engines_and_errors() -> None:
    calls = [
        call("revise", engine="a", ttft_s=0.2),
        call("revise", engine="b", latency_s=4.0),
        call("revise", engine="b", latency_s=6.0),
        call("evaluate", error="HTTP 503"),
    ]
    found = stage_figures(calls)
    assert list(found) == ["evaluate", "revise"]
    assert found["revise"]["engines"] == {"a": 1, "b": 2}
    assert found["revise"]["latency_p50_s"] == 4.0
    assert found["revise"]["ttft_p95_s"] == 0.2
    assert (found["evaluate"]["calls"], found["evaluate"]["errors"]) == (0, 1)


@pytest.mark.parametrize(
    ("record", "on_time", "lost"),
    [
        (flow(10.0), True, False),
        (flow(10.001), False, False),
        (flow(None), False, True),
        (flow(None, error="refused"), False, False),
    ],
)
def test_what_a_workflow_counts_as(record: WorkflowRecord, on_time: bool, lost: bool) -> None:
    assert (record.on_time, record.lost) == (on_time, lost)
