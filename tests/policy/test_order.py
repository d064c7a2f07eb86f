"""Where a call stands in an engine's order: each class, each order, each term of each key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.policy.order import MOST_LATE, LateWatch, demotes, late_from_s, price, put
from hexgen_vllm.policy.service_rates import ServiceRates
from hexgen_vllm.policy.urgency import BACKGROUND_S, BATCH_S, LAST_RANK, LATE_S
from hexgen_vllm.types import NO_DEADLINE


@dataclass
class State:
    """A call due in 100 s, with 20 s of others after it, of 6 output tokens."""

    deadline_s: float = 100.0
    tail_s: float = 20.0
    arrived_s: float = 7.0
    began_s: float = 7.0
    background: bool = False
    late: bool = False
    promoted: bool = False
    rank: int = -99
    key_s: float = -99.0
    latest_start_s: float = -99.0
    expected_tokens: int = 6
    least_tail_s: float = 15.0


RATES = ServiceRates(prefill_token_s=0.01, prefill_context_s=0.0, output_token_s=0.5)


@pytest.mark.parametrize(
    ("order", "key_s"),
    [("due", 80.0), ("slack", 75.0), ("edf", 100.0), ("fcfs", 7.0), ("sjf", 42.0), ("", 42.0)],
)
def test_a_call_with_a_deadline_stands_by_the_order_in_force(order: str, key_s: float) -> None:
    call = State()
    put(call, order, 3, turn=9.0, service_s=5.0, own_key_s=42.0)
    assert (call.rank, call.key_s, call.latest_start_s) == (3, key_s, 75.0)


@pytest.mark.parametrize(
    ("call", "rank", "key_s", "latest_start_s"),
    [
        (State(late=True), 3, LATE_S + 100.0 + 8 * 93.0, NO_DEADLINE),
        (State(deadline_s=NO_DEADLINE), 3, BATCH_S + 9.0, NO_DEADLINE),
        (State(deadline_s=NO_DEADLINE, promoted=True), 3, 9.0 - BATCH_S, NO_DEADLINE),
        (State(late=True, promoted=True), 3, 9.0 - BATCH_S, NO_DEADLINE),
        (State(promoted=True), 3, 80.0, 75.0),
        (State(background=True), LAST_RANK, BACKGROUND_S + 25.0, BACKGROUND_S + 25.0),
        (
            State(background=True, late=True, promoted=True, deadline_s=NO_DEADLINE),
            LAST_RANK,
            BACKGROUND_S + 25.0,
            BACKGROUND_S + 25.0,
        ),
    ],
)
def test_the_other_classes(call: State, rank: int, key_s: float, latest_start_s: float) -> None:
    put(call, "due", 3, turn=9.0, service_s=5.0, own_key_s=42.0)
    assert (call.rank, call.key_s, call.latest_start_s) == (rank, key_s, latest_start_s)


@pytest.mark.parametrize(
    ("order", "key_s"),
    [
        ("due", 80.0),
        ("slack", 77.7),  # 30 tokens to prefill and 4 to write take 2.3 s
        # All of it takes 4 s; of the 93 s that there were its stage has 4 of 24 parts.
        ("paper", 7.0 + 93.0 * 4.0 / 24.0 - 4.0),
        ("another", 0.0),
    ],
)
def test_a_price_is_made_of_what_is_left(order: str, key_s: float) -> None:
    call = State()
    price(call, order, RATES, 3, 9.0, prompt=100, ahead=30, done=2, most=50)
    assert (call.rank, call.key_s) == (3, pytest.approx(key_s))
    assert call.latest_start_s == pytest.approx(77.7)
    loose = State(deadline_s=NO_DEADLINE)
    price(loose, order, RATES, 3, 9.0, prompt=100, ahead=30, done=2, most=50)
    assert (loose.rank, loose.key_s) == (3, BATCH_S + 9.0)


@pytest.mark.parametrize(
    ("done", "most", "moment_s"),
    [
        (2, 50, 100.0 - 15.0 - 0.4 - 4 * 0.25),
        (2, 4, 100.0 - 15.0 - 0.4 - 2 * 0.25),  # it may write no more
        (0, 50, 100.0 - 15.0 - 0.4 - 6 * 0.25),
    ],
)
def test_a_call_is_late_when_even_the_fastest_steps_end_it_too_late(
    done: int, most: int, moment_s: float
) -> None:
    found = late_from_s(State(), RATES, token_s=0.25, tokens=40, done=done, most=most)
    assert found == pytest.approx(moment_s)


def test_no_newcomer_passes_a_late_call_for_ever() -> None:
    old = State(late=True, tail_s=1e6)
    put(old, "due", 0, turn=1.0, service_s=500.0, own_key_s=0.0)
    ahead = 0
    for arrived_s in range(0, 10_000, 50):
        young = State(arrived_s + 93.0, arrived_s=arrived_s, began_s=arrived_s, late=True)
        put(young, "due", 0, turn=2.0, service_s=1.0, own_key_s=0.0)
        ahead += young.key_s < old.key_s
    assert 0 <= ahead < 3


def test_of_late_calls_that_began_together_the_short_ones_go_first() -> None:
    calls = [State(7.0 + budget_s, late=True) for budget_s in (5.0, 50.0)]
    for call in calls:
        put(call, "due", 0, turn=1.0, service_s=5.0, own_key_s=0.0)
    assert calls[0].key_s < calls[1].key_s


def test_classes_come_in_their_order() -> None:
    calls = [
        State(deadline_s=NO_DEADLINE, promoted=True),
        State(deadline_s=4e9),
        State(late=True, tail_s=1e6),
        State(deadline_s=NO_DEADLINE),
    ]
    for call in calls:
        put(call, "due", 0, turn=4e9, service_s=0.0, own_key_s=0.0)
    keys = [call.key_s for call in calls]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("order", "demote_late", "expected"),
    [("due", True, True), ("due", False, False), ("slack", True, False), ("edf", False, False)],
)
def test_only_the_order_due_puts_late_calls_last(
    order: str, demote_late: bool, expected: bool
) -> None:
    assert demotes(EngineOptions(order=order, demote_late=demote_late)) is expected


def test_calls_whose_moment_has_passed_are_taken_out_once_and_in_turn() -> None:
    watch = LateWatch[str]()
    watch.add("never", NO_DEADLINE)
    for name, moment_s in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("b2", 2.0)):
        watch.add(name, moment_s)
    assert watch.late(1.0) == [], "in time to the last moment"
    assert watch.late(2.5) == ["a", "b", "b2"]
    assert watch.late(2.5) == []
    assert watch.late(9.0) == ["c"]


def test_a_burst_is_taken_out_in_parts() -> None:
    watch = LateWatch[int]()
    for i in range(MOST_LATE + 5):
        watch.add(i, float(i))
    assert watch.late(1e6, 3) == [0, 1, 2]
    assert watch.late(1e6) == list(range(3, 3 + MOST_LATE))
    assert watch.late(1e6) == [MOST_LATE + 3, MOST_LATE + 4]


def test_what_is_watched_need_not_be_comparable() -> None:
    watch = LateWatch[object]()
    first, second = object(), object()
    watch.add(first, 1.0)
    watch.add(second, 1.0)
    assert watch.late(2.0) == [first, second]


def test_a_call_priced_again_and_again_is_late_once_and_from_the_earliest_moment() -> None:
    watch = LateWatch[str]()
    for moment in (9.0, 5.0, 7.0, *range(10, 500)):
        watch.add("call", moment)
    assert watch.late(4.9) == []
    assert watch.late(1000.0) == ["call"]
    assert watch.late(1000.0) == []


@pytest.mark.parametrize("count", [1, 200])
def test_a_call_that_is_over_is_not_late(count: int) -> None:
    watch = LateWatch[int]()
    for item in range(count):
        for moment in (30.0, 20.0, 10.0):
            watch.add(item, moment + item)
    for item in range(0, count, 2):
        watch.forget(item)
    assert watch.late(1000.0, most=count) == list(range(1, count, 2))


def test_one_that_is_not_watched_may_be_forgotten() -> None:
    watch = LateWatch[str]()
    watch.forget("call")
    assert watch.late(1e12) == []


def test_saying_the_same_moment_again_costs_no_memory() -> None:
    watch = LateWatch[int]()
    for _ in range(200):
        for item in range(40):
            watch.add(item, float(item))
    assert len(watch._heap) == 40


def test_a_call_that_waits_again_is_watched_again() -> None:
    watch = LateWatch[str]()
    watch.add("call", 1.0)
    assert watch.late(2.0) == ["call"]
    watch.add("call", 3.0)
    assert watch.late(2.5) == []
    assert watch.late(3.5) == ["call"]


def test_a_call_without_such_a_moment_is_never_late() -> None:
    watch = LateWatch[str]()
    watch.add("call", NO_DEADLINE)
    assert watch.late(1e12) == []
