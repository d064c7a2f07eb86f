"""Overload: who is demoted, that demotion starves nobody, bounds of the queue, fair shares."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.overload import (
    FairShares,
    crowded,
    entry_margin,
    expired,
    fair_shares,
    hopeless_after,
    least_odds,
    no_endpoints,
    over_bounds,
    saturated,
    unattainable,
)
from hexgen_vllm.policy.queue import HeldCalls
from hexgen_vllm.policy.shapes import Shapes
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineKind,
    EngineReport,
    EngineSpec,
    Placement,
    Rejection,
    StepCost,
)

# 10 ms a step: 100 tokens/s
COST = StepCost(0.01, 0.0, 0.0, 0.0, 1e-5, 0.0)
DONE = CallResult(ok=True, output_tokens=100)


def coordinator(slots: int = 1, shapes: Shapes | None = None, **options: object) -> Coordinator:
    c = Coordinator(DispatchOptions(hold_depth=0, **options), shapes)  # type: ignore[arg-type]
    spec = EngineSpec("e0", kind=EngineKind.HEXGEN, max_num_seqs=slots, kv_tokens=100_000)
    c.engine_joined(spec, 0.0)
    c.engine_reported("e0", EngineReport(cost=COST))
    return c


def call(name: str, now: float, deadline_s: float, workflow: str = "", **more: object) -> Call:
    more = {"expected_output_tokens": 100, **more}
    return Call(name, workflow or f"w-{name}", now, 10, deadline_s=now + deadline_s, **more)  # type: ignore[arg-type]


def placed(decisions: list[Decision]) -> list[str]:
    return [d.call_id for d in decisions if isinstance(d, Placement)]


def refused(decisions: list[Decision]) -> list[tuple[str, str, int]]:
    return [(d.call_id, d.reason, d.status) for d in decisions if isinstance(d, Rejection)]


def drained(c: Coordinator, first: str, now: float) -> list[str]:
    """End calls one by one and return the order in which the held ones came."""
    order: list[str] = []
    running = [first]
    while running:
        found = placed(c.call_finished(running.pop(0), DONE, now))
        order += found
        running += found
    return order


def test_hopeless_is_a_matter_of_optimistic_time() -> None:
    assert hopeless_after(100.0, 20.0, 1.5) == 70.0
    assert hopeless_after(math.inf, 20.0, 1.5) == math.inf


def test_a_hopeless_workflow_comes_last_and_off_it_comes_first() -> None:
    for mode, expected in (
        ("off", ["dead", "soon", "late"]),
        ("protect", ["soon", "late", "dead"]),
    ):
        c = coordinator(overload=mode, entry_margin=0.0, reject_at_entry=False)
        c.call_arrived(call("run", 0.0, 9.0), 0.0)
        for name, deadline_s in (("late", 50.0), ("dead", 0.5), ("soon", 20.0)):
            assert c.call_arrived(call(name, 0.0, deadline_s), 0.0) == []
        assert drained(c, "run", 0.0) == expected


def test_a_held_call_that_becomes_hopeless_takes_its_siblings_along() -> None:
    c = coordinator(overload="protect", entry_margin=0.0)
    c.call_arrived(call("run", 0.0, 9.0), 0.0)
    for name, workflow in (("a", "w"), ("b", "w"), ("other", "o")):
        c.call_arrived(call(name, 0.0, 5.0 if workflow == "w" else 60.0, workflow), 0.0)
    decisions = c.call_finished("run", DONE, 8.0)
    assert placed(decisions) == ["other"]
    late = c.call_finished("other", DONE, 9.0)
    assert [d.background for d in late if isinstance(d, Placement)] == [True]
    run = c.workflows.get("w")
    assert run is not None
    assert run.background


def test_later_calls_of_a_demoted_workflow_are_background_too() -> None:
    c = coordinator(slots=4, overload="protect", entry_margin=0.0, reject_at_entry=False)
    first = c.call_arrived(call("a", 0.0, 0.1, "w"), 0.0)
    c.call_finished("a", DONE, 1.0)
    second = c.call_arrived(call("b", 1.0, 500.0, "w"), 1.0)
    backgrounds = [d.background for d in first + second if isinstance(d, Placement)]
    assert backgrounds == [True, True]


@pytest.mark.parametrize(("first", "demoted"), [("s", True), ("large", False)])
def test_little_work_is_done_for_a_small_chance(first: str, demoted: bool) -> None:
    """Half of such calls take longer than is left: worth it where new workflows take much more."""
    shapes = Shapes()
    for length in range(50, 550, 50):
        shapes.learn_output("t", "s", length)
        shapes.learn_output("t", "large", 60 * length)
    c = coordinator(slots=20, shapes=shapes, overload="protect", entry_margin=0.0)
    kind = {"workflow_type": "t", "final": True, "expected_output_tokens": None}
    c.call_arrived(call("new", 0.0, 1e6, stage=first, **kind), 0.0)
    c.call_arrived(call("a", 0.0, 1e6, "begun", workflow_type="t"), 0.0)
    c.call_finished("a", DONE, 1.0)
    (found,) = c.call_arrived(call("b", 1.0, 1.5, "begun", stage="s", **kind), 1.0)
    assert isinstance(found, Placement)
    assert found.background is demoted


def test_the_odds_asked_for_grow_with_the_work_left_up_to_those_of_new_workflows() -> None:
    assert [least_odds(0.5, left, 100.0) for left in (0.0, 10.0, 100.0, 900.0)] == [
        0.0, 0.05, 0.5, 0.5,
    ]  # fmt: skip
    assert least_odds(0.5, 10.0, 0.0) == 0.0


def test_demoted_calls_do_not_fill_the_engines_behind_the_others() -> None:
    protect = {"overload": "protect", "reject_at_entry": False, "entry_margin": 0.0}
    c = coordinator(slots=40, background_share=0.2, **protect)
    for i in range(10):
        assert placed(c.call_arrived(call(f"fine{i}", 0.0, 1e6), 0.0))
    late = [c.call_arrived(call(f"late{i}", 0.0, 0.1), 0.0) for i in range(8)]
    assert [len(placed(found)) for found in late] == [1, 1, 1, 0, 0, 0, 0, 0], (
        "a fifth of the calls"
    )
    assert placed(c.call_arrived(call("fine", 0.0, 1e6), 0.0)) == ["fine"], "who can be on time"
    assert placed(c.call_finished("late0", DONE, 1.0)) == ["late3"]
    for i in range(9):
        c.call_finished(f"fine{i}", DONE, 2.0)
    running = ["late1", "late2", "late3"]
    while running:
        running += placed(c.call_finished(running.pop(0), DONE, 3.0))
    assert c.held == 0, "while few slots are taken"


def test_demoted_calls_go_to_engines_that_only_they_can_use() -> None:
    protect = {"overload": "protect", "reject_at_entry": False, "entry_margin": 0.0}
    c = Coordinator(DispatchOptions(hold_depth=0, **protect))  # type: ignore[arg-type]
    for model in ("m", "n"):
        spec = EngineSpec(model, frozenset((model,)), EngineKind.HEXGEN, max_num_seqs=20)
        c.engine_joined(spec, 0.0)
        c.engine_reported(model, EngineReport(cost=COST))
    for i in range(6):
        c.call_arrived(call(f"fine{i}", 0.0, 1e6, model="m"), 0.0)
    for i, model in enumerate("mmnn"):
        c.call_arrived(call(f"late{i}", 0.0, 0.1, model=model), 0.0)
    assert len(c.engines["m"].in_flight) == 7
    assert len(c.engines["n"].in_flight) == 2


def test_ignorance_demotes_nobody() -> None:
    c = coordinator(overload="protect", entry_margin=0.0)
    one = Call("a", "w", 0.0, 10, deadline_s=0.5)
    decision = c.call_arrived(one, 0.0)[0]
    assert isinstance(decision, Placement)
    assert not decision.background


def test_a_new_workflow_must_fit_behind_the_queue_but_not_one_that_has_begun() -> None:
    c = coordinator(overload="protect", entry_margin=1.0, reject_at_entry=False)
    c.call_arrived(call("first", 0.0, 30.0, "begun"), 0.0)
    c.call_finished("first", DONE, 1.0)
    c.call_arrived(call("run", 1.0, 30.0), 1.0)
    for i in range(20):
        c.call_arrived(call(f"q{i}", 1.0, 90.0), 1.0)
    c.call_arrived(call("new", 1.0, 9.0), 1.0)
    c.call_arrived(call("next", 1.0, 9.0, "begun"), 1.0)
    order = drained(c, "run", 2.0)
    assert order[0] == "next"
    assert order[-1] == "new" or order.index("new") >= 8  # only its turn in ten brings it on


@pytest.mark.parametrize(("running", "turned_away"), [(0, False), (1, False), (3, True)])
def test_the_fuller_the_engines_the_more_time_a_new_workflow_needs(
    running: int, turned_away: bool
) -> None:
    """One second of work, 1.6 until the deadline: enough for a margin of 1.25, not of 1.75."""
    c = coordinator(slots=4, overload="protect", entry_margin=2.0)
    for i in range(running):
        c.call_arrived(call(f"r{i}", 0.0, 60.0), 0.0)
    assert bool(refused(c.call_arrived(call("new", 0.0, 1.6), 0.0))) is turned_away


def test_a_margin_up_to_1_is_the_same_for_empty_and_full_engines() -> None:
    assert [entry_margin(0.5, full) for full in (0.0, 1.0)] == [0.5, 0.5]


def test_a_workflow_without_a_deadline_is_not_refused_for_the_one_it_is_given() -> None:
    c = coordinator(slots=20, overload="protect", default_deadline_s=0.5)
    found = c.call_arrived(Call("a", "w", 0.0, 10, expected_output_tokens=100), 0.0)
    found += c.call_arrived(call("b", 0.0, 0.5, deadline_asked=False), 0.0)
    assert [d.background for d in found if isinstance(d, Placement)] == [True, True]


def test_a_new_workflow_that_would_be_late_is_refused() -> None:
    c = coordinator(overload="protect")
    found = c.call_arrived(call("dead", 0.0, 0.5), 0.0)
    assert refused(found) == [("dead", "rejected-saturated", 429)]
    assert placed(c.call_arrived(call("fine", 0.0, 50.0), 0.0)) == ["fine"]
    assert c.held == 0


@pytest.mark.parametrize("bound", [{"max_held_calls": 3}, {"max_held_tokens": 330}])
def test_a_full_queue_refuses_new_workflows_before_begun_ones(bound: dict[str, int]) -> None:
    c = coordinator(**bound)
    c.call_arrived(call("a", 0.0, 50.0, "begun"), 0.0)
    for i in range(3):
        assert c.call_arrived(call(f"q{i}", 0.0, 50.0 + i), 0.0) == []
    assert refused(c.call_arrived(call("new", 0.0, 90.0), 0.0)) == [
        ("new", "rejected-saturated", 429)
    ]
    assert refused(c.call_arrived(call("b", 0.0, 99.0, "begun"), 0.0)) == [
        ("q2", "rejected-saturated", 429)
    ]
    assert c.held == 3


def test_a_call_that_waited_too_long_is_refused() -> None:
    c = coordinator(held_timeout_s=5.0)
    c.call_arrived(call("run", 0.0, 9.0), 0.0)
    c.call_arrived(call("q", 0.0, 50.0), 0.0)
    assert c.tick(5.0) == []
    assert refused(c.tick(5.1)) == [("q", "rejected-ttl-expired", 504)]
    assert c.held == 0


@given(
    share=st.sampled_from([0.05, 0.1, 0.25, 1.0]),
    background=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_starvation_bound(share: float, background: int, seed: int) -> None:
    """Newcomers never stop; the k-th oldest demoted call is still served in bounded placements."""
    rng = random.Random(seed)
    held = HeldCalls(share)
    for i in range(background):
        held.add(f"b{i}", rng.random(), 0.0, background=True)
    served_at: dict[str, int] = {}
    turns = 0
    while len(served_at) < background:
        held.add(f"n{turns}", float(turns), float(turns))
        turns += 1
        first = held.first(4)[0]
        held.placed(first)
        if first.startswith("b"):
            served_at[first] = turns
        assert turns < 10_000
    for i in range(background):
        assert served_at[f"b{i}"] <= (i + 1) * (math.ceil(1 / share) + 1)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 1.0])
def test_demoted_calls_get_their_share_and_no_more(share: float) -> None:
    """Over many placements while both wait: one of them after 1 / share of the others."""
    options = {"overload": "protect", "reject_at_entry": False, "entry_margin": 0.0}
    c = coordinator(background_share=share, **options)
    c.call_arrived(call("run", 0.0, 1e6), 0.0)
    running, turns, demoted = "run", 440, 0
    for i in range(turns):
        c.call_arrived(call(f"late{i}", 0.0, 0.1), 0.0)
        c.call_arrived(call(f"fine{i}", 0.0, 1e6), 0.0)
        (found,) = c.call_finished(running, DONE, 0.0)
        assert isinstance(found, Placement)
        assert found.background is found.call_id.startswith("late")
        running, demoted = found.call_id, demoted + found.background
    expected = turns / (1.0 / share + 1.0) if share else 0.0
    assert demoted == pytest.approx(expected, abs=1.0)


def test_demoted_calls_go_by_least_work_while_nobody_else_waits() -> None:
    held = HeldCalls(0.1)
    for name, work_s in (("long", 9.0), ("short", 1.0), ("mid", 5.0)):
        held.add(name, work_s, 0.0, background=True)
    assert held.first(9) == ["short", "mid", "long"]
    assert list(held.last_first()) == ["long", "mid", "short"]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 50), st.booleans()),
        max_size=120,
    )
)
def test_held_calls_keep_their_book(acts: list[tuple[int, int, int, bool]]) -> None:
    held = HeldCalls(0.1, FairShares(100, {}))
    book: dict[str, int] = {}
    demoted: set[str] = set()
    for i, (act, who, tokens, background) in enumerate(acts):
        if act == 0:
            name = f"c{i}"
            held.add(
                name, float(who), float(i), tenant=f"t{who % 3}",
                tokens=(tokens, 0), background=background,
            )  # fmt: skip
            book[name] = tokens
            demoted |= {name} if background else set()
        elif book:
            name = sorted(book)[who % len(book)]
            if act == 1:
                held.demote(name, float(tokens))
                demoted.add(name)
            else:
                (held.placed if background else held.remove)(name)
                del book[name]
                demoted.discard(name)
        order = held.first(1000)
        assert sorted(order) == sorted(book)
        assert sorted(held.last_first()) == sorted(book)
        assert held.tokens == sum(book.values())
        assert len(held) == len(book)


def test_a_tenant_beyond_its_share_waits_behind_the_others() -> None:
    held = HeldCalls(0.0, FairShares(250, {"paying": 2.0}))
    for i in range(60):
        held.add(f"greedy{i}", 0.0, 0.0, tenant="greedy", tokens=(100, 0))
        held.add(f"paying{i}", 99.0, 0.0, tenant="paying", tokens=(100, 0))
    counts = {"greedy": 0, "paying": 0}
    for _ in range(60):
        first = held.first(1)[0]
        counts[first.rstrip("0123456789")] += 1
        held.placed(first)
    assert 36 <= counts["paying"] <= 40, "twice the weight, but for the window"


def test_one_tenant_alone_is_never_ahead() -> None:
    held = HeldCalls(0.0, FairShares(10, {}))
    for i in range(20):
        held.add(f"c{i:02}", float(i), 0.0, tenant="only", tokens=(1000, 0))
    order = []
    for _ in range(20):
        order += held.first(1)
        held.placed(order[-1])
    assert order == sorted(order)


def _random_life(seed: int, options: dict[str, object]) -> tuple[list[Decision], set[str]]:
    """Play arrivals and ends at random until all is over; return decisions and unsettled calls."""
    rng, c = random.Random(seed), coordinator(slots=2, **options)
    log: list[Decision] = []
    running: list[str] = []
    waiting: set[str] = set()
    now, count = 0.0, 0

    def take(found: list[Decision]) -> None:
        for decision in found:
            log.append(decision)
            waiting.discard(decision.call_id)
            if isinstance(decision, Placement):
                running.append(decision.call_id)

    while count < 150 or running:
        now += rng.random()
        if count < 150 and rng.random() < 0.6:
            name, count = f"c{count}", count + 1
            waiting.add(name)
            tenant = rng.choice("ab")
            one = call(name, now, rng.uniform(0.1, 30), f"w{count % 40}", tenant=tenant)
            take(c.call_arrived(one, now))
        elif running:
            take(c.call_finished(running.pop(rng.randrange(len(running))), DONE, now))
        else:
            take(c.tick(now))
    return log, waiting


PROTECTED = (
    {"overload": "protect", "reject_at_entry": False},
    {"overload": "protect", "max_held_calls": 9, "held_timeout_s": 7.0},
    {"overload": "protect", "fair_window_tokens": 300, "max_held_tokens": 900},
)


@pytest.mark.parametrize("options", PROTECTED)
@pytest.mark.parametrize("seed", range(10))
def test_no_call_is_lost(seed: int, options: dict[str, object]) -> None:
    """Every call is placed or refused, exactly once or refused after being placed never."""
    log, unsettled = _random_life(seed, options)
    assert not unsettled
    ids = [d.call_id for d in log]
    assert len(ids) == len(set(ids)) == 150


@pytest.mark.parametrize("seed", range(5))
def test_off_ignores_the_knobs_of_protect(seed: int) -> None:
    plain, _ = _random_life(seed, {})
    knobs = {"hopeless_pace": 3.0, "entry_margin": 9.0, "background_share": 0.5}
    off, _ = _random_life(seed, {**knobs, "overload": "off"})
    assert plain == off
    due = [d.background for d in plain if isinstance(d, Placement)]
    assert not any(due)


def test_weights_must_be_numbers_above_0() -> None:
    with pytest.raises(ConfigError, match="tenant_weights of a"):
        DispatchOptions(tenant_weights={"a": 0.0})


@pytest.mark.parametrize(
    ("refuse", "reason", "status"),
    [
        (lambda: saturated("c"), "rejected-saturated", 429),
        (lambda: crowded("c"), "rejected-saturated", 429),
        (lambda: unattainable("c"), "rejected-saturated", 429),
        (lambda: expired("c", 5.4), "rejected-ttl-expired", 504),
        (lambda: no_endpoints("c"), "rejected-no-endpoints", 503),
    ],
)
def test_a_refusal_says_whose_it_is_and_why(
    refuse: Callable[[], Rejection], reason: str, status: int
) -> None:
    refusal = refuse()
    assert (refusal.call_id, refusal.reason, refusal.status) == ("c", reason, status)
    sentence = refusal.message
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert not sentence[1:].isupper()


def test_a_refusal_says_how_long_the_call_waited() -> None:
    assert " 5 seconds" in expired("c", 5.4).message


@pytest.mark.parametrize(("most", "fullness", "margin"), [
    (0.5, 0.7, 0.5), (1.0, 0.7, 1.0), (2.0, 0.0, 1.0), (2.0, 0.5, 1.5), (3.0, 1.0, 3.0),
])  # fmt: skip
def test_each_term_of_the_margin(most: float, fullness: float, margin: float) -> None:
    assert entry_margin(most, fullness) == margin


@pytest.mark.parametrize(
    ("most_calls", "most_tokens", "calls", "tokens", "over"),
    [
        (3, 0, 3, 10**9, False), (3, 0, 4, 0, True), (0, 100, 10**6, 100, False),
        (0, 100, 0, 101, True), (0, 0, 10**6, 10**9, False), (3, 100, 4, 0, True),
        (3, 100, 0, 101, True), (1, 1, 1, 1, False), (1, 0, 2, 0, True), (0, 1, 0, 2, True),
    ],
)  # fmt: skip
def test_bounds_of_the_queue(
    most_calls: int, most_tokens: int, calls: int, tokens: int, over: bool
) -> None:
    options = DispatchOptions(max_held_calls=most_calls, max_held_tokens=most_tokens)
    assert over_bounds(options, calls, tokens) is over


def shares(window: float | None = 100.0, **weights: float) -> FairShares:
    return FairShares(window, weights)


def test_a_tenant_is_ahead_beyond_a_window_more_than_the_least() -> None:
    found = shares(heavy=2.0)
    for tenant, tokens in (("a", 50), ("b", 150), ("heavy", 301), ("c", 151)):
        found.served(tenant, tokens)
    assert found.ahead(("a", "b", "heavy", "c")) == {"heavy", "c"}
    assert found.ahead(("b", "heavy", "c")) == set(), "the least is one that waits"
    assert found.ahead(("a", "b")) == set()
    assert found.ahead(("new", "a", "b")) == {"b"}, "one never served counts as 0"
    assert found.ahead(()) == set()
    found.settled("a", -30)
    assert found.ahead(("a", "b")) == {"b"}


def test_who_was_away_starts_a_window_below_the_least_of_those_that_wait() -> None:
    found = shares()
    found.served("a", 1000)
    found.served("b", 700)
    found.served("late", 5)
    found.waits("late", ("a", "b"))  # counts as 600 now
    assert found.ahead(("a", "b", "late")) == {"a"}
    found.served("late", 200)
    assert found.ahead(("b", "late")) == set()
    found.served("late", 1)
    assert found.ahead(("b", "late")) == {"late"}
    found.waits("b", ("late",))  # it has 701 now, the other 801
    assert found.ahead(("b", "late")) == set()


def test_who_was_served_more_keeps_it_when_it_waits_again() -> None:
    found = shares()
    found.served("a", 1000)
    found.waits("a", ("b",))
    assert found.ahead(("a", "b")) == {"a"}


def test_who_comes_when_nobody_waits_is_measured_by_who_got_most() -> None:
    found = shares()
    found.served("a", 1000)
    found.served("b", 10)
    found.waits("new", ())  # 900
    assert found.ahead(("new", "a")) == set()
    found.served("new", 100)
    assert found.ahead(("new", "a")) == set()
    found.served("new", 101)
    assert found.ahead(("new", "a")) == {"new"}


def test_the_usual_window_is_eight_average_calls() -> None:
    found = shares(None)
    assert not found.strict
    assert shares().strict
    found.served("a", 100)  # a window of 800
    found.settled("b", 900)
    assert found.ahead(("a", "b")) == set()
    found.settled("b", 1)
    assert found.ahead(("a", "b")) == {"b"}
    found.served("a", 200)  # the mean is 105, the window 840; a has 300
    found.settled("b", 239)  # 1140
    assert found.ahead(("a", "b")) == set()
    found.settled("b", 1)
    assert found.ahead(("a", "b")) == {"b"}


def test_what_is_forgotten_of_tenants() -> None:
    found = shares()
    for tenant in ("a", "b", "c"):
        found.served(tenant, 500)
    found.forget(("a", "unknown"))
    assert found.ahead(("a", "b", "c", "unknown")) == {"a"}


@pytest.mark.parametrize(("window", "strict"), [(0, None), (-1, False), (1, True), (500, True)])
def test_shares_of_an_option(window: int, strict: bool | None) -> None:
    found = fair_shares(DispatchOptions(fair_window_tokens=window, tenant_weights={"w": 2.0}))
    assert (found and found.strict) is strict
    if window == 500:
        assert found is not None
        found.served("w", 1000)
        assert found.ahead(("w", "x")) == set(), "by its weight, within the window"
        found.served("w", 2)
        assert found.ahead(("w", "x")) == {"w"}
