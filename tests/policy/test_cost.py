"""The step-cost fit finds known coefficients, shrugs off outliers and follows drift."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from hexgen_vllm.policy.cost import (
    CostFit,
    StepShape,
    is_sampled,
    trust,
    trusted_cost,
)
from hexgen_vllm.types import StepCost

TRUE = StepCost(c0=0.008, c1=0.0004, c2=2e-8, p0=0.003, p1=0.00012, p2=1e-9)


def random_shape(rng: random.Random) -> StepShape:
    n = rng.randint(0, 32)
    chunk = rng.choice([0, 0, 0, rng.randint(16, 512)])
    if n == 0 and chunk == 0:
        chunk = 64
    return StepShape(n, n * rng.randint(50, 4000), chunk, chunk * rng.uniform(0, 2000))


def seconds(cost: StepCost, s: StepShape) -> float:
    return cost.step_s(s.n_decode, s.ctx_decode, s.n_prefill, s.prefill_ctx)


def feed(fit: CostFit, cost: StepCost, steps: int, seed: int, spike: float = 0.0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        shape = random_shape(rng)
        noise = rng.gauss(1.0, 0.03)
        t = seconds(cost, shape) * noise
        if rng.random() < spike:
            t *= rng.uniform(5, 30)
        fit.observe(shape, t)


def relative_gap(fit: CostFit, cost: StepCost) -> float:
    found = fit.cost()
    assert found is not None
    rng = random.Random(99)
    gaps = []
    for _ in range(200):
        shape = random_shape(rng)
        want = seconds(cost, shape)
        gaps.append(abs(seconds(found, shape) - want) / want)
    return max(gaps)


@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_cost(seed: int) -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, seed)
    assert relative_gap(fit, TRUE) < 0.04
    error = fit.error()
    assert error is not None
    assert error < 0.06


@pytest.mark.parametrize("seed", range(5))
def test_outliers_do_not_bend_it(seed: int) -> None:
    fit = CostFit()
    feed(fit, TRUE, 1500, seed, spike=0.03)
    assert relative_gap(fit, TRUE) < 0.05


def test_follows_a_device_that_becomes_slower() -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, 1)
    feed(fit, TRUE.scaled(2.0), 3000, 2)
    assert relative_gap(fit, TRUE.scaled(2.0)) < 0.1


def test_survives_a_monotonous_phase() -> None:
    fit = CostFit()
    feed(fit, TRUE, 600, 1)
    shape = StepShape(8, 8 * 500)
    for _ in range(20_000):
        fit.observe(shape, seconds(TRUE, shape))
    feed(fit, TRUE, 50, 3)
    assert relative_gap(fit, TRUE) < 0.03


def test_unknown_until_there_is_evidence() -> None:
    fit = CostFit(min_steps=20, min_prefills=3)
    assert fit.cost() is None
    assert fit.error() is None
    for _ in range(30):
        fit.observe(StepShape(4, 400), 0.01)
    assert fit.cost() is None, "no prefill seen: prefill cost must stay unknown, not zero"
    for _ in range(3):
        fit.observe(StepShape(0, 0, 128, 128 * 64), 0.02)
    assert fit.cost() is not None


def test_ignores_nonsense_times() -> None:
    fit = CostFit()
    fit.observe(StepShape(1), 0.0)
    fit.observe(StepShape(1), -1.0)
    assert fit.steps == 0


def test_coefficients_are_never_negative() -> None:
    fit = CostFit()
    rng = random.Random(0)
    for _ in range(100):
        fit.observe(StepShape(rng.randint(1, 3), 100, rng.choice([0, 64]), 0.0), 0.01)
    cost = fit.cost()
    assert cost is not None
    assert min(cost.c0, cost.c1, cost.c2, cost.p0, cost.p1, cost.p2) >= 0.0


# Long runs


def observations(
    draw: Callable[[random.Random], StepShape], n: int, cost: StepCost = TRUE, seed: int = 7
) -> list[tuple[StepShape, float]]:
    """Steps with 3 % noise, drawn once so that a long run of them is quick."""
    rng = random.Random(seed)
    shapes = [draw(rng) for _ in range(n)]
    return [(shape, seconds(cost, shape) * rng.gauss(1.0, 0.03)) for shape in shapes]


def gap_on(fit: CostFit, cost: StepCost, shapes: list[StepShape]) -> float:
    found = fit.cost()
    assert found is not None
    return max(abs(seconds(found, s) / seconds(cost, s) - 1.0) for s in shapes)


@pytest.mark.slow
def test_stays_right_over_a_million_steps() -> None:
    fit = CostFit()
    some = observations(random_shape, 25_000)
    for _ in range(40):
        for shape, took_s in some:
            fit.observe(shape, took_s)
        error = fit.error()
        assert error is not None
        assert error < 0.05
        assert relative_gap(fit, TRUE) < 0.02
    assert fit.steps == 1_000_000


def batches_of_one(_: random.Random) -> StepShape:
    return StepShape(1, 500)


def slowly_growing(rng: random.Random) -> StepShape:
    return StepShape(1, rng.randint(500, 700))


def collinear(rng: random.Random) -> StepShape:
    """Contexts in proportion to the batch, prefill always a full chunk."""
    n = rng.randint(1, 32)
    return StepShape(n, 1000 * n) if rng.random() < 0.9 else StepShape(0, 0, 512, 512 * 256)


def never_without_prefill(rng: random.Random) -> StepShape:
    n, chunk = rng.randint(0, 32), rng.randint(16, 512)
    return StepShape(n, 700 * n, chunk, chunk * rng.uniform(0, 2000))


@pytest.mark.parametrize("draw", [batches_of_one, slowly_growing, collinear, never_without_prefill])
def test_poor_steps_teach_nothing_wrong_and_unlearn_nothing(
    draw: Callable[[random.Random], StepShape],
) -> None:
    fit = CostFit()
    for shape, took_s in observations(random_shape, 5_000):
        fit.observe(shape, took_s)
    some = observations(draw, 10_000, seed=8)
    for _ in range(10):
        for shape, took_s in some:
            fit.observe(shape, took_s)
    assert relative_gap(fit, TRUE) < 0.02


@pytest.mark.parametrize("draw", [collinear, never_without_prefill])
def test_poor_steps_from_the_first_on_are_predicted(
    draw: Callable[[random.Random], StepShape],
) -> None:
    fit = CostFit()
    some = observations(draw, 10_000)
    for _ in range(5):
        for shape, took_s in some:
            fit.observe(shape, took_s)
    assert gap_on(fit, TRUE, [shape for shape, _ in some[:300]]) < 0.02


def test_what_was_never_measured_is_in_proportion_to_what_was() -> None:
    """Of a slow engine that is seen at one batch size, other sizes are not thought free."""
    fit = CostFit()
    for _ in range(50_000):
        fit.observe(StepShape(4, 4_000), 0.5)
    for _ in range(10):
        fit.observe(StepShape(0, 0, 512, 512 * 256), 3.0)
    found = fit.cost()
    assert found is not None
    assert found.step_s(4, 4_000) == pytest.approx(0.5, rel=0.01)
    assert found.step_s(64, 64_000) > 0.5
    assert found.prefill_s(1024) > found.prefill_s(512) > 1.0


def busy_until_known(fit: CostFit, cost: StepCost, seed: int, within: float = 0.1) -> float:
    """Feed steps at ``cost`` until predictions are right; return how long they took together."""
    rng, busy_s = random.Random(seed), 0.0
    while relative_gap(fit, cost) > within:
        shape = random_shape(rng)
        took_s = seconds(cost, shape) * rng.gauss(1.0, 0.03)
        fit.observe(shape, took_s)
        busy_s += took_s
        assert busy_s < 300
    return busy_s


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("factor", [3.0, 1 / 3, 1.5])
def test_another_speed_is_known_within_thirty_seconds(scale: float, factor: float) -> None:
    slow = TRUE.scaled(scale)  # steps of 10 to 60 ms, or of ten times that
    fit = CostFit()
    feed(fit, slow, 20_000, 1)
    assert busy_until_known(fit, slow.scaled(factor), 2) < 30
    feed(fit, slow.scaled(factor), 2_000, 3)
    assert relative_gap(fit, slow.scaled(factor)) < 0.02
    assert busy_until_known(fit, slow, 4) < 30


def test_another_speed_of_steps_of_seconds_is_known_after_a_few() -> None:
    """Full prefill steps of a slow device: 30 s are not many of them."""
    fit = CostFit()
    shape = StepShape(0, 0, 2048, 2048 * 1024)
    rng = random.Random(1)
    for _ in range(500):
        fit.observe(shape, 1.7 * rng.gauss(1.0, 0.03))
    for _ in range(5):
        fit.observe(shape, 5.1 * rng.gauss(1.0, 0.03))
    found = fit.cost()
    assert found is not None
    assert found.step_s(0, 0, 2048, 2048 * 1024) == pytest.approx(5.1, rel=0.1)


def test_a_slower_device_is_slower_at_what_it_does_not_do_meanwhile() -> None:
    fit = CostFit()
    feed(fit, TRUE, 5_000, 1)
    slow = TRUE.scaled(3.0)
    for shape, took_s in observations(batches_of_one, 3_000, slow):
        fit.observe(shape, took_s)
    assert relative_gap(fit, slow) < 0.03


def test_how_much_slower_is_measured_by_more_steps_than_show_that_it_is() -> None:
    """Prefill is not seen meanwhile, and the first steps after the change are not the usual."""
    fit = CostFit()
    feed(fit, TRUE, 5_000, 1)
    for i in range(300):
        decode = StepShape(1 + i % 32, (1 + i % 32) * 1_000)
        fit.observe(decode, seconds(TRUE.scaled(2.2 if i < 12 else 2.3), decode))
    found = fit.cost()
    assert found is not None
    chunk = StepShape(0, 0, 512, 512 * 800.0)
    assert seconds(found, chunk) == pytest.approx(seconds(TRUE.scaled(2.3), chunk), rel=0.015)


@pytest.mark.parametrize("speeds", [(2.3, 1.0), (2.3, 1.0, 2.3), (2.3, 5.0, 1.0)])
def test_a_device_that_comes_back_to_a_speed_is_at_all_that_it_did_then(
    speeds: tuple[float, ...],
) -> None:
    """As long as it only decodes: what was not seen meanwhile is what it was."""
    fit = CostFit()
    feed(fit, TRUE, 5_000, 1)
    chunk = StepShape(0, 0, 512, 512 * 800.0)
    for speed in speeds:
        for i in range(400):
            decode = StepShape(1 + i % 32, (1 + i % 32) * 1_000)
            # The first steps after a change show it, and are not yet the usual ones.
            fit.observe(decode, seconds(TRUE.scaled(speed * (0.96 if i < 12 else 1.0)), decode))
        found = fit.cost()
        assert found is not None
        assert seconds(found, chunk) == pytest.approx(seconds(TRUE.scaled(speed), chunk), rel=0.02)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("speed", [0.2, 0.5, 0.7, 3.0])
def test_decodes_alone_show_a_change_of_speed_from_their_first_step_on(
    speed: float, seed: int
) -> None:
    """Whatever the errors of the last steps before it happened to be."""
    fit = CostFit()
    feed(fit, TRUE, 5_000, seed)
    for i in range(100):
        decode = StepShape(1 + i % 32, (1 + i % 32) * 1_000)
        fit.observe(decode, seconds(TRUE.scaled(speed), decode))
    found, chunk = fit.cost(), StepShape(0, 0, 512, 512 * 800.0)
    assert found is not None
    assert seconds(found, chunk) == pytest.approx(seconds(TRUE.scaled(speed), chunk), rel=0.06)


def test_only_prefill_that_becomes_slower_leaves_decodes_as_they_are() -> None:
    fit = CostFit()
    feed(fit, TRUE, 5_000, 1)
    slow = replace(TRUE, p0=3 * TRUE.p0, p1=3 * TRUE.p1, p2=3 * TRUE.p2)
    feed(fit, slow, 3_000, 2)
    assert relative_gap(fit, slow) < 0.02


@pytest.mark.parametrize("every", [50, 1_000])
def test_a_device_that_goes_to_and_fro_is_followed_for_ever(every: int) -> None:
    fit = CostFit()
    feed(fit, TRUE, 3_000, 1)
    speeds = [observations(batches_of_one, every, TRUE.scaled(m)) for m in (3.0, 1.0)]
    for _ in range(100_000 // every):
        for some in speeds:
            for shape, took_s in some:
                fit.observe(shape, took_s)
    # What it did not do meanwhile is still known.
    assert relative_gap(fit, TRUE) < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_compilation_at_the_start_is_got_over(seed: int) -> None:
    fit, rng = CostFit(), random.Random(seed)
    for _ in range(12):
        fit.observe(random_shape(rng), rng.uniform(5.0, 40.0))
    feed(fit, TRUE, 50, seed)
    assert busy_until_known(fit, TRUE, seed, within=0.2) < 20
    feed(fit, TRUE, 1_000, seed)
    assert relative_gap(fit, TRUE) < 0.03


def test_pauses_one_after_another_are_no_change_of_speed() -> None:
    fit, rng = CostFit(), random.Random(3)
    feed(fit, TRUE, 3_000, 1)
    for at in range(30_000):
        shape = random_shape(rng)
        took_s = seconds(TRUE, shape) * rng.gauss(1.0, 0.03)
        if at % 500 < 4:  # four in a row
            took_s += 0.4
        fit.observe(shape, took_s)
    assert relative_gap(fit, TRUE) < 0.02


@pytest.mark.parametrize("spike", [0.02, 0.05])
def test_many_outliers_do_not_bend_it_in_the_long_run(spike: float) -> None:
    fit = CostFit()
    feed(fit, TRUE, 50_000, 2, spike=spike)
    assert relative_gap(fit, TRUE) < 0.02


def test_nonsense_is_ignored_for_ever() -> None:
    fit = CostFit()
    feed(fit, TRUE, 1_000, 1)
    before, steps = fit.cost(), fit.steps
    bad_times = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e9, 1e-30)
    shape = StepShape(4, 400)
    bad_shapes = (
        StepShape(0),
        StepShape(-1, 100),
        StepShape(1, -100),
        StepShape(1, 100, -5),
        StepShape(1, 100, 5, math.nan),
        StepShape(1, 100, 5, math.inf),
        StepShape(1, 100, 5, -1.0),
        StepShape(10**300),
    )
    for _ in range(100):
        for took_s in bad_times:
            fit.observe(shape, took_s)
        for bad in bad_shapes:
            fit.observe(bad, 0.01)
        fit.observe_call(0, 1.0, 100.0, 10, 1.0)
        fit.observe_call(10, math.nan, 100.0, 10, 1.0)
        fit.observe_call(10, 1.0, 100.0, -10, 1.0)
    assert (fit.cost(), fit.steps) == (before, steps)


def test_the_error_says_so_when_the_fit_is_wrong() -> None:
    """Too slow or too fast by twice is an error of 1, in steps of either sort."""
    for factor in (2.0, 0.5):
        fit = CostFit()
        feed(fit, TRUE, 2_000, 1)
        shapes = [StepShape(8, 4_000), StepShape(9, 4_000)]
        worst = 0.0
        for at in range(60):  # neither of the speeds for long enough to be the speed
            shape = shapes[at % 2]
            fit.observe(shape, seconds(TRUE, shape) * (factor if at % 4 < 2 else 1 / factor))
            error = fit.error()
            assert error is not None
            worst = max(worst, error)
        assert worst > 0.4
    fit = CostFit()
    feed(fit, TRUE, 2_000, 1)
    rng = random.Random(5)
    for at in range(2_000):  # every tenth step has prefill, of any speed
        shape = StepShape(0, 0, 256, 256 * 128) if at % 10 == 0 else StepShape(8, 4_000)
        wild = math.exp(rng.uniform(-1.5, 1.5)) if at % 10 == 0 else 1.0
        fit.observe(shape, seconds(TRUE, shape) * wild)
    error = fit.error()
    assert error is not None
    assert error > 0.3


# How far a fit is trusted


def test_trust_falls_with_the_error() -> None:
    assert [trust(e) for e in (None, 0.0, 0.25)] == [1.0, 1.0, 1.0]
    assert trust(0.625) == pytest.approx(0.5)
    assert [trust(e) for e in (1.0, 5.0, math.inf, math.nan)] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", [f.name for f in fields(StepCost)])
def test_each_coefficient_is_between_fit_and_fallback(name: str) -> None:
    fallback = TRUE.scaled(2.0)
    for error, share in ((0.1, 0.0), (0.625, 0.5), (2.0, 1.0)):
        found = getattr(trusted_cost(TRUE, error, fallback), name)
        assert found == pytest.approx((1 + share) * getattr(TRUE, name))


# Whole calls


def test_whole_calls_teach_every_coefficient() -> None:
    true = StepCost(c0=0.008, c1=0.0004, c2=2e-7, p0=0.03, p1=0.00012, p2=5e-8)
    fit, rng = CostFit(), random.Random(3)
    for _ in range(3_000):
        tokens, batch = rng.choice((1, 2, 8, 60)), rng.randint(1, 32)
        context, uncached = rng.randint(50, 4_000), rng.randint(16, 8_000)
        took_s = tokens * true.step_s(batch, batch * context)
        took_s += true.p0 + true.p1 * uncached + true.p2 * uncached * uncached / 2
        fit.observe_call(tokens, batch, context, uncached, took_s)
    found = fit.cost()
    assert found is not None
    for f in fields(StepCost):
        assert getattr(found, f.name) == pytest.approx(getattr(true, f.name), rel=0.1), f.name


def test_calls_without_a_token_teach_nothing() -> None:
    fit = CostFit()
    fit.observe_call(0, 1.0, 100.0, 50, 1.0)
    assert fit.steps == 0
    fit.observe_call(1, 1.0, 100.0, 50, 1.0)
    assert fit.steps == 1


# Which steps are learned from


def test_the_first_steps_and_long_ones_are_all_learned_from_and_some_of_the_others() -> None:
    assert all(is_sampled(n, 1, prefill=False, seconds=0.01) for n in range(256))
    assert all(is_sampled(n, 1, prefill=False, seconds=0.25) for n in range(1_000, 1_100))
    for prefill, share in ((True, 0.5), (False, 0.25)):
        chosen = [n for n in range(1_000, 2_000) if is_sampled(n, 1, prefill, 0.2)]
        assert len(chosen) == share * 1_000
    assert is_sampled(1_001, 4, prefill=False, seconds=0.01), "one of any four"
    assert not is_sampled(256, 1, prefill=False, seconds=0.01)


@pytest.mark.parametrize(
    ("shape", "took_s"),
    [(StepShape(1, 500), 0.02), (StepShape(16, 16_000), 0.06), (StepShape(0, 0, 2048, 2e6), 1.5)],
)
def test_of_the_steps_that_are_learned_from_30_s_are_enough(
    shape: StepShape, took_s: float
) -> None:
    fit, rng, steps = CostFit(), random.Random(1), 0

    def run(mean_s: float, busy_s: float) -> float:
        nonlocal steps
        while busy_s > 0:
            seconds_s = mean_s * rng.gauss(1.0, 0.03)
            if is_sampled(steps, 1, shape.n_prefill > 0, seconds_s):
                fit.observe(shape, seconds_s)
            steps += 1
            busy_s -= seconds_s
        for _ in range(3 if shape.n_prefill == 0 and not fit.prefills else 0):
            fit.observe(StepShape(0, 0, 64, 64 * 32), 0.01)
        found = fit.cost()
        assert found is not None
        return seconds(found, shape) / mean_s

    assert run(took_s, 600.0) == pytest.approx(1.0, abs=0.02)
    for _ in range(3):
        assert run(3 * took_s, 30.0) == pytest.approx(1.0, abs=0.1)
        assert run(took_s, 30.0) == pytest.approx(1.0, abs=0.1)
