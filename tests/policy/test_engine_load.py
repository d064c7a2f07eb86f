"""An engine's figures are kept by increments; they are those of the calls that are there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hexgen_vllm.policy.calls import Demand, Handover, InFlight
from hexgen_vllm.policy.engine_load import Elsewhere, EngineLoad, TransferRate
from hexgen_vllm.types import (
    Call,
    CallResult,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Role,
    StepCost,
)

COST = StepCost(c0=0.01, c1=1e-3, c2=1e-6, p0=2e-3, p1=1e-4, p2=1e-8)
OTHERS = Elsewhere(calls=3, prefill_tokens=100, context_tokens=700, output_tokens=60)
ENDS = [10, 20, 30]  # of the calls of OTHERS: spread evenly, 60 in all


def demand(due_s: float = 50.0, **said: object) -> Demand:
    return Demand(Call("new", "w", 0.0, 1_000, **said), 100, 60.0, 10.0, due_s, 0.0)  # type: ignore[arg-type]


def engine(
    *outputs: int,
    started: int = 0,
    due_s: tuple[float, ...] = (),
    slots: int = 8,
    kind: EngineKind = EngineKind.HEXGEN,
    role: Role = Role.BOTH,
) -> EngineLoad:
    """An engine with calls of 500 tokens that have ``outputs`` to write; the first have begun."""
    load = EngineLoad(EngineSpec("e", kind=kind, max_num_seqs=slots, role=role))
    load.reported(EngineReport(cost=COST))
    for i, output in enumerate(outputs):
        entry = flight(f"{i}", output, due_s=due_s[i] if due_s else 40.0)
        load.placed(entry)
        if i < started:
            entry.first_token_s = 1.0
            load.started(entry)
    return load


def flight(
    name: str, output: int = 40, prompt: int = 500, uncached: int = 500, **said: object
) -> InFlight:
    placement = Placement(
        name, "e", "", expected_output_tokens=output, uncached_tokens=uncached,
        **said,  # type: ignore[arg-type]
    )  # fmt: skip
    return InFlight(Call(name, "w", 0.0, prompt), placement, 0.0)


def check(load: EngineLoad, there: dict[str, InFlight], waiting: set[str]) -> None:
    """Compare figures with those of the calls that are there, some of which await their prefill."""
    calls, others = list(there.values()), load.elsewhere
    uncached = sum(there[name].placement.uncached_tokens for name in waiting)
    context = sum(entry.call.prompt_tokens for entry in calls)
    left = sorted(entry.output_left() for entry in calls)
    every = len(calls) + others.calls
    assert load.own() == (len(calls), uncached, context, sum(left))
    assert (load.calls, load.context_tokens()) == (every, context + others.context_tokens)
    assert load.queued_prefill_tokens() == uncached
    assert load.outstanding_tokens() == uncached + sum(left)
    assert load.demoted == sum(entry.placement.background for entry in calls)
    assert load.room(0) is (every < 5)
    load.state = EngineState.TRIAL
    assert load.room(99) is load.open is all(entry.started for entry in calls)
    load.state = EngineState.READY
    batch = min(5, every + 1)
    seen = (context + others.context_tokens) * batch / (every + 1)
    assert load.token_s(COST) == pytest.approx(COST.step_s(batch, seen))
    ends = sorted(left + ENDS * (others is OTHERS)) or [0]
    for claims in (0, 1, 5):
        first = ends[0] * load.token_s(COST) if every + claims >= 5 else 0.0
        found = load.least_finish_s(demand(), COST, 0, 7.0, claims, 0.0)
        assert found == pytest.approx(7.0 + first)


def test_what_an_engine_does_is_what_its_calls_do() -> None:
    rng, load = random.Random(1), engine(slots=5)
    there, waiting = dict[str, InFlight](), set[str]()
    for number in range(600):
        # Slowly more calls, then fewer, until none is left again and again.
        chosen = rng.choice(sorted(there)) if there else ""
        more = ("place",) * (1 + number % 150 // 60)
        event = rng.choice((*more, "end", "start", "write", "tell"))
        if event == "place":
            entry = flight(f"{number}", rng.randrange(1, 60), prompt := rng.randrange(1, 900),
                           rng.randrange(1, prompt + 1), background=rng.random() < 0.3)  # fmt: skip
            if rng.random() < 0.3:
                entry.starts_s = number + rng.randrange(20)
            there[f"{number}"] = entry
            waiting.add(f"{number}")
            load.placed(entry)
        elif event == "tell":
            load.elsewhere = rng.choice((Elsewhere(), OTHERS))
        elif event == "end":
            assert load.removed(chosen or "unknown") is there.pop(chosen, None)
            waiting.discard(chosen)
        elif chosen and event == "write":
            there[chosen].output_tokens += rng.randrange(30)
            if rng.random() < 0.3:  # it outran what was expected
                there[chosen].longer = there[chosen].output_tokens + rng.randrange(90)
            load.progressed(there[chosen])
        elif chosen and event == "start" and not there[chosen].started:
            there[chosen].first_token_s = float(number)
            waiting.discard(chosen)
            load.started(there[chosen])
        load.presume(float(number))
        waiting -= {n for n in waiting if (s := there[n].starts_s) is not None and s <= number}
        check(load, there, waiting)


def test_loads_of_several_coordinators_add_up() -> None:
    assert Elsewhere.total([]) == Elsewhere()
    assert Elsewhere.total([OTHERS, Elsewhere(1, 2, 3, 4)]) == (4, 102, 703, 64)


@pytest.mark.parametrize(
    ("load", "claims", "tokens"),
    [
        (engine(9, 99, slots=2, started=2), 0, 9.0),
        (engine(9, 99, slots=2, started=2), 1, 99.0),  # a claim takes the first
        (engine(9, 99, slots=2, started=2), 2, 9.0 + 54.0),  # two both: a mean later
        (engine(9, 99, 60, slots=2, started=2), 0, 60.0),  # one is due before
        (engine(9, 99, 60, slots=2, started=2, due_s=(0.0, 0.0, 50.0)), 0, 60.0),  # or as early
        (engine(9, 99, 60, slots=2, started=2, due_s=(0.0, 0.0, 55.0)), 0, 9.0),  # not one later
        (engine(9, 99, 60, 60, slots=2, started=2), 0, 9.0 + 57.0),  # two are
        (engine(9, 99, 60, slots=2, started=2, due_s=(0.0, 0.0, 55.0), kind=EngineKind.FCFS), 0,
         60.0),
        (engine(slots=1), 1, 0.0),
        (engine(9, 99, started=2), 5, 0.0),
        (engine(9, 99, slots=1, started=1), 0, 9.0 + 54.0),
    ],
)  # fmt: skip
def test_a_slot_is_free_when_those_before_have_had_theirs(
    load: EngineLoad, claims: int, tokens: float
) -> None:
    wait_s = load.forecast(demand(), COST, claims).wait_s
    assert wait_s == pytest.approx(tokens * load.token_s(COST))


@pytest.mark.parametrize(("kind", "ahead", "tokens"), [
    (EngineKind.HEXGEN, 1, 500), (EngineKind.FCFS, 2, 500 + 100),
])  # fmt: skip
def test_calls_of_others_are_in_the_way(kind: EngineKind, ahead: int, tokens: int) -> None:
    load = engine(25, 45, slots=2, started=1, kind=kind)
    load.elsewhere = OTHERS
    found = load.forecast(demand(), COST)
    rounds, left = divmod(ahead, 2)
    ends = sorted([25, 45, *ENDS])
    mean = (25 + 45 + 60) / 5
    assert found.wait_s == pytest.approx((ends[left] + rounds * mean) * load.token_s(COST))
    own_s = COST.prefill_s(1_000)
    assert found.prefill_s == pytest.approx(COST.prefill_s(tokens) + own_s)
    row_s = COST.c1 + COST.c2 * 1_000
    assert found.delay_others_s == pytest.approx(5 * own_s + row_s * mean * 2)
    load.elsewhere = OTHERS._replace(prefill_tokens=0)
    assert load.forecast(demand(), COST).prefill_s == pytest.approx(COST.prefill_s(500) + own_s)


def test_prompts_of_all_that_are_due_before_are_computed_before() -> None:
    load = engine(9, 99, 60, 60, started=1, due_s=(0.0, 40.0, 60.0, 40.0))
    before_s = COST.prefill_s(2 * 500) + COST.prefill_s(1_000)
    assert load.forecast(demand(), COST).prefill_s == pytest.approx(before_s)


def test_an_engine_remembers_as_many_prompts_as_it_has_room_for() -> None:
    load = EngineLoad(EngineSpec("e", kv_tokens=500))
    call = Call("c", "w", 0.0, 1_000, prefix=(1, 2, 3, 4), prefix_chunk_tokens=250)
    load.prefixes.add(call)
    assert load.prefixes.match(call) == 500


def test_nothing_is_before_the_first_call() -> None:
    load = engine(kind=EngineKind.FCFS)
    assert load.forecast(demand(), COST).prefill_s == pytest.approx(COST.prefill_s(1_000))
    load.elsewhere = OTHERS._replace(prefill_tokens=1)
    behind_s = COST.prefill_s(1) + COST.prefill_s(1_000)
    assert load.forecast(demand(), COST).prefill_s == pytest.approx(behind_s)


@pytest.mark.parametrize("slots", [1, 8])
def test_a_prompt_from_elsewhere_arrives_while_the_call_waits(slots: int) -> None:
    load, new = engine(40, slots=slots, started=1, role=Role.DECODE), demand()
    new.handover = Handover("p", 0.05, 0, 0.0, 0.0, 0.0)
    found, token_s = load.forecast(new, COST), load.token_s(COST)
    wait_s = 40 * token_s if slots == 1 else 0.0
    assert (found.wait_s, found.arrives_s) == (pytest.approx(wait_s), pytest.approx(0.05))
    assert found.prefill_s == pytest.approx(max(0.05 - wait_s, 0.0))
    assert found.uncached_tokens == 1, "the last token of a prompt is computed where it is answered"
    row_s = COST.c1 + COST.c2 * 1_000
    assert found.delay_others_s == pytest.approx(row_s * 40)
    least_s = load.least_finish_s(new, COST, 0, 9.0, 0, 10.0)
    assert least_s == pytest.approx(max(0.05, wait_s) + 10 * token_s)


def test_a_call_that_follows_what_one_engine_has_runs_there() -> None:
    load = EngineLoad(EngineSpec("e@1", models=("m",)))
    assert load.serves(Call("c", "w", 0.0, 1, model="m"))
    assert load.serves(Call("c", "w", 0.0, 1, model="m", engine="e"))
    assert not load.serves(Call("c", "w", 0.0, 1, model="m", engine="e@1"))
    assert not load.serves(Call("c", "w", 0.0, 1, model="n"))
    load.state = EngineState.DRAINING
    assert not load.serves(Call("c", "w", 0.0, 1, model="m"))


# What is learned


def answered(load: EngineLoad, number: int, seconds: float, **result: object) -> None:
    """Let a call of which one half as many others were there end after ``seconds``."""
    entry = flight("c", 40, 600 + 10 * number, 100 + 90 * (number % 5))
    entry.batch, entry.placed_s = 3, 5.0
    said: dict[str, object] = {"output_tokens": 1 + number % 9, **result}
    load.learn(entry, CallResult(ok=True, **said), 5.0 + seconds)  # type: ignore[arg-type]


def took_s(number: int) -> float:
    return 0.02 * (1 + number % 9) + 1e-4 * (100 + 90 * (number % 5))


@pytest.mark.parametrize("told", [False, True])
def test_answers_teach_what_a_step_costs(told: bool) -> None:
    """With those that were there at first and those at the end, half of the answer as context."""
    load, other = EngineLoad(EngineSpec("e")), EngineLoad(EngineSpec("e"))
    load.placed(flight("a"))
    assert (load.error, load.doubted, load.fitted_s) == (None, False, 0.0)
    changed_s = 0.0
    for i in range(60):
        prompt, uncached, tokens = 600 + 10 * i, 100 + 90 * (i % 5), 1 + i % 9
        if told:
            answered(load, i, took_s(i), prompt_tokens=prompt + 7, cached_tokens=prompt - uncached)
            prompt, uncached = prompt + 7, uncached + 7
        else:
            answered(load, i, took_s(i))
        context = prompt + tokens / 2
        took, was = 5.0 + took_s(i) - 5.0, other.traffic_fit.cost()
        other.traffic_fit.observe_call(tokens, (3 + 2) / 2, context, uncached, took)
        assert load.learned() == other.learned()
        if other.traffic_fit.cost() is not was:
            changed_s = 5.0 + took_s(i)
        assert load.fitted_s == changed_s
    assert changed_s > 0.0
    before = load.traffic_fit.steps
    answered(load, 1, 1.0, output_tokens=0)
    load.reported(EngineReport(cost=COST))
    answered(load, 1, 1.0)
    assert load.traffic_fit.steps == before, "nothing from what it did not write, or tells itself"


def test_the_time_of_an_answer_begins_when_its_prompt_has_arrived() -> None:
    load, other = EngineLoad(EngineSpec("e")), EngineLoad(EngineSpec("e"))
    for _ in range(4):
        load.transfer.learn(1_000, 0.1)
    for i in range(60):
        entry, tokens = flight("c", 40, 600 + 10 * i, 1), 1 + i % 9
        entry.moved_s, entry.moved_tokens = 2.0, 500
        load.learn(entry, CallResult(ok=True, output_tokens=tokens), 2.0 + 0.05 + took_s(i))
        seen = entry.call.prompt_tokens + tokens / 2
        other.traffic_fit.observe_call(tokens, 1.0, seen, 1, took_s(i))
    assert other.traffic_fit.steps == load.traffic_fit.steps
    assert load.traffic_fit.error() == pytest.approx(other.traffic_fit.error())


def test_an_answer_that_took_no_transfer_time_is_not_charged_for_any() -> None:
    load, other = EngineLoad(EngineSpec("e")), EngineLoad(EngineSpec("e"))
    for i in range(60):
        entry, tokens = flight("c", 40, 600, 1), 1 + i % 9
        entry.moved_s, entry.moved_tokens = 2.0, 500  # how long that takes is not known yet
        load.learn(entry, CallResult(ok=True, output_tokens=tokens), 2.0 + took_s(i))
        other.traffic_fit.observe_call(tokens, 1.0, 600 + tokens / 2, 1, took_s(i))
    assert load.traffic_fit.error() == pytest.approx(other.traffic_fit.error())


def test_when_a_cost_was_last_learned() -> None:
    load = EngineLoad(EngineSpec("e"))
    for report, now, fitted_s in (
        (EngineReport(), 1.0, 0.0),  # of nothing, nothing
        (EngineReport(cost=COST), None, 0.0),  # nobody knows when
        (EngineReport(cost=COST.scaled(2.0)), 3.0, 3.0),
        (EngineReport(cost=COST.scaled(2.0)), 4.0, 3.0),  # the same again
        (EngineReport(), 5.0, 3.0),
        (EngineReport(cost=COST), 6.0, 6.0),
    ):
        load.reported(report, now)
        assert load.fitted_s == fitted_s


def test_what_others_learned_counts_until_it_is_known_here() -> None:
    load = EngineLoad(EngineSpec("e"))
    assert load.cost() is None
    load.told(COST, 0.1)
    assert (load.cost(), load.error, load.doubted) == (COST, 0.1, False)
    load.reported(EngineReport(cost=COST.scaled(2.0), fit_error=0.2))
    assert (load.cost(), load.error) == (COST.scaled(2.0), 0.2)
    load.reported(EngineReport(fit_error=0.3))
    assert (load.cost(), load.error) == (COST, 0.1)
    load.restarted(load.spec, EngineState.READY)
    assert (load.cost(), load.error) == (None, None)


def test_a_step_of_one_call_takes_time_or_was_not_measured() -> None:
    load = EngineLoad(EngineSpec("e"))
    load.reported(EngineReport(cost=replace(COST, c0=-0.001, c1=0.001), fit_error=0.1))
    assert (load.cost(), load.error) == (None, None)


@pytest.mark.parametrize("error", [1.0, 1.5])
def test_what_is_not_believed_at_all_is_unknown_rather_than_doubted(error: float) -> None:
    load = EngineLoad(EngineSpec("e"))
    load.reported(EngineReport(cost=COST, fit_error=error))
    assert (load.cost(), load.doubted) == (None, False)


@pytest.mark.parametrize(("calls", "known"), [(2, True), (2, False), (3, True)])
def test_a_first_token_tells_how_long_a_transfer_took(calls: int, known: bool) -> None:
    """From the time that the prompt was computed; a step is no part of it, nor is a queue."""
    load = EngineLoad(EngineSpec("e", max_num_seqs=2))
    if known:
        load.reported(EngineReport(cost=COST))
    step_s = load.token_s(COST) if known else 0.0
    for i in range(4):
        entries = [flight(f"{i}.{j}") for j in range(calls)]
        for entry in entries:
            load.placed(entry)
        if known:
            step_s = load.token_s(COST)
        entries[0].moved_s, entries[0].moved_tokens = 2.0, 100
        entries[0].first_token_s = 2.0 + step_s + 0.5
        load.started(entries[0])
        for entry in entries:
            load.removed(entry.call.call_id)
    expected = 9.0 if calls > 2 else 0.005
    assert load.transfer.token_s(9.0) == pytest.approx(expected)


def test_only_the_longest_transfers_of_late_tell() -> None:
    rate = TransferRate()
    for tokens, seconds in ((200, 1.0), (200, 1.0), (200, 1.0), (200, 1.0)):
        rate.learn(tokens, seconds)
    for tokens in (99, 99, 99, 99, 99, 99, 99, 99):
        rate.learn(tokens, 99.0)
    assert rate.token_s(0.0) == pytest.approx(1.0 / 200), "less than half as long are left out"
    for _ in range(9):
        rate.learn(100, 0.1)
    assert rate.token_s(0.0) == pytest.approx(0.001), "half as long are not"
    for _ in range(32):
        rate.learn(64, 0.32)
    assert rate.token_s(0.0) == pytest.approx(0.005), "32 make the others forgotten"


def test_the_first_to_end_is_another_when_it_gets_longer() -> None:
    load = engine(5, 50, slots=2, started=2)
    for longer, first in ((40, 40), (90, 50), (60, 50), (3, 3)):
        load.in_flight["0"].longer = longer
        load.progressed(load.in_flight["0"])
        found = load.least_finish_s(demand(), COST, 0, 0.0, 0, 0.0)
        assert found == pytest.approx(first * load.token_s(COST))
