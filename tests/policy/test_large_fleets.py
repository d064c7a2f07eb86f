"""Decisions that do not grow with the fleet: who is looked at again, and on which engines."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.coordinator import LOOK_S, Coordinator
from hexgen_vllm.policy.dispatch import Choice, Dispatch
from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad
from hexgen_vllm.policy.engines import Engines
from hexgen_vllm.policy.marginal_cost import MarginalCost
from hexgen_vllm.policy.placements import placement
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineKind,
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


@pytest.mark.parametrize("seed", range(8))
def test_of_few_engines_every_decision_is_that_of_an_exhaustive_search(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when rates, prompts in caches, knobs and deadlines move under calls that wait."""
    logs, looks = [], []
    for exhaustive in (False, True):
        rng, now, policy = random.Random(seed), 0.0, Counted(DispatchOptions())
        monkeypatch.setattr("hexgen_vllm.policy.coordinator.placement", lambda _, p=policy: p)
        coordinator = fleet(rng.choice((2, 4, 8)), exhaustive=exhaustive, slots=2)
        seen = coordinator.engines
        flying: list[str] = []
        for i in range(300):
            now += rng.random() * 0.02
            name, engine = rng.choice(flying or [""]), rng.choice(list(seen.values()))
            asked = Call(f"c{i}", f"w{i}", now, 35_000, prefix_chunk_tokens=10_000)
            asked.prefix = (i % 3, 10 + i % 7, 100 + i)[: rng.randrange(4)]
            asked.deadline_s = now + rng.choice((1.0, 5.0, 60.0, math.inf))
            decisions = list(coordinator.call_arrived(asked, now))
            event = rng.random()
            if event < 0.6 and flying:
                flying.remove(name)
                decisions += coordinator.call_finished(name, OK, now)
            elif event < 0.75 and flying:
                coordinator.call_progressed(name, rng.randrange(1, 300), now)
            elif event < 0.85:
                cost = COST.scaled(rng.uniform(0.5, 4.0))
                report = EngineReport(cost=cost, fit_error=0.01, prefill_share=rng.random())
                coordinator.engine_reported(engine.engine_id, report, now)
            elif event < 0.9:
                engine.prefixes.drop(rng.choice((0, 1, 2, 11, 12)))
            elif event < 0.95:
                knobs = DispatchOptions(
                    hold_depth=0,
                    externality=rng.random(),
                    stretch=rng.choice((0.0, 0.5)),
                    prefix_affinity=rng.random() < 0.7,
                )
                decisions += coordinator.retune(knobs, now)
            else:
                decisions += coordinator.tick(now)
            flying += [d.call_id for d in decisions if isinstance(d, Placement)]
        logs.append(list(coordinator.log))
        looks.append(policy.made)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 100
    assert looks[0] < looks[1], "who is sure to wait on is not chosen for anew"


class Counted(MarginalCost):
    """The default policy, which counts its choices."""

    made = 0

    def choose(
        self, demand: Demand, engines: Sequence[EngineLoad], claims: Mapping[str, int], now: float
    ) -> Choice:
        self.made += 1
        return super().choose(demand, engines, claims, now)


def engines(count: int) -> tuple[Engines, list[EngineLoad]]:
    found = Engines()
    for i in range(count):
        found.joined(EngineSpec(f"e{i:04}", max_num_seqs=4), EngineState.READY)
    loads = list(found.loads.values())
    for i, load in enumerate(loads):
        load.reported(EngineReport(cost=COST.scaled(1 + (i * 7919) % count), fit_error=0.01))
    return found, loads


NOBODY: frozenset[str] = frozenset()


def lived_in(rng: random.Random, count: int, kind: EngineKind) -> list[EngineLoad]:
    """Return engines that hold some of the prompts, some of them with more calls than slots."""
    found = []
    for i in range(count):
        one = EngineLoad(EngineSpec(f"e{i:03}", kind=kind, max_num_seqs=rng.choice((2, 8, 64))))
        if rng.random() < 0.9:
            cost = StepCost(*(c * rng.uniform(0.3, 3.0) for c in (0.02, 1e-3, 1e-7, 1e-3, 1e-4, 0)))
            share = rng.choice((None, rng.random()))
            one.reported(EngineReport(cost=cost, fit_error=0.01, prefill_share=share))
        for number in range(rng.choice((0, 1, 3, rng.randrange(12)))):
            asked = Call(f"{i}-{number}", "w", 0.0, rng.randrange(1, 3000))
            asked.prefix = tuple(range(rng.randrange(8)))
            asked.prefix_chunk_tokens = 300
            at = Placement(asked.call_id, one.engine_id, "", uncached_tokens=asked.prompt_tokens)
            at.due_s, at.expected_output_tokens = rng.uniform(0.0, 20.0), rng.randrange(1, 400)
            flight = InFlight(asked, at, 0.0)
            one.placed(flight)
            if rng.random() < 0.6:
                flight.first_token_s = 0.0
                one.started(flight)
        if rng.random() < 0.3:
            one.elsewhere = Elsewhere(rng.randrange(6), *(rng.randrange(4000) for _ in range(3)))
        found.append(one)
    return found


