"""Bandwidth is learned for ever: no single copy makes all others look as if they did not pay."""

from __future__ import annotations

import math
import random

import pytest

from hexgen_vllm.engine.swap.ledger import Bandwidth
from hexgen_vllm.engine.swap.messages import Save
from hexgen_vllm.engine.swap.planner import SwapPlanner
from hexgen_vllm.engine.swap.pool import HostPool, RecordSpace

RATE = 24e9


def learned(copies: int = 100) -> Bandwidth:
    found, rng = Bandwidth(), random.Random(1)
    for _ in range(copies):
        size = rng.randint(1, 64) * 2**20
        found.observe(size, size / RATE * rng.gauss(1.0, 0.03))
    return found


def test_it_is_right_in_the_long_run() -> None:
    assert learned(100_000).rate() == pytest.approx(RATE, rel=0.03)


def test_one_pause_costs_little() -> None:
    found = learned()
    found.observe(64 * 2**20, 40.0)
    rate = found.rate()
    assert rate is not None
    assert rate > RATE / 3


def test_a_bus_that_became_slow_is_known_after_some_copies() -> None:
    found = learned()
    for _ in range(40):
        found.observe(2**24, 2**24 / (RATE / 10))
    assert found.rate() == pytest.approx(RATE / 10, rel=0.1)
    for _ in range(40):
        found.observe(2**24, 2**24 / RATE)
    assert found.rate() == pytest.approx(RATE, rel=0.2)


def test_nonsense_teaches_nothing() -> None:
    found = learned()
    before = found.rate()
    for size, seconds in (
        (0, 1.0), (-5, 1.0), (5, 0.0), (5, -1.0), (5, math.nan), (5, math.inf),
    ):  # fmt: skip
        found.observe(size, seconds)
    assert found.rate() == before
    assert Bandwidth().rate() is None


def test_workers_renew_what_they_keep_with_the_first_copy_after_a_reset() -> None:
    """A sleep resets the cache, and wipes what workers keep in device memory."""
    pool = HostPool(RecordSpace(9))
    planner = SwapPlanner(pool, block_size=16, block_bytes=64, keep="always", beside=True)
    assert not planner.end_step().renew
    planner.forget_all("reset")
    assert not planner.end_step().renew, "nothing is copied yet: it may still sleep"
    for renewed in (True, False):
        planner._saves["r"] = Save((1,), ())
        assert planner.end_step().renew is renewed
