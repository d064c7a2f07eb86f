"""Service times, output estimates, and what a measured rate changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.service_rates import ServiceRates, output_left
from hexgen_vllm.types import StepCost

pytestmark = pytest.mark.engine


def test_seeds_come_from_the_options() -> None:
    options = EngineOptions(prefill_tokens_per_s=1000.0, decode_tokens_per_s=20.0)
    assert ServiceRates.seeds(options).service_s(500, 40) == pytest.approx(0.5 + 2.0)


def test_fitted_rates_follow_the_cost() -> None:
    cost = StepCost(c0=0.01, c1=0.001, c2=0.0, p0=0.002, p1=0.0001, p2=1e-8)
    rates = ServiceRates.fitted(cost, chunk=1000, output_token_s=0.03, uncached=1.0)
    whole = 2000 * (0.0001 + 0.012 / 1000) + 1e-8 * 2000 * 1000
    assert rates.prefill_s(2000) == pytest.approx(whole)
    assert rates.service_s(2000, 10) == pytest.approx(whole + 0.3)
    cached = ServiceRates.fitted(cost, chunk=1000, output_token_s=0.03, uncached=0.25)
    assert cached.prefill_s(2000) == pytest.approx(whole / 4)


def test_rates_differ_by_share() -> None:
    base = ServiceRates(1e-4, 0.0, 0.02)
    assert not base.differs(ServiceRates(1.05e-4, 0.0, 0.021), 0.1)
    assert base.differs(ServiceRates(1.2e-4, 0.0, 0.02), 0.1)
    assert base.differs(ServiceRates(1e-4, 0.0, 0.017), 0.1)


@pytest.mark.parametrize(
    ("expected", "done", "limit", "left"),
    [
        (100, 0, 500, 100),
        (100, 99, 500, 1),
        (100, 100, 500, 50),  # past its estimate: half of what it wrote
        (10, 12, 500, 32),
        (100, 490, 500, 10),
        (100, 500, 500, 1),
    ],
)
def test_output_left(expected: int, done: int, limit: int, left: int) -> None:
    assert output_left(expected, done, limit) == left


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(1, 10_000))
def test_output_left_is_within_the_limit(expected: int, done: int, limit: int) -> None:
    assert 1 <= output_left(expected, done, limit) <= max(limit - done, 1)
