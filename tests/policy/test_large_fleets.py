"""Decisions that do not grow with the fleet: who is looked at again, and on which engines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand
from hexgen_vllm.policy.coordinator import LOOK_S, Coordinator
from hexgen_vllm.policy.dispatch import Choice, Dispatch
from hexgen_vllm.policy.engines import LARGE, SHORT, EngineLoad, Engines
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    StepCost,
)

COST = StepCost(c0=0.02, c1=1e-4, c2=0.0, p0=0.0, p1=1e-4, p2=0.0)
FLEET = 12
OK = CallResult(True, 100, 0, 10)


class Wanting(Dispatch):
    """Sends every call to one engine, and counts how often it is asked."""

    def __init__(self) -> None:
        self.holds = True
        self.asked: list[str] = []
        self.wanted = "e00"

    def choose(
        self, demand: Demand, engines: Sequence[EngineLoad], claims: Mapping[str, int], now: float
    ) -> Choice:
        self.asked.append(demand.call.call_id)
        return Choice(next(e for e in engines if e.engine_id == self.wanted), 0.0, "wanted")


def call(number: int, now: float, *, prefix: tuple[int, ...] = ()) -> Call:
    return Call(f"c{number}", f"w{number}", now, 100, prefix=prefix, prefix_chunk_tokens=10)


def fleet(
    count: int = FLEET, *, exhaustive: bool = False, slots: int = 1, policy: str = "slack"
) -> Coordinator:
    options = DispatchOptions(policy=policy, hold_depth=0)
    found = Coordinator(options, exhaustive=exhaustive)
    for i in range(count):
        found.engine_joined(EngineSpec(f"e{i:02}", max_num_seqs=slots), 0.0)
        found.engine_reported(f"e{i:02}", EngineReport(cost=COST.scaled(1 + i % 3), fit_error=0.01))
    return found


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> tuple[Coordinator, Wanting]:
    """Return a fleet whose calls all want its first engine, which has one; 40 others wait."""
    asked = Wanting()
    monkeypatch.setattr("hexgen_vllm.policy.coordinator.placement", lambda options: asked)
    found = fleet()
    for i in range(41):
        found.call_arrived(call(i, 0.001), 0.001)
    assert found.held == 40
    asked.asked.clear()
    return found, asked


def test_who_waits_for_a_full_engine_is_not_asked_at_each_event(
    waiting: tuple[Coordinator, Wanting],
) -> None:
    coordinator, asked = waiting
    coordinator.call_arrived(call(99, 0.002), 0.002)
    assert asked.asked in ([], ["c99"])
    assert coordinator.held == 41


def test_room_on_the_engine_that_is_waited_for_is_given_at_once(
    waiting: tuple[Coordinator, Wanting],
) -> None:
    coordinator, asked = waiting
    (placed,) = coordinator.call_finished("c0", OK, 0.002)
    assert isinstance(placed, Placement)
    assert (placed.call_id, placed.engine_id) == ("c1", "e00")
    assert len(asked.asked) <= 2, "the next in order, and one that comes into sight"


def test_all_are_asked_again_after_a_while(waiting: tuple[Coordinator, Wanting]) -> None:
    coordinator, asked = waiting
    asked.wanted = "e05"
    coordinator.tick(0.002)
    assert coordinator.held == 40
    (placed,) = coordinator.tick(0.002 + LOOK_S * FLEET * 40)
    assert isinstance(placed, Placement)
    assert placed.engine_id == "e05"


@pytest.mark.parametrize("change", ["left", "down", "joined", "models"])
def test_all_are_asked_again_when_engines_change(
    waiting: tuple[Coordinator, Wanting], change: str
) -> None:
    coordinator, asked = waiting
    asked.wanted = "e05"
    decisions = {
        "left": lambda: coordinator.engine_left("e00", 0.002),
        "down": lambda: coordinator.engine_changed("e00", EngineState.DOWN, 0.002),
        "joined": lambda: coordinator.engine_joined(EngineSpec("e99"), 0.002),
        "models": lambda: coordinator.engine_serves("e07", frozenset(), 0.002),
    }[change]()
    assert [d.engine_id for d in decisions if isinstance(d, Placement)] == ["e05"]


@pytest.mark.parametrize("seed", range(3))
def test_no_call_is_forgotten(seed: int) -> None:
    """Every call of a random life is placed once, whoever left in between."""
    rng, coordinator, now = random.Random(seed), fleet(slots=2), 0.0
    flying: list[str] = []
    placed: list[str] = []

    def note(decisions: Sequence[object]) -> None:
        for one in decisions:
            assert isinstance(one, Placement)
            placed.append(one.call_id)
            flying.append(one.call_id)

    for i in range(400):
        now += rng.random() * 0.01
        note(coordinator.call_arrived(call(i, now), now))
        if flying and rng.random() < 0.8:
            name = flying.pop(rng.randrange(len(flying)))
            note(coordinator.call_finished(name, OK, now))
        if rng.random() < 0.02:
            name = f"e{rng.randrange(FLEET):02}"
            for state in (EngineState.DRAINING, EngineState.READY):
                note(coordinator.engine_changed(name, state, now))
    while flying:
        now += 0.01
        note(coordinator.call_finished(flying.pop(), OK, now))
    assert coordinator.held == 0
    assert sorted(placed) == sorted(f"c{i}" for i in range(400))
    assert not coordinator._waits_for


def test_of_few_engines_every_decision_is_that_of_an_exhaustive_search() -> None:
    logs = []
    for exhaustive in (False, True):
        rng, coordinator, now = random.Random(5), fleet(8, exhaustive=exhaustive), 0.0
        flying: list[str] = []
        for i in range(200):
            now += rng.random() * 0.01
            decisions = list(coordinator.call_arrived(call(i, now, prefix=(i % 5, i)), now))
            if flying and rng.random() < 0.9:
                name = flying.pop(rng.randrange(len(flying)))
                decisions += coordinator.call_finished(name, OK, now)
            flying += [d.call_id for d in decisions]
        logs.append(list(coordinator.log))
    assert logs[0] == logs[1]


def engines(count: int) -> tuple[Engines, list[EngineLoad]]:
    found = Engines()
    for i in range(count):
        found.joined(EngineSpec(f"e{i:04}", max_num_seqs=4), EngineState.READY)
    loads = list(found.loads.values())
    for i, load in enumerate(loads):
        load.reported(EngineReport(cost=COST.scaled(1 + (i * 7919) % count), fit_error=0.01))
    return found, loads


NOBODY: frozenset[str] = frozenset()


def test_of_few_engines_all_are_priced() -> None:
    few, loads = engines(LARGE)
    assert few.priced(call(1, 0.0), NOBODY) == loads


def test_of_many_the_least_crowded_are_priced_and_those_with_the_prompt() -> None:
    many, loads = engines(LARGE + 88)
    slowest = max(loads, key=lambda e: e.crowding())
    slowest.prefixes.add(call(1, 0.0, prefix=(1, 2, 3)))
    found = many.priced(call(2, 0.0, prefix=(1, 2, 9)), NOBODY)
    assert slowest in found
    assert len(found) == SHORT + 1
    assert [e.engine_id for e in found] == sorted(e.engine_id for e in found)
    worst = max(e.crowding() for e in found if e is not slowest)
    assert sum(e.crowding() < worst for e in loads) < SHORT


def test_of_many_with_the_prompt_those_with_most_of_it_are_priced() -> None:
    many, loads = engines(LARGE + 88)
    asked = call(2, 0.0, prefix=tuple(range(9)))
    by_crowding = sorted(loads, key=lambda e: e.crowding())
    for i, engine in enumerate(reversed(by_crowding[-100:])):
        engine.prefixes.add(call(1, 0.0, prefix=tuple(range(1 + i % 9))))
    found = many.priced(asked, NOBODY)
    assert sum(e.prefixes.match(asked) == 90 for e in found) >= 8
    assert len(found) <= SHORT + 16


def test_an_engine_that_takes_nothing_is_never_priced() -> None:
    many, loads = engines(LARGE + 88)
    asked = call(2, 0.0, prefix=(1,))
    first = many.priced(asked, NOBODY)
    for engine in (first[0], loads[-1]):
        engine.prefixes.add(call(1, 0.0, prefix=(1,)))
        many.changed(engine.engine_id, EngineState.DOWN)
        assert engine not in many.priced(asked, NOBODY)
    many.changed(first[0].engine_id, EngineState.READY)
    assert first[0] in many.priced(asked, NOBODY)
    many.left(first[1].engine_id)
    assert first[1] not in many.priced(asked, NOBODY)


def test_a_call_that_an_engine_refused_or_that_has_a_home_sees_all_others() -> None:
    many, loads = engines(LARGE + 88)
    refused = frozenset((loads[0].engine_id,))
    assert many.priced(call(1, 0.0), refused) == loads[1:]
    bound = call(1, 0.0)
    bound.engine = loads[-1].engine_id
    assert many.priced(bound, NOBODY) == [loads[-1]]


def test_the_short_list_follows_the_load() -> None:
    coordinator = fleet(LARGE + 88, slots=64)
    for i in range(6000):
        (placed,) = coordinator.call_arrived(call(i, 0.0), 0.0)
        assert isinstance(placed, Placement)
    fast = [len(e.in_flight) for i, e in enumerate(coordinator.engines.values()) if i % 3 == 0]
    assert sum(fast) == 6000, "so far none of the slow ones would be better"
    assert max(fast) - min(fast) <= 4


def test_what_crowds_an_engine_changes_with_its_calls() -> None:
    coordinator = fleet(1, slots=1)
    (engine,) = coordinator.engines.values()
    idle = engine.crowding()
    coordinator.call_arrived(call(1, 0.0), 0.0)
    full = engine.crowding()
    assert full >= 2 * idle
    coordinator.call_finished("c1", OK, 1.0)
    assert engine.crowding() == idle
    coordinator.engine_reported("e00", EngineReport(cost=COST.scaled(2), fit_error=0.01))
    assert engine.crowding() == pytest.approx(2 * idle)
