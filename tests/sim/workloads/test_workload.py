"""Values of a workload: sharing, scaling, arrivals, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import quantiles
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    Layer,
    WorkflowSpec,
    gamma_bursts,
    generator,
    poisson,
    recorded,
    renamed,
    scaled,
    timed,
)

LAYERS = (Layer("template:revise", 300), Layer("schema:1", 120), Layer("workflow:w", 20))
CALL = CallSpec("revise", 500, 80, LAYERS)
FLOW = WorkflowSpec("w", "text2sql", ((CALL,), (CALL, replace(CALL, prompt_tokens=460))))


def test_a_call_divides_into_shared_and_own_tokens() -> None:
    assert CALL.shared_tokens == 440
    assert CALL.own_tokens == 60


def test_a_workflow_sums_its_calls() -> None:
    assert FLOW.prompt_tokens == 500 + 500 + 460
    assert FLOW.output_tokens == 240
    assert len(list(FLOW.calls())) == 3


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (-1, 5)])
def test_empty_calls_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="revise"):
        CallSpec("revise", *lengths)


def test_layers_longer_than_the_prompt_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than its prompt"):
        CallSpec("revise", 439, 1, LAYERS)


@pytest.mark.parametrize("stages", [(), ((),), ((CALL,), ())])
def test_workflows_without_calls_are_refused(stages: tuple[tuple[CallSpec, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="workflow w"):
        WorkflowSpec("w", "t", stages)


def test_renaming_moves_only_the_private_layer() -> None:
    moved = renamed(FLOW, "v")
    assert moved.workflow_id == "v"
    for call in moved.calls():
        assert [layer.stream for layer in call.layers] == [
            "template:revise",
            "schema:1",
            "workflow:v",
        ]
    assert renamed(moved, "w") == FLOW


@given(scale=st.floats(1e-4, 3.0), first=st.integers(441, 2000), second=st.integers(441, 2000))
def test_scaling_keeps_what_is_shared_shared(scale: float, first: int, second: int) -> None:
    calls = (replace(CALL, prompt_tokens=first), replace(CALL, prompt_tokens=second))
    left, right = scaled(replace(FLOW, stages=(calls,)), scale).calls()
    for call, full in ((left, first), (right, second)):
        assert call.prompt_tokens == max(1, round(full * scale))
        assert call.output_tokens == max(1, round(80 * scale))
        assert call.own_tokens >= 1 or call.prompt_tokens == 1
    longer, shorter = sorted((left, right), key=lambda c: -c.prompt_tokens)
    if shorter.own_tokens > 1:  # the boundary was not moved to keep a token of its own
        assert longer.layers == shorter.layers


def test_scaling_by_one_changes_nothing() -> None:
    assert scaled(FLOW, 1.0) == FLOW


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_positive_are_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="length_scale"):
        scaled(FLOW, scale)


def test_generators_of_different_names_differ_and_of_equal_names_do_not() -> None:
    assert generator(1, "a", 2).random() == generator(1, "a", 2).random()
    assert generator(1, "a", 2).random() != generator(1, "a", 3).random()
    assert generator(1, "a", 2).random() != generator(2, "a", 2).random()


def test_timed_gives_one_arrival_each() -> None:
    assert [s.arrival_s for s in timed([FLOW, FLOW], [0.5, 2])] == [0.5, 2.0]
    with pytest.raises(ConfigError, match="2 workflows cannot arrive at 1 times"):
        timed([FLOW, FLOW], [0.5])


def test_poisson_gaps_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = poisson(20_000, 4.0, random.Random(1))
    gaps = [b - a for a, b in zip((0.0, *times), times, strict=False)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("variation", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_the_variation_asked_for(variation: float) -> None:
    times = gamma_bursts(40_000, 4.0, variation, random.Random(1))
    gaps = [b - a for a, b in zip((0.0, *times), times, strict=False)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.06)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.06)


def test_recorded_arrivals_start_at_zero_and_can_be_sped_up() -> None:
    assert recorded([10.0, 12.0, 12.0, 16.0], speed=2.0) == (0.0, 1.0, 1.0, 3.0)


def test_bad_arrivals_are_refused() -> None:
    with pytest.raises(ConfigError, match="rate"):
        poisson(3, 0.0, random.Random(1))
    with pytest.raises(ConfigError, match="variation"):
        gamma_bursts(3, 1.0, 0.0, random.Random(1))
    with pytest.raises(ConfigError, match="arrival 3"):
        recorded([0.0, 2.0, 1.0])
    with pytest.raises(ConfigError, match="speed"):
        recorded([0.0], speed=0.0)


def test_quantiles_hit_their_points_and_stay_between_them() -> None:
    lengths = quantiles((0, 10), (50, 20), (100, 120))
    assert [lengths.at(s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == [10, 15, 20, 70, 120]
    rng = random.Random(3)
    draws = sorted(lengths.draw(rng) for _ in range(1001))
    assert draws[0] >= 10
    assert draws[500] == pytest.approx(20, abs=2)
    assert draws[-1] <= 120


@pytest.mark.parametrize(
    "points", [((0, 1),), ((0, 1), (90, 2)), ((0, 5), (100, 4)), ((0, 1), (0, 2), (100, 3))]
)
def test_quantiles_that_fall_or_do_not_span_are_refused(
    points: tuple[tuple[float, float], ...],
) -> None:
    with pytest.raises(ConfigError, match="quantiles"):
        quantiles(*points)
