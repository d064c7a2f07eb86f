"""How long a silence may be, by what is known of the engine."""

from __future__ import annotations

import math

import pytest

from hexgen_vllm.policy.liveness import Patience, Silence, borne_s, deaf_is_down

PATIENCE = Patience(least_s=10.0, steps=50.0, cold_s=300.0)
FROZEN = {"healthy": False}


@pytest.mark.parametrize(
    ("silence", "expected_s"),
    [
        (Silence(**FROZEN), 10.0),
        (Silence(), 30.0),
        (Silence(step_s=0.1, **FROZEN), 15.0),
        (Silence(step_s=0.1), 45.0),
        (Silence(step_s=0.1, prefill_s=20.0), 165.0),
        (Silence(longest_s=20.0, **FROZEN), 60.0),
        (Silence(longest_s=20.0), 180.0),
        (Silence(longest_s=1e6, **FROZEN), 300.0),
        (Silence(warm=False), 300.0),
        (Silence(warm=False, **FROZEN), 300.0),
        (Silence(warm=False, prefill_s=100.0), 630.0),
        (Silence(others=False), math.inf),
        (Silence(others=False, warm=False), math.inf),
        (Silence(others=False, **FROZEN), 300.0),
        (Silence(others=False, prefill_s=400.0, **FROZEN), 810.0),
    ],
)
def test_silences(silence: Silence, expected_s: float) -> None:
    assert borne_s(PATIENCE, silence) == pytest.approx(expected_s)


def test_zero_bears_any() -> None:
    assert borne_s(Patience(0.0, 50.0, 300.0), Silence(**FROZEN)) == math.inf


@pytest.mark.parametrize(
    ("failing_s", "worked_s", "others", "warm", "down"),
    [
        (20.0, 30.0, True, True, True),
        (20.0, 5.0, True, True, False),
        (20.0, 30.0, False, True, False),
        (301.0, 400.0, False, True, True),
        (20.0, math.inf, True, False, False),
        (76.0, math.inf, True, False, True),
        (301.0, 1.0, True, True, False),
        (301.0, 11.0, True, True, True),
        (9.0, 30.0, True, True, False),
        (10.0, 10.0, True, True, False),
        (74.0, math.inf, True, False, False),
        (75.0, math.inf, True, False, False),
        (75.5, 75.5, True, False, True),
        (1301.0, 301.0, False, True, True),
    ],
)
def test_health_checks_that_time_out(
    failing_s: float, worked_s: float, others: bool, warm: bool, down: bool
) -> None:
    assert down is deaf_is_down(
        PATIENCE, failing_s=failing_s, worked_s=worked_s, others=others, warm=warm
    )