@pytest.mark.parametrize("kind", list(EngineKind))
@pytest.mark.parametrize("seed", range(4))
def test_the_engine_chosen_is_that_of_forecasting_all(seed: int, kind: EngineKind) -> None:
    rng = random.Random(seed)
    policy = placement(DispatchOptions(stretch=0.0, externality=rng.choice((0.0, 0.3, 1.0))))
    for number in range(25):
        fleet = lived_in(rng, rng.choice((2, 9, 40)), kind)
        asked = Call(f"c{number}", "w", 0.0, rng.randrange(1, 3000))
        asked.prefix = tuple(range(rng.randrange(8)))
        asked.prefix_chunk_tokens = 300
        due_s = rng.choice((math.inf, rng.uniform(0.0, 20.0)))
        demand = Demand(asked, rng.randrange(1, 300), due_s, 0.0, due_s, 0.0)
        claims = {e.engine_id: rng.randrange(1, 5) for e in fleet if rng.random() < 0.2}
        # As many of one engine as there are: they share prefixes among as many as the fleet does.
        scores = [policy.choose(demand, [e] * len(fleet), claims, 1.0).score for e in fleet]
        choice = policy.choose(demand, fleet, claims, 1.0)
        at = scores.index(min(scores))
        if any(e.cost() is None for e in fleet):  # taken for what the others are
            known = [i for i, e in enumerate(fleet) if e.cost() is not None]
            assert choice.score <= min((scores[i] for i in known), default=math.inf)
        else:
            assert (choice.engine, choice.score) == (fleet[at], scores[at])
        policy.placed(demand, choice, 1.0)


@pytest.mark.parametrize("count", [1, 4, 160])
def test_a_prefix_is_shared_among_all_engines_of_the_fleet(count: int) -> None:
    many, loads = engines(count)
    policy = placement(DispatchOptions(stretch=0.0, externality=1.0))
    asked = call(1, 0.0, prefix=(1, 2))
    demand = Demand(asked, 10, math.inf, 0.0, math.inf, 0.0)
    for load in loads:
        load.reported(EngineReport(cost=COST, fit_error=0.0))
        load.placed(InFlight(call(2, 0.0), Placement("c2", load.engine_id, ""), 0.0))
    candidates = many.candidates(asked, NOBODY)
    before = policy.choose(demand, candidates, {}, 0.0)
    policy.placed(demand, before, 0.0)  # only asked for; nobody has it yet
    after = policy.choose(demand, candidates, {}, 0.0)
    saved = COST.p1 * 20 * (1.0 - 1.0 / (1.0 + 1.0 / count))
    assert before.score - after.score == pytest.approx(saved, rel=1e-6)


def test_the_engines_that_take_calls_are_those_of_now() -> None:
    few, loads = engines(8)
    asked, other = call(1, 0.0), call(2, 0.0)
    other.model = "other"
    assert few.candidates(asked, NOBODY) == few.candidates(asked, NOBODY) == loads
    few.changed("e0003", EngineState.DOWN)
    assert few.candidates(asked, NOBODY) == [e for e in loads if e.engine_id != "e0003"]
    few.changed("e0003", EngineState.READY)
    few.left("e0000")
    assert few.candidates(asked, NOBODY) == loads[1:]
    few.serves("e0005", frozenset(("base",)))
    assert few.candidates(other, NOBODY) == [e for e in loads[1:] if e.engine_id != "e0005"]
    few.serves("e0005", frozenset())
    few.joined(EngineSpec("e0000"), EngineState.READY)
    assert few.candidates(asked, NOBODY) == [few.loads["e0000"], *loads[1:]]


def test_an_engine_on_trial_takes_one_call_at_a_time() -> None:
    few, loads = engines(3)
    few.changed("e0001", EngineState.TRIAL)
    asked = call(1, 0.0)
    assert few.candidates(asked, NOBODY) == loads
    loads[1].placed(InFlight(asked, Placement("c1", "e0001", ""), 0.0))
    assert few.candidates(asked, NOBODY) == [loads[0], loads[2]]
    loads[1].removed("c1")
    assert few.candidates(asked, NOBODY) == loads


