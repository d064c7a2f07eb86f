"""Knobs, objectives and the search over them, on functions whose optimum is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.records import WorkflowRecord
from hexgen_vllm.sim.policies import NAMES, named
from hexgen_vllm.tune.knobs import KNOBS, Knob, applied, defaults, knobs_for
from hexgen_vllm.tune.objective import chosen
from hexgen_vllm.tune.search import Search, Task, Trial, latin_hypercube

X = Knob("alpha", "dispatch", 0.0, 1.0, ("paper",))
Y = Knob("slack_quantile", "dispatch", 0.0, 1.0, ("paper",))


def bowl(values: dict[str, float]) -> float:
    return (values["alpha"] - 0.7) ** 2 + (values["slack_quantile"] - 0.2) ** 2


def noisy(seen: list[Task]) -> Callable[[Sequence[Task]], list[float]]:
    """Evaluate the bowl with noise that belongs to the seed, as common random numbers do."""

    def evaluate(tasks: Sequence[Task]) -> list[float]:
        seen.extend(tasks)
        return [bowl(dict(v)) + 5 * random.Random(seed).random() for v, seed in tasks]

    return evaluate


def test_a_grid_plays_every_point_on_every_seed() -> None:
    seen: list[Task] = []
    search = Search(noisy(seen), [1, 2], {"alpha": 0.25, "slack_quantile": 0.2})
    search.grid(X, 11)
    assert search.best().values["alpha"] == pytest.approx(0.7)
    assert len(seen) == search.runs == 2 * 12  # the present value is not on the grid


def test_the_search_gets_near_the_optimum_within_its_budget() -> None:
    seen: list[Task] = []
    search = Search(noisy(seen), [1, 2, 3], {"alpha": 0.1, "slack_quantile": 0.9})
    search.halving([X, Y], budget=80, rng=random.Random(1))
    assert bowl(search.best().values) < 0.01
    assert len(seen) == search.runs <= 80 + 8
    assert search.best().losses.keys() == search.present.losses.keys() == {1, 2, 3}


def test_bad_candidates_are_stopped_early() -> None:
    search = Search(noisy([]), [1, 2, 3, 4], {"alpha": 0.6, "slack_quantile": 0.3})
    search.halving([X, Y], budget=60, rng=random.Random(1))
    worst = max(search.trials[1:], key=lambda t: bowl(t.values))
    assert len(worst.losses) < 4


def test_equal_searches_are_equal() -> None:
    found = []
    for _ in range(2):
        search = Search(noisy([]), [1, 2], {"alpha": 0.5, "slack_quantile": 0.5})
        search.halving([X, Y], budget=40, rng=random.Random(7))
        found.append(search.best().values)
    assert found[0] == found[1]


def test_a_gain_is_measured_seed_by_seed() -> None:
    before, after = Trial({}, {1: 10.0, 2: 20.0, 3: 30.0}), Trial({}, {1: 9.0, 2: 18.0, 3: 29.0})
    gain, error = after.gain_over(before)
    assert gain == pytest.approx(4 / 3)
    assert error == pytest.approx(1 / 3)  # seeds differ by 10, gains hardly
    assert Trial({}, {1: 9.0}).gain_over(before) == (1.0, math.inf)
    assert Trial({}, {1: math.inf, 2: 1.0}).gain_over(before)[1] == math.inf


@given(st.integers(1, 4), st.integers(1, 20))
def test_a_latin_hypercube_has_one_point_in_each_slice(dimensions: int, count: int) -> None:
    points = latin_hypercube(dimensions, count, random.Random(0))
    for column in zip(*points, strict=True):
        assert sorted(int(x * count) for x in column) == list(range(count))


@pytest.mark.parametrize("knob", KNOBS, ids=lambda k: k.name)
@given(share=st.floats(0.0, 1.0))
def test_every_value_of_a_knob_is_a_legal_option(knob: Knob, share: float) -> None:
    value = knob.at(share)
    assert knob.low <= value <= knob.high
    assert knob.share(value) == pytest.approx(share, abs=0.5 / 16 + 1e-3)
    placed = knob.policies[0]
    name = placed if placed in NAMES else f"{placed}+fcfs"
    policy = applied(named(name), {knob.name: value})  # options check themselves
    assert defaults(policy, [knob]) == {knob.name: value}


def test_knobs_that_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="'alpha' is not a knob of slack"):
        knobs_for(named("slack"), ("alpha",))
    with pytest.raises(ConfigError, match="has nothing to tune"):
        knobs_for(named("round_robin+fcfs"))
    assert all(k.live for k in knobs_for(named("slack"), live=True))


def record(at_s: float, latency_s: float | None, tenant: str = "a") -> WorkflowRecord:
    return WorkflowRecord(f"{at_s}", at_s, 10.0, latency_s, None, "sql", tenant)


def test_objectives_are_losses() -> None:
    good = [record(float(i), 5.0) for i in range(20)]
    late = [*good[:10], *(record(10.0 + i, 30.0, "b") for i in range(10))]
    for name in ("min_deadline_95", "min_deadline_99", "goodput", "tenants"):
        objective, _ = chosen(name)
        assert objective(good) < objective(late)
    assert chosen("min_deadline_95")[0]([record(0.0, None)]) == math.inf


def test_weights_say_whose_lateness_counts() -> None:
    records = [record(0.0, 5.0, "a"), record(1.0, 30.0, "b")]
    assert chosen("tenants", {"b": 3.0})[0](records) == pytest.approx(0.75)
    assert chosen("tenants", {"b": 0.0})[0](records) == 0.0
    with pytest.raises(ConfigError, match="weight of tenant b"):
        chosen("tenants", {"b": -1.0})
