"""The heap agrees with a sorted list under any sequence of operations."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.policy.urgency import (
    BACKGROUND_S,
    BATCH_S,
    LATE_S,
    UrgencyHeap,
    background_key,
    batch_key,
    late_key,
    latest_start,
    paper_key,
    stage_budget,
)
from hexgen_vllm.types import NO_DEADLINE
from hexgen_vllm.wire import MAX_TIME_MS


class Oracle:
    """The same queue as a plain list, sorted on every look."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.count = 0

    def push(self, item: int, key: float, arrived_s: float) -> None:
        self.count += 1
        self.rows.append([key, arrived_s, self.count, item])

    def rekey(self, item: int, key: float) -> None:
        next(r for r in self.rows if r[3] == item)[0] = key

    def remove(self, item: int) -> None:
        self.rows = [r for r in self.rows if r[3] != item]

    def order(self) -> list[float]:
        return [r[3] for r in sorted(self.rows)]


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    heap: UrgencyHeap[int] = UrgencyHeap()
    oracle, inside = Oracle(), set[int]()
    for step in range(3000):
        what = rng.random()
        if what < 0.4 or not inside:
            key, arrived = float(rng.randrange(20)), float(rng.randrange(5))
            heap.push(step, key, arrived)
            oracle.push(step, key, arrived)
            inside.add(step)
        elif what < 0.6:
            item, key = rng.choice(sorted(inside)), float(rng.randrange(20))
            heap.rekey(item, key)
            oracle.rekey(item, key)
        elif what < 0.8:
            item = rng.choice(sorted(inside))
            heap.remove(item)
            oracle.remove(item)
            inside.discard(item)
        else:
            first = oracle.order()[0]
            assert heap.peek() == first
            assert heap.pop() == first
            oracle.remove(int(first))
            inside.discard(int(first))
        assert len(heap) == len(inside)
    assert list(heap) == oracle.order()
    assert sorted(heap.unordered()) == sorted(inside)
    assert [heap.pop() for _ in range(len(heap))] == oracle.order()


@given(st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)), max_size=50))
def test_any_keys_come_out_in_order(rows: list[tuple[float, float]]) -> None:
    heap: UrgencyHeap[int] = UrgencyHeap()
    for i, (key, arrived) in enumerate(rows):
        heap.push(i, key, arrived)
    out = [heap.pop() for _ in rows]
    assert out == sorted(range(len(rows)), key=lambda i: (*rows[i], i))


def test_rekeying_back_and_forth_keeps_one_entry_and_its_place() -> None:
    heap: UrgencyHeap[str] = UrgencyHeap()
    heap.push("first", 1.0, 0.0)
    heap.push("second", 1.0, 0.0)
    for _ in range(500):
        heap.rekey("first", 2.0)
        heap.rekey("first", 1.0)
    assert len(heap) == 2
    assert [heap.pop(), heap.pop()] == ["first", "second"]
    assert not heap


def test_memory_follows_what_is_queued() -> None:
    heap: UrgencyHeap[int] = UrgencyHeap()
    for i in range(100):
        heap.push(i, float(i), 0.0)
    for round_ in range(1000):
        for i in range(100):
            heap.rekey(i, float(i + round_))
    assert len(heap._heap) <= 202


def test_refuses_what_would_break_the_order() -> None:
    heap: UrgencyHeap[str] = UrgencyHeap()
    heap.push("a", 1.0, 0.0)
    with pytest.raises(ValueError, match="already"):
        heap.push("a", 2.0, 0.0)
    with pytest.raises(ValueError, match="number"):
        heap.push("b", float("nan"), 0.0)
    with pytest.raises(ValueError, match="number"):
        heap.rekey("a", float("nan"))
    assert list(heap) == ["a"]