def test_a_call_that_an_engine_refused_or_that_has_a_home_sees_the_others() -> None:
    many, loads = engines(100)
    asked = call(1, 0.0)
    assert many.candidates(asked, NOBODY) == loads
    assert many.candidates(asked, frozenset((loads[0].engine_id,))) == loads[1:]
    assert many.candidates(asked, NOBODY) == loads
    bound = call(1, 0.0)
    bound.engine = loads[-1].engine_id
    assert many.candidates(bound, NOBODY) == [loads[-1]]
    assert many.candidates(asked, NOBODY) == loads


def test_names_of_models_do_not_fill_the_memory() -> None:
    few, loads = engines(2)
    for number in range(2000):
        asked = call(1, 0.0)
        asked.model = f"m{number}"
        assert few.candidates(asked, NOBODY) == loads
    assert len(few._by_model) < 1000


def test_calls_spread_over_equal_engines_of_a_large_fleet() -> None:
    coordinator = fleet(160, slots=64)
    for i in range(1000):
        (placed,) = coordinator.call_arrived(call(i, 0.0), 0.0)
        assert isinstance(placed, Placement)
    for kind in range(3):
        calls = [len(e.in_flight) for e in list(coordinator.engines.values())[kind::3]]
        assert max(calls) - min(calls) <= 2


def test_the_pace_of_an_engine_changes_with_its_calls() -> None:
    coordinator = fleet(1, slots=8)
    (engine,) = coordinator.engines.values()

    def pace() -> float:
        cost = engine.cost()
        assert cost is not None
        return engine.token_s(cost)

    idle = pace()
    coordinator.call_arrived(call(1, 0.0), 0.0)
    busy = pace()
    assert busy > idle
    engine.elsewhere = Elsewhere(1, 0, 100, 10)
    assert pace() > busy
    engine.elsewhere = Elsewhere()
    assert pace() == busy
    coordinator.call_finished("c1", OK, 1.0)
    assert pace() == idle
    coordinator.engine_reported("e00", EngineReport(cost=COST.scaled(2), fit_error=0.01))
    assert pace() == pytest.approx(2 * idle)
    half = EngineReport(cost=COST.scaled(2), fit_error=0.01, prefill_share=0.5)
    coordinator.engine_reported("e00", half)
    assert pace() == pytest.approx(4 * idle)


@pytest.mark.parametrize("seed", range(4))
def test_asking_between_events_changes_no_bound_of_an_engine(seed: int) -> None:
    """What an engine keeps between two questions is that of a twin that is asked for the first."""
    rng = random.Random(seed)
    one, two = (EngineLoad(EngineSpec("e", max_num_seqs=3)) for _ in range(2))
    flights: list[tuple[InFlight, InFlight]] = []
    asked = Demand(call(0, 0.0), 40, math.inf, 0.0, math.inf, 0.0)
    for number in range(300):
        event = rng.random()
        if event < 0.3 or not flights:
            at = Placement(f"c{number}", "e", "", expected_output_tokens=rng.randrange(1, 90))
            made = call(number, 0.0)
            both = InFlight(made, at, 0.0), InFlight(made, at, 0.0)
            one.placed(both[0])
            two.placed(both[1])
            flights.append(both)
        elif event < 0.6:
            tokens, longer = rng.randrange(100), rng.choice((None, rng.randrange(300)))
            for load, flight in zip((one, two), rng.choice(flights), strict=True):
                flight.output_tokens, flight.longer = tokens, longer
                load.progressed(flight)
        elif event < 0.9:
            gone = flights.pop(rng.randrange(len(flights)))[0].call.call_id
            one.removed(gone)
            two.removed(gone)
        else:
            beside = rng.choice((Elsewhere(), Elsewhere(rng.randrange(1, 4), 0, 100, 50)))
            one.elsewhere = two.elsewhere = beside
        asked_s = one.least_finish_s(asked, COST, 0, COST.prefill_s(100), 0, 1.0)
        assert one.calls == len(one.in_flight) + one.elsewhere.calls
        if rng.random() < 0.1 or number == 299:
            assert asked_s == two.least_finish_s(asked, COST, 0, COST.prefill_s(100), 0, 1.0)
            assert one.forecast(asked, COST).finish_in_s == two.forecast(asked, COST).finish_in_s
