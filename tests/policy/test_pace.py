"""How fast calls without deadline may decode beside those with one."""

from __future__ import annotations

import math
import random

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.pace import (
    EVERY_STEPS,
    LooseCall,
    PaceControl,
    Places,
    TightCall,
    captured,
    reachable_token_s,
    step_bound,
)
from hexgen_vllm.types import StepCost

NOW = 1000.0
COST = StepCost(c0=0.008, c1=0.001, c2=0.0, p0=0.0, p1=1e-4, p2=0.0)
LOOSE = [LooseCall(500, 0)] * 20


def control(share: float = 1.0, **more: tuple[int, ...]) -> PaceControl:
    return PaceControl(EngineOptions(interactive_share=share), 64, 2048, **more)


def test_the_step_is_as_long_as_the_tightest_call_can_bear() -> None:
    calls = [TightCall(NOW + 10.0, 100, 300, 0, 100), TightCall(NOW + 4.0, 200, 300, 0, 200)]
    limit_s, spare_s = step_bound(calls, 0.010, 0.5, 0.1, NOW)
    own_s = 0.9 * 4.0 * 0.9 - 0.5
    assert limit_s == pytest.approx(own_s / (200 + EVERY_STEPS))
    assert spare_s == pytest.approx(own_s - (200 + EVERY_STEPS) * 1.3 * 0.010)
    assert step_bound([], 0.01, 0.0, 0.0, NOW) == (math.inf, math.inf)


def test_time_for_a_long_answer_is_kept_and_the_rest_spread_over_the_likely_one() -> None:
    """Until the end: whoever writes more than is likely still has the time for all of it."""
    left, likely, due_s = 300, 150, NOW + 8.0
    first_s, _ = step_bound([TightCall(due_s, left, 300, 0, likely)], 0.010, 0.0, 0.0, NOW)
    assert first_s > step_bound([TightCall(due_s, left, 300, 0, left)], 0.010, 0.0, 0.0, NOW)[0]
    now = NOW
    for written in range(left):
        call = TightCall(
            due_s, left - written, 300, 0, max(likely - written, (left - written) // 2, 1)
        )
        now += step_bound([call], 0.010, 0.0, 0.0, now)[0]
    assert now <= due_s


@pytest.mark.parametrize(
    ("tight", "share", "found"), [(1, 0.0, 0.009), (4, 0.5, 0.024), (0, 0, 0.009)]
)
def test_what_calls_with_deadlines_can_reach(tight: int, share: float, found: float) -> None:
    """However slow loose calls have made the usual step; never slower than it, though."""
    assert reachable_token_s(COST, tight, 900, share, 0.05) == pytest.approx(found)
    assert reachable_token_s(COST, tight, 900, share, 0.004) == 0.004


def test_what_cannot_be_met_asks_for_a_little_more_than_the_step_alone() -> None:
    late = [TightCall(NOW - 50.0, 100, 300, 0, 100)]
    assert step_bound(late, 0.010, 0.5, 0.1, NOW) == (pytest.approx(0.0105), 0.0)


@pytest.mark.parametrize(("seconds", "keep"), [(1.0, 0), (1.81, 6), (2.17, 9), (9.0, 20)])
def test_so_many_decode_as_fit_into_the_step(seconds: float, keep: int) -> None:
    tight = [TightCall(NOW + seconds, 100, 300, 0, 100)]
    plan = control().plan(tight, LOOSE, COST, 0.0, NOW)
    assert plan.keep == keep
    alone_s = COST.step_s(1)
    assert COST.step_s(1 + keep) <= max(plan.step_s, 1.05 * alone_s)
    assert keep == 20 or COST.step_s(2 + keep) > plan.step_s


def test_without_a_call_that_has_a_deadline_there_is_no_bound() -> None:
    assert control().plan([], LOOSE, COST, 0.5, NOW) == (20, True, None, math.inf)


def test_nobody_new_comes_in_while_any_is_left_out() -> None:
    urgent, lazy = TightCall(NOW + 2.0, 100, 300, 0, 100), TightCall(NOW + 60.0, 100, 300, 0, 100)
    plan = control().plan([urgent, lazy], LOOSE, COST, 0.0, NOW)
    assert not plan.admit
    assert plan.prefill_tokens is not None
    free = control().plan([lazy], LOOSE, COST, 0.0, NOW)
    assert free.admit
    assert free.prefill_tokens == 2048


def test_prefills_of_loose_calls_take_part_of_the_slack_only() -> None:
    chunk = LooseCall(0, 5000)
    tight = [TightCall(NOW + 2.2, 100, 300, 0, 100)]
    plan = control().plan(tight, [LooseCall(500, 0), chunk], COST, 0.0, NOW)
    spare_s = 0.9 * 2.2 - (100 + EVERY_STEPS) * COST.step_s(1, 300) * 1.3
    assert plan.prefill_tokens == pytest.approx(0.25 * spare_s / COST.p1, abs=1)
    none = control().plan([TightCall(NOW + 1.4, 100, 300, 0, 100)], [chunk], COST, 0.0, NOW)
    assert (none.keep, none.prefill_tokens) == (0, 0)


def test_somebody_runs_while_no_call_with_a_deadline_does() -> None:
    waiting = [TightCall(NOW - 5.0, 100, 0, 400, 100)]
    assert control().plan(waiting, LOOSE, COST, 0.0, NOW).keep == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("loose", [1, 3, 20])
def test_turns_of_loose_calls_are_at_least_their_share(share: float, loose: int) -> None:
    one = control(share)
    rng = random.Random(1)
    served = plans = 0
    for _ in range(4000):
        tight = [TightCall(NOW + rng.choice([-9.0, 0.8, 1.2]), 100, 300, 0, 100)]
        served += one.plan(tight, LOOSE[:loose], COST, 0.2, NOW).keep
        plans += 1
    assert served >= (1.0 - share) * loose * plans - 2
    assert one.given_up == 4 * (loose * plans - served)


@pytest.mark.parametrize(
    ("tight", "keep", "found"),
    [(3, 9, 5), (3, 5, 5), (8, 0, 0), (8, 3, 3), (2, 1, 1), (30, 1, 1), (30, 2, 2), (30, 9, 9)],
)
def test_batches_are_of_captured_sizes(tight: int, keep: int, found: int) -> None:
    sizes = (4, 8, 16, 32)
    assert captured(tight, keep, sizes) == found
    assert captured(tight, keep, ()) == keep


@pytest.mark.parametrize(("share", "slots"), [(0.5, 2), (0.95, 1), (0.95, 32), (0.95, 256)])
def test_who_waits_longest_gets_a_place_in_a_bounded_time(share: float, slots: int) -> None:
    places = Places(EngineOptions(interactive_share=share), slots)
    bound = math.ceil(200 / ((1.0 - share) * slots)) + 1
    waited = next(i for i in range(1, 10**6) if places.owes(0, 200))
    assert waited <= bound
    assert waited >= bound - 2
    assert not Places(EngineOptions(interactive_share=1.0), slots).some
