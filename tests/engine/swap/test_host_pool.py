"""The books of the host memory add up whatever is taken, given back, evicted or loaded."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.engine.requests import CallState
from hexgen_vllm.engine.swap.pool import (
    Extent,
    HostCopy,
    HostPool,
    RecordSpace,
)

NOW = 100.0


def call(latest_start_s: float = NOW) -> CallState:
    return CallState(
        workflow_id="w", arrived_s=NOW, began_s=NOW, turn=1, deadline_s=NOW, tail_s=0.0,
        expected_tokens=10, background=False, latest_start_s=latest_start_s,
    )  # fmt: skip


def copy(name: str, saves_s: float = 1.0, first_block: int = 0) -> HostCopy:
    return HostCopy(name, call(), 100, first_block, 0, saves_s)


def records(extents: tuple[Extent, ...] | list[Extent]) -> list[int]:
    return [extent.first + i for extent in extents for i in range(extent.size)]


def test_one_piece_where_there_is_one_else_the_largest() -> None:
    space = RecordSpace(10)
    taken = [space.take(n) for n in (2, 3, 1, 4)]
    assert taken == [(Extent(0, 2),), (Extent(2, 3),), (Extent(5, 1),), (Extent(6, 4),)]
    assert space.take(1) is None
    space.give_back([Extent(0, 2), Extent(6, 4)])
    assert space.take(2) == (Extent(0, 2),)
    space.give_back([Extent(0, 2)])
    assert space.take(5) == (Extent(6, 4), Extent(0, 1))
    assert space.free == 1


def test_neighbours_become_one_piece_again() -> None:
    space = RecordSpace(6)
    parts = [space.take(2) or () for _ in range(3)]
    for i in (0, 2, 1):
        space.give_back(parts[i])
    assert space.take(6) == (Extent(0, 6),)


def test_nothing_is_taken_twice() -> None:
    rng, space = random.Random(0), RecordSpace(50)
    held: list[tuple[Extent, ...]] = []
    for _ in range(2000):
        if rng.random() < 0.5 and held:
            space.give_back(held.pop(rng.randrange(len(held))))
        else:
            count = rng.randint(1, 12)
            taken = space.take(count)
            assert (taken is None) == (count > space.free + (0 if taken is None else count))
            if taken is not None:
                assert len(records(taken)) == count
                held.append(taken)
        used = [record for extents in held for record in records(extents)]
        assert len(used) == len(set(used)) == 50 - space.free
        assert all(0 <= record < 50 for record in used)


def test_part_of_a_copy_is_found_across_its_pieces() -> None:
    one = copy("a", first_block=3)
    one.extents = (Extent(10, 2), Extent(20, 3), Extent(30, 1))
    assert records(one.records(3, 9)) == [10, 11, 20, 21, 22, 30]
    assert records(one.records(4, 6)) == [11, 20]
    assert records(one.records(6, 9)) == [21, 22, 30]
    assert one.records(9, 9) == []


def test_room_is_made_by_worth() -> None:
    pool = HostPool(RecordSpace(10))
    for name, saves_s in (("poor", 0.1), ("rich", 9.0)):
        assert pool.put(copy(name, saves_s), 5, NOW) == []
    assert pool.put(copy("none", 0.01), 1, NOW) is None
    evicted = pool.put(copy("fair", 1.0), 4, NOW)
    assert [c.request_id for c in evicted or ()] == ["poor"]
    assert pool.copies.keys() == {"rich", "fair"}
    assert pool.used == 9
    assert pool.put(copy("huge", 99.0), 11, NOW) is None
    assert pool.copies.keys() == {"rich", "fair"}


def test_urgency_is_that_of_the_moment() -> None:
    pool = HostPool(RecordSpace(5))
    stored = copy("stored")
    pool.put(stored, 5, NOW)
    assert pool.put(copy("new"), 5, NOW) is None
    stored.owner.latest_start_s = NOW + 60
    assert pool.put(copy("new"), 5, NOW) == [stored]


def test_records_being_read_are_not_given_away_in_the_same_step() -> None:
    pool = HostPool(RecordSpace(4))
    pool.put(copy("a"), 3, NOW)
    pool.load("a")
    assert pool.used == 3
    assert pool.put(copy("b"), 3, NOW) is None
    pool.step_ends()
    assert pool.used == 0
    assert pool.put(copy("b"), 3, NOW) == []


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_dropping_frees_once(name: str) -> None:
    pool = HostPool(RecordSpace(4))
    pool.put(copy("a"), 3, NOW)
    assert (pool.drop(name) is None) == (name == "unknown")
    assert pool.drop("unknown") is None
    assert pool.used == (0 if name == "a" else 3)
