"""Numbers for scaling, from the answers of a real router in front of fake engines."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen_vllm.router.status.readings import START_S, Readings
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import open_stand


def engine(name: str, load: int = 0, **more: Any) -> dict[str, Any]:
    return {"name": name, "load": load, "max_num_seqs": 4, "cost": None, **more}


COST = {"c0": 0.02, "c1": 0.005, "c2": 0.0, "p0": 0.0, "p1": 0.001, "p2": 0.0}


def overview(received: int = 0, held: int = 0, answered: int = 0) -> dict[str, Any]:
    slack = {"bounds_s": [0.0, 5.0], "calls": [2, 1, 7]}
    calls = {"received": received, "held": held, "answered": answered}
    return {"calls": calls, "slack": slack}


def diagnostics(*engines: dict[str, Any]) -> dict[str, Any]:
    decisions = [
        {"uncached_tokens": 100, "expected_output_tokens": 10},
        {"uncached_tokens": 300, "expected_output_tokens": 30},
        {"reason": "rejected-saturated"},
    ]
    return {"engines": list(engines), "decisions": decisions}


def test_a_full_engine_serves_what_its_steps_and_the_mean_call_say() -> None:
    readings = Readings(30.0)
    readings.take(overview(), diagnostics(engine("a", cost=COST), engine("b")), 0.0)
    # 200 tokens of prefill and 20 of output, four calls in each step of 40 ms
    assert readings.calls_per_s(["a", "b"]) == pytest.approx(1 / (0.2 + 20 * 0.04 / 4))
    assert readings.calls_per_s(["b"]) is None


def test_ranks_of_an_engine_count_together() -> None:
    readings = Readings(30.0)
    ranks = [engine(f"a@{rank}", 3, cost=COST) for rank in range(2)]
    readings.take(overview(), diagnostics(*ranks), 0.0)
    assert readings.calls_per_s(["a"]) == pytest.approx(2 / 0.4)
    assert readings.load("a") == 6


def test_what_waits_is_what_no_slot_is_free_for() -> None:
    readings = Readings(30.0)
    readings.take(overview(held=5), diagnostics(engine("a", 6), engine("b", 1)), 0.0)
    traffic = readings.traffic(None)
    assert traffic.waiting == 5 + 2
    assert traffic.start_s == START_S
    assert traffic.slack == ((float("-inf"), 2), (0.0, 1), (5.0, 7))
    assert readings.traffic(7.0).start_s == 7.0


def test_arrivals_are_smoothed_and_a_new_router_starts_at_its_own_count() -> None:
    readings = Readings(10.0)
    for second in range(100):
        readings.take(overview(received=3 * second), diagnostics(), float(second))
    assert readings.traffic(None).arrivals_per_s == pytest.approx(3.0, rel=0.01)
    before = readings.traffic(None).arrivals_per_s
    readings.take(overview(received=4), diagnostics(), 100.0)
    assert readings.traffic(None).arrivals_per_s == before
    readings.take(overview(received=4), diagnostics(), 110.0)
    assert readings.traffic(None).arrivals_per_s == pytest.approx(before / 2.718, rel=0.01)


def test_what_is_served_counts_when_calls_have_waited_all_the_time() -> None:
    readings = Readings(10.0)
    for second in range(21):
        waits = engine("a", 5 if second > 5 else 4)
        readings.take(overview(answered=2 * second), diagnostics(waits), float(second))
        served = readings.traffic(None).served_per_s
        assert (served is None) == (second < 15)
    assert served == pytest.approx(2 * (1 - 2.718**-2), rel=0.01)


async def test_the_router_says_all_that_is_read() -> None:
    async with open_stand(FakeSettings(), policy="slack") as stand:
        for _ in range(3):
            async with stand.post() as answer:
                assert answer.status == 200
        async with stand.get("/ui/data") as page, stand.get("/scheduling/diagnostics") as said:
            readings = Readings(30.0)
            readings.take(await page.json(), await said.json(), 0.0)
        assert readings.traffic(None).waiting == 0
        assert readings.load("engine-0") == 0
        readings.calls_per_s(["engine-0"])
