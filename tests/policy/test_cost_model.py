"""The step-cost fit finds known coefficients, shrugs off outliers and follows drift."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.policy.cost_model import CostFit, StepShape
from hexgen_vllm.types import StepCost

TRUE = StepCost(c0=0.008, c1=0.0004, c2=2e-8, p0=0.003, p1=0.00012, p2=1e-9)


def random_shape(rng: random.Random) -> StepShape:
    n = rng.randint(0, 32)
    chunk = rng.choice([0, 0, 0, rng.randint(16, 512)])
    if n == 0 and chunk == 0:
        chunk = 64
    return StepShape(n, n * rng.randint(50, 4000), chunk, chunk * rng.uniform(0, 2000))


def seconds(cost: StepCost, s: StepShape) -> float:
    return cost.step_s(s.n_decode, s.ctx_decode, s.n_prefill, s.prefill_ctx)


def feed(fit: CostFit, cost: StepCost, steps: int, seed: int, spike: float = 0.0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        shape = random_shape(rng)
        noise = rng.gauss(1.0, 0.03)
        t = seconds(cost, shape) * noise
        if rng.random() < spike:
            t *= rng.uniform(5, 30)
        fit.observe(shape, t)


def relative_gap(fit: CostFit, cost: StepCost) -> float:
    found = fit.cost()
    assert found is not None
    rng = random.Random(99)
    gaps = []
    for _ in range(200):
        shape = random_shape(rng)
        want = seconds(cost, shape)
        gaps.append(abs(seconds(found, shape) - want) / want)
    return max(gaps)


@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_cost(seed: int) -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, seed)
    assert relative_gap(fit, TRUE) < 0.08
    error = fit.error()
    assert error is not None
    assert error < 0.06


@pytest.mark.parametrize("seed", range(5))
def test_outliers_do_not_bend_it(seed: int) -> None:
    fit = CostFit()
    feed(fit, TRUE, 1500, seed, spike=0.03)
    assert relative_gap(fit, TRUE) < 0.25


def test_follows_a_device_that_becomes_slower() -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, 1)
    feed(fit, TRUE.scaled(2.0), 3000, 2)
    assert relative_gap(fit, TRUE.scaled(2.0)) < 0.1


def test_survives_a_monotonous_phase() -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, 1)
    shape = StepShape(8, 8 * 500)
    for _ in range(20_000):
        fit.observe(shape, seconds(TRUE, shape))
    feed(fit, TRUE, 50, 3)
    assert relative_gap(fit, TRUE) < 0.3


def test_unknown_until_there_is_evidence() -> None:
    fit = CostFit(min_steps=20, min_prefills=3)
    assert fit.cost() is None
    assert fit.error() is None
    for _ in range(30):
        fit.observe(StepShape(4, 400), 0.01)
    assert fit.cost() is None, "no prefill seen: prefill cost must stay unknown, not zero"
    for _ in range(3):
        fit.observe(StepShape(0, 0, 128, 128 * 64), 0.02)
    assert fit.cost() is not None


def test_ignores_nonsense_times() -> None:
    fit = CostFit()
    fit.observe(StepShape(1), 0.0)
    fit.observe(StepShape(1), -1.0)
    assert fit.steps == 0


def test_coefficients_are_never_negative() -> None:
    fit = CostFit()
    rng = random.Random(0)
    for _ in range(100):
        fit.observe(StepShape(rng.randint(1, 3), 100, rng.choice([0, 64]), 0.0), 0.01)
    cost = fit.cost()
    assert cost is not None
    assert min(cost.c0, cost.c1, cost.c2, cost.p0, cost.p1, cost.p2) >= 0.0
