from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.scaling import EngineType, OfferedLoad, Scaler, ScalingOptions

EAGER = ScalingOptions(cooldown_s=0.0, down_after_s=0.0)
SHORT, AMPLE = ((5.0, 10),), ((60.0, 10),)


def engines(name: str, count: int, rate: float | None = 1.0, *, most: int = 4) -> EngineType:
    return EngineType(name, count, count, 1, most, rate)


def once(*types: EngineType, options: ScalingOptions = EAGER, **traffic: object) -> dict[str, int]:
    given = {"arrivals_per_s": 0.0, "waiting": 0.0, "start_s": 1.0, **traffic}
    return Scaler(options).wanted(types, OfferedLoad(**given), 0.0)  # type: ignore[arg-type]


def test_a_load_within_the_engines_capacity_changes_nothing() -> None:
    assert once(engines("a", 2), arrivals_per_s=1.2, slack=SHORT) == {"a": 2}


def test_more_work_than_capacity_adds_as_many_engines_as_it_takes() -> None:
    assert once(engines("a", 1), arrivals_per_s=2.2, slack=SHORT) == {"a": 3}


def test_a_backlog_that_ends_too_late_adds_engines_and_one_that_does_not_adds_none() -> None:
    backlog = {"arrivals_per_s": 0.5, "waiting": 12.0}
    assert once(engines("a", 1), **backlog, slack=SHORT)["a"] > 1
    assert once(engines("a", 1), **backlog, slack=AMPLE) == {"a": 1}


def test_a_burst_that_is_over_before_an_engine_could_start_adds_none() -> None:
    burst = {"waiting": 12.0, "slack": SHORT}
    assert once(engines("a", 1), **burst, start_s=2.0)["a"] > 1
    assert once(engines("a", 1), **burst, start_s=30.0) == {"a": 1}


def test_an_overload_without_hope_still_adds_engines() -> None:
    late = ((-60.0, 50), (0.0, 1))
    assert once(engines("a", 1), arrivals_per_s=50.0, waiting=900.0, slack=late) == {"a": 4}


def test_calls_that_wait_all_the_time_show_what_engines_can_really_do() -> None:
    queue = {"arrivals_per_s": 4.0, "waiting": 24.0, "slack": SHORT}
    assert once(engines("a", 2, 9.0), **queue) == {"a": 2}
    assert once(engines("a", 2, 9.0), **queue, served_per_s=4.0) == {"a": 4}
    assert once(engines("a", 2, 2.0, most=2), **queue, served_per_s=9.0) == {"a": 2}


def test_the_type_that_helps_most_is_added_first() -> None:
    types = engines("slow", 1, 1.0), engines("fast", 1, 3.0)
    assert once(*types, arrivals_per_s=4.5, slack=SHORT) == {"slow": 1, "fast": 2}


def test_the_slowest_is_spared_first_and_never_below_the_least() -> None:
    types = engines("slow", 2, 1.0), engines("fast", 2, 3.0)
    assert once(*types) == {"slow": 1, "fast": 2}
    assert once(engines("slow", 1, 1.0), engines("fast", 2, 3.0)) == {"slow": 1, "fast": 1}
    assert once(engines("slow", 1, 1.0), engines("fast", 1, 3.0)) == {"slow": 1, "fast": 1}


def test_rates_that_nobody_has_measured_are_those_of_the_others() -> None:
    assert once(engines("a", 1, None), arrivals_per_s=9.0) == {"a": 1}
    types = engines("new", 1, None), engines("known", 1, 2.0, most=1)
    assert once(*types, arrivals_per_s=4.0, slack=SHORT) == {"new": 2, "known": 1}


def test_engines_without_a_place_are_not_counted_on_and_others_come_instead() -> None:
    full = EngineType("full", 3, 1, 1, 4, 3.0, placeless=2)
    busy = {"arrivals_per_s": 4.0, "slack": SHORT}
    assert once(EngineType("full", 3, 3, 1, 4, 3.0), engines("free", 1), **busy) == {
        "full": 3, "free": 1,
    }  # fmt: skip
    assert once(full, engines("free", 1), **busy) == {"full": 3, "free": 2}
    assert once(full, **busy) == {"full": 3}, "they wait on, and no others are asked for"
    assert once(full) == {"full": 2}


def test_counts_are_brought_within_their_bounds() -> None:
    assert once(EngineType("a", 0, 0, 2, 3, None), EngineType("b", 9, 9, 1, 3, None)) == {
        "a": 2,
        "b": 3,
    }


def test_fewer_must_do_for_a_while_before_one_goes() -> None:
    scaler = Scaler(ScalingOptions(cooldown_s=0.0, down_after_s=100.0))
    idle, busy = OfferedLoad(0.0, 0.0), OfferedLoad(1.4, 0.0, SHORT)
    two = [engines("a", 2)]
    assert scaler.wanted(two, idle, 0.0) == {"a": 2}
    assert scaler.wanted(two, busy, 60.0) == {"a": 2}  # starts the wait anew
    assert scaler.wanted(two, idle, 100.0) == {"a": 2}
    assert scaler.wanted(two, idle, 199.0) == {"a": 2}
    assert scaler.wanted(two, idle, 200.0) == {"a": 1}


def test_nothing_changes_soon_after_a_change() -> None:
    scaler = Scaler(ScalingOptions(cooldown_s=30.0, down_after_s=0.0))
    busy = OfferedLoad(2.2, 0.0, SHORT, 1.0)
    assert scaler.wanted([engines("a", 1)], busy, 0.0) == {"a": 3}
    assert scaler.wanted([engines("a", 3)], OfferedLoad(9.0, 0.0, SHORT, 1.0), 29.0) == {"a": 3}
    assert scaler.wanted([engines("a", 3)], OfferedLoad(9.0, 0.0, SHORT, 1.0), 30.0) == {"a": 4}
    assert scaler.wanted([engines("a", 4)], OfferedLoad(0.0, 0.0), 59.0) == {"a": 4}
    assert scaler.wanted([engines("a", 4)], OfferedLoad(0.0, 0.0), 60.0) == {"a": 3}


@given(
    arrivals=st.floats(0, 50),
    waiting=st.floats(0, 500),
    slack=st.lists(st.tuples(st.floats(-60, 60), st.integers(1, 50)), max_size=5),
    rates=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_steady_load_comes_to_rest(
    arrivals: float,
    waiting: float,
    slack: list[tuple[float, int]],
    rates: tuple[float, float],
    counts: tuple[int, int],
) -> None:
    """What was added is not taken away again while nothing else changes."""
    scaler, traffic = Scaler(EAGER), OfferedLoad(arrivals, waiting, tuple(slack), 10.0)
    names = ("a", "b")
    seen = [dict(zip(names, counts, strict=True))]
    for now in range(12):
        types = [engines(n, seen[-1][n], r) for n, r in zip(names, rates, strict=True)]
        seen.append(scaler.wanted(types, traffic, float(now)))
        assert all(1 <= n <= 4 for n in seen[-1].values())
    assert seen[-1] == seen[-2]


@pytest.mark.parametrize("name", ["horizon_s", "up_load", "down_after_s"])
def test_options_out_of_bounds_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ScalingOptions(**{name: -1.0})
