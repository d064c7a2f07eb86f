"""Displacement helps the urgent, is bounded, and never happens for nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.preemption import (
    Candidate,
    RunningView,
    choose_victims,
    eligible,
    gain_s,
    wait_for_room,
)

NOW = 1000.0
LIMITS = EngineOptions()
URGENT = Candidate(key_s=NOW + 1, latest_start_s=NOW + 1, slots_short=1, blocks_short=0)
RICH = RunningView(
    key_s=NOW + 60,
    latest_start_s=NOW + 60,
    redo_s=0.1,
    lost_tokens=100,
    blocks_released=10,
    output_left=200,
    displacements=0,
)


def at(latest_start_s: float, **changes: float) -> RunningView:
    return replace(RICH, key_s=latest_start_s, latest_start_s=latest_start_s, **changes)


def test_displaces_who_has_slack_for_who_has_none() -> None:
    assert choose_victims(URGENT, [RICH], LIMITS, NOW) == ((0,), "displaced")


@pytest.mark.parametrize(
    ("candidate", "running", "limits", "reason"),
    [
        (URGENT, [RICH], replace(LIMITS, displace=False), "off"),
        (replace(URGENT, slots_short=0), [RICH], LIMITS, "fits"),
        (replace(URGENT, latest_start_s=NOW + 2), [RICH], LIMITS, "not-urgent"),
        (replace(URGENT, latest_start_s=NOW - 5.1), [RICH], LIMITS, "not-urgent"),
        (replace(URGENT, wait_s=0.9), [RICH], LIMITS, "room-soon"),
        (URGENT, [], LIMITS, "no-victim"),
        (URGENT, [replace(RICH, displacements=3)], LIMITS, "no-victim"),
        (URGENT, [replace(RICH, output_left=16)], LIMITS, "no-victim"),
        (URGENT, [replace(RICH, can_free=False)], LIMITS, "no-victim"),
        (URGENT, [replace(RICH, redo_s=58.5)], LIMITS, "no-victim"),
        (URGENT, [at(NOW + 1.6)], LIMITS, "no-victim"),
        (URGENT, [replace(RICH, key_s=NOW)], LIMITS, "no-victim"),
        (replace(URGENT, slots_short=2), [RICH], LIMITS, "would-not-fit"),
        (replace(URGENT, blocks_short=11), [RICH], LIMITS, "would-not-fit"),
    ],
)
def test_leaves_the_batch_alone(
    candidate: Candidate, running: list[RunningView], limits: EngineOptions, reason: str
) -> None:
    assert choose_victims(candidate, running, limits, NOW) == ((), reason)


def test_a_wait_that_takes_all_slack_is_too_long() -> None:
    assert choose_victims(replace(URGENT, wait_s=1.1), [RICH], LIMITS, NOW).victims == (0,)
    late = replace(URGENT, latest_start_s=NOW - 0.1, wait_s=0.0)
    assert choose_victims(late, [RICH], LIMITS, NOW).victims == (0,)


@pytest.mark.parametrize(
    ("slots", "blocks", "wait_s"),
    [(1, 0, 1.0), (2, 0, 2.0), (0, 5, 1.0), (0, 6, 2.0), (1, 13, 3.0), (4, 0, math.inf)],
)
def test_room_comes_as_calls_end(slots: int, blocks: int, wait_s: float) -> None:
    endings = [(3.0, 4), (1.0, 5), (2.0, 5)]
    assert wait_for_room(slots, blocks, endings) == wait_s


BATCH = replace(
    RICH, key_s=1e11, latest_start_s=math.inf, has_deadline=False, displacements=99, redo_s=50.0
)
IDLE = Candidate(1e11, math.inf, 1, 0, has_deadline=False)


@pytest.mark.parametrize(
    ("candidate", "running", "victims"),
    [
        (URGENT, [RICH, BATCH], (1,)),
        (URGENT, [BATCH, replace(BATCH, redo_s=1.0)], (1,)),
        (replace(URGENT, latest_start_s=NOW - 500.0), [RICH, BATCH], (1,)),  # however late
        (replace(URGENT, wait_s=0.1), [RICH, BATCH], (1,)),  # without waiting
        (
            replace(URGENT, latest_start_s=NOW + 9.0),
            [RICH, BATCH],
            (1,),
        ),  # before its slack is gone
        (URGENT, [replace(BATCH, rank=-1)], ()),
        (replace(URGENT, rank=3), [BATCH], ()),  # a better priority outranks the deadline
        (replace(URGENT, rank=-3), [replace(RICH, latest_start_s=NOW - 9, key_s=0.0)], (0,)),
        (IDLE, [BATCH, RICH], ()),
        (replace(IDLE, rank=-1), [RICH], (0,)),
        (replace(IDLE, rank=-1), [replace(BATCH, displacements=3)], ()),
        (replace(IDLE, rank=-1), [replace(RICH, displacements=3)], ()),
        (replace(IDLE, rank=1), [RICH, BATCH], ()),
    ],
)
def test_calls_without_deadline_and_of_worse_priority_give_way_first(
    candidate: Candidate, running: list[RunningView], victims: tuple[int, ...]
) -> None:
    assert choose_victims(candidate, running, LIMITS, NOW).victims == victims


def test_takes_the_most_slack_per_token_lost() -> None:
    far_but_long = at(NOW + 100, lost_tokens=5000)
    near_but_short = at(NOW + 20, lost_tokens=50)
    assert choose_victims(URGENT, [far_but_long, near_but_short], LIMITS, NOW).victims == (1,)
    same_work = at(NOW + 100, lost_tokens=50)
    assert choose_victims(URGENT, [near_but_short, same_work], LIMITS, NOW).victims == (1,)


def test_spares_victims_that_others_make_unnecessary() -> None:
    wanted = replace(URGENT, slots_short=0, blocks_short=30)
    small = at(NOW + 200, lost_tokens=10, blocks_released=2)
    large = at(NOW + 50, lost_tokens=500, blocks_released=32)
    assert choose_victims(wanted, [small, large], LIMITS, NOW).victims == (1,)
    medium = replace(large, blocks_released=28)
    assert choose_victims(wanted, [small, medium], LIMITS, NOW).victims == (0, 1)


def random_case(rng: random.Random) -> tuple[Candidate, list[RunningView]]:
    start = NOW + rng.uniform(-8, 4)
    wait_s = rng.choice([math.inf, rng.uniform(0, 3)])
    candidate = Candidate(start, start, rng.randint(-1, 3), rng.randint(-5, 40), wait_s)
    running = [
        RunningView(
            key_s=(key := NOW + rng.uniform(-5, 60)),
            latest_start_s=key - rng.choice([0.0, rng.uniform(0, 3)]),
            redo_s=rng.uniform(0, 2),
            lost_tokens=rng.randint(0, 4000),
            blocks_released=rng.randint(0, 20),
            output_left=rng.randint(0, 100),
            displacements=rng.randint(0, 4),
            can_free=rng.random() < 0.9,
        )
        for _ in range(rng.randint(0, 12))
    ]
    return candidate, running


@pytest.mark.parametrize("seed", range(20))
def test_every_decision_keeps_every_bound(seed: int) -> None:
    rng = random.Random(seed)
    seen = set[str]()
    for _ in range(500):
        candidate, running = random_case(rng)
        victims, reason = choose_victims(candidate, running, LIMITS, NOW)
        seen.add(reason)
        assert bool(victims) == (reason == "displaced")
        assert len(set(victims)) == len(victims)
        chosen = [running[i] for i in victims]
        assert all(eligible(candidate, v, LIMITS) for v in chosen)
        assert all(gain_s(candidate, v) > LIMITS.displace_gap_s for v in chosen)
        if not victims:
            continue
        assert len(chosen) >= candidate.slots_short
        assert sum(v.blocks_released for v in chosen) >= candidate.blocks_short
        for spared in chosen:
            rest = [v for v in chosen if v is not spared]
            fits = len(rest) >= candidate.slots_short and (
                sum(v.blocks_released for v in rest) >= candidate.blocks_short
            )
            assert not (fits and rest), "a victim more than needed"
    assert seen == {
        "displaced", "fits", "not-urgent", "room-soon", "no-victim", "would-not-fit"
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_a_victim_never_displaces_its_candidate_back(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2000):
        candidate, running = random_case(rng)
        for i in choose_victims(candidate, running, LIMITS, NOW).victims:
            victim = running[i]
            key = victim.latest_start_s - victim.redo_s  # re-keyed: its loss is to do again
            back = Candidate(key, key, 1, 0)
            winner = replace(
                RICH, key_s=candidate.key_s, latest_start_s=candidate.latest_start_s, redo_s=0.0
            )
            assert not choose_victims(back, [winner], LIMITS, NOW).victims