def test_what_is_not_there() -> None:
    heap: UrgencyHeap[str] = UrgencyHeap()
    for look in (heap.peek, heap.pop):
        with pytest.raises(IndexError):
            look()
    with pytest.raises(KeyError):
        heap.remove("a")
    with pytest.raises(KeyError):
        heap.rekey("a", 1.0)
    assert not heap.discard("a")
    heap.push("a", 1.0, 0.0)
    assert "a" in heap
    assert heap.discard("a")
    assert "a" not in heap


def test_background_is_behind_every_legal_deadline_and_shortest_first() -> None:
    latest = 4e9 + MAX_TIME_MS / 1000  # a clock of this century and the longest deadline
    assert latest < background_key(0.0)
    assert background_key(0.1) < background_key(0.2)
    assert background_key(0.0) == BACKGROUND_S


@pytest.mark.parametrize("seed", range(5))
def test_the_first_few_are_those_that_would_come_out(seed: int) -> None:
    rng = random.Random(seed)
    heap: UrgencyHeap[int] = UrgencyHeap()
    for i in range(300):
        heap.push(i, rng.choice([1.0, 2.0, rng.random()]), float(i % 7), rng.choice([-1, 0, 2**40]))
    for _ in range(200):
        item = rng.randrange(300)
        if item in heap and rng.random() < 0.3:
            heap.remove(item)
        elif item in heap:
            rank, key = rng.choice([-1, 0]), rng.choice([1.0, rng.random()])
            heap.rekey(item, key, rank)
            heap.rekey(item, 5.0, rank)
            heap.rekey(item, key, rank)
        most = rng.randint(0, 12)
        assert heap.first(most) == list(heap)[:most]
    assert heap.first(1) == [heap.peek()]
    assert UrgencyHeap[int]().first(3) == []


def test_each_term_of_the_end_to_end_key() -> None:
    assert latest_start(100.0, 20.0, 5.0) == 75.0
    assert latest_start(NO_DEADLINE, 20.0, 5.0) == NO_DEADLINE


@pytest.mark.parametrize(
    ("service_s", "tail_s", "budget_s"),
    [(5.0, 15.0, 22.5), (5.0, 0.0, 90.0), (0.0, 5.0, 0.0), (0.0, 0.0, 90.0), (0.25, 0.25, 45.0)],
)
def test_each_term_of_the_per_stage_key(service_s: float, tail_s: float, budget_s: float) -> None:
    """A call of 10 s that is due at 100 s: b is its own share of 90 s."""
    assert stage_budget(90.0, service_s, tail_s) == budget_s
    key_s = paper_key(10.0, 100.0, tail_s, service_s)
    assert key_s == 10.0 + budget_s - service_s
    for now in (10.0, 30.0):
        assert now - key_s == service_s - (budget_s - (now - 10.0))
    assert paper_key(10.0, NO_DEADLINE, tail_s, service_s) == NO_DEADLINE


def test_keys_of_classes() -> None:
    assert late_key(deadline_s=30.0, began_s=25.0) == LATE_S + 30.0 + 8 * 5.0
    assert late_key(deadline_s=30.0, began_s=31.0) == LATE_S + 30.0
    assert late_key(deadline_s=4e9, began_s=0.0) < BATCH_S
    assert batch_key(5.0) == BATCH_S + 5.0
    assert background_key(5.0) == BACKGROUND_S + 5.0


def test_an_empty_heap_is_false_and_a_filled_one_true() -> None:
    heap: UrgencyHeap[str] = UrgencyHeap()
    assert bool(heap) is False
    heap.push("a", 1.5, 0.0)
    assert bool(heap) is True
    assert heap.unordered() == ["a"]


def test_a_new_rank_moves_an_item_whose_key_stays() -> None:
    heap: UrgencyHeap[str] = UrgencyHeap()
    heap.push("a", 1.0, 0.0, rank=1)
    heap.push("b", 2.0, 0.0, rank=0)
    heap.rekey("a", 1.0, rank=0)
    assert heap.pop() == "a"
