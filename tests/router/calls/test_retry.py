"""Retries: bounded per call and by a budget, with waits that grow and vary."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.router.calls.retry import RetryPolicy
from hexgen_vllm.router.options import RouterOptions


def policy(**options: object) -> RetryPolicy:
    return RetryPolicy(RouterOptions(**options), random.Random(1))  # type: ignore[arg-type]


def test_a_call_is_sent_again_at_most_so_often() -> None:
    retries = policy(retry_max_retries=3)
    assert [retries.allows(attempts) for attempts in range(1, 6)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("options", [{"disable_retries": True}, {"retry_max_retries": 0}])
def test_retries_can_be_switched_off(options: dict[str, object]) -> None:
    assert not policy(**options).allows(1)


def test_the_budget_limits_retries_to_a_share_of_calls() -> None:
    retries = policy(retry_budget_ratio=0.2, retry_budget_burst=10.0)
    granted = 0
    for _ in range(1000):  # every call fails
        retries.call_arrived()
        granted += retries.allows(1)
    assert 200 <= granted <= 211


def test_good_times_save_up_for_bad_ones_but_not_without_end() -> None:
    retries = policy(retry_budget_ratio=0.2)
    for _ in range(100_000):
        retries.call_arrived()
    assert sum(retries.allows(1) for _ in range(10_000)) == 100


def test_an_engine_that_dies_may_have_had_many_calls() -> None:
    """All of them come at once, and before any other call has earned anything."""
    retries = policy()
    assert sum(retries.allows(1) for _ in range(200)) == 100


def test_waits_grow_up_to_a_limit_and_vary() -> None:
    retries = policy(
        retry_initial_backoff_ms=100.0, retry_backoff_multiplier=2.0, retry_max_backoff_ms=1000.0,
        retry_jitter_factor=0.25,
    )  # fmt: skip
    for attempts, middle in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.8), (5, 1.0), (50, 1.0)):
        waits = [retries.backoff_s(attempts) for _ in range(200)]
        assert 0.75 * middle <= min(waits) < 0.8 * middle
        assert 1.2 * middle < max(waits) <= 1.25 * middle
