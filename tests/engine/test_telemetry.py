"""Step shapes, step times with and without overlap, the histogram of slacks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.engine.telemetry import StepMeter, step_shape
from hexgen_vllm.policy.cost import StepShape
from hexgen_vllm.types import SLACK_BOUNDS_S, StepCost, slack_counts

pytestmark = pytest.mark.engine


def output(
    decodes: int = 0,
    context: int = 100,
    chunks: tuple[tuple[int, int], ...] = (),
    new: tuple[tuple[int, int], ...] = (),
    drafts: int = 0,
) -> Any:
    """A step's SchedulerOutput: decodes, running chunks and new calls as (tokens, context)."""
    scheduled = {f"d{i}": 1 + drafts for i in range(decodes)}
    scheduled |= {f"c{i}": tokens for i, (tokens, _) in enumerate(chunks)}
    computed = [context] * decodes + [before for _, before in chunks]
    cached = SimpleNamespace(
        req_ids=list(scheduled), num_computed_tokens=computed, resumed_req_ids=set()
    )
    scheduled |= {f"n{i}": tokens for i, (tokens, _) in enumerate(new)}
    return SimpleNamespace(
        scheduled_cached_reqs=cached,
        scheduled_new_reqs=[
            SimpleNamespace(req_id=f"n{i}", num_computed_tokens=before)
            for i, (_, before) in enumerate(new)
        ],
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={f"d{i}": [0] * drafts for i in range(decodes) if drafts},
    )


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (output(3, 50), StepShape(3, 150)),
        (output(0, new=((64, 0),)), StepShape(0, 0, 64, 64 * 32)),
        (output(2, 10, chunks=((30, 100),)), StepShape(2, 20, 30, 30 * 115)),
        (output(2, 10, new=((8, 4),), chunks=((6, 6),)), StepShape(2, 20, 14, 8 * 8 + 6 * 9)),
        (output(4, 25, drafts=3), StepShape(4, 100)),
    ],
)
def test_step_shape(step: Any, shape: StepShape) -> None:
    assert step_shape(step) == shape


TRUE = StepCost(c0=0.01, c1=0.0005, c2=0.0, p0=0.0, p1=1e-4, p2=0.0)


def drive(overlap: bool, idle_s: float) -> StepMeter:
    """Steps of a device with cost TRUE; ``idle_s`` passes before each step when none is on."""
    rng, meter, now = random.Random(0), StepMeter(), 100.0
    in_flight: list[Any] = []
    for _ in range(400):
        step = output(rng.randint(1, 20), new=((rng.randint(50, 400), 0),) * (rng.random() < 0.3))
        if not in_flight:
            now += idle_s
        meter.started(step, now)
        in_flight.append(step)
        if overlap and len(in_flight) < 2:
            continue
        done = in_flight.pop(0)
        shape = step_shape(done)
        now += TRUE.step_s(shape.n_decode, shape.ctx_decode, shape.n_prefill, shape.prefill_ctx)
        meter.finished(done, None, now)
    return meter


@pytest.mark.parametrize(("overlap", "idle_s"), [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_step_times_leave_out_idle_time_and_overlap(overlap: bool, idle_s: float) -> None:
    meter = drive(overlap, idle_s)
    cost = meter.fit.cost()
    assert cost is not None
    for shape in (StepShape(10, 1000), StepShape(4, 400, 200, 200 * 100)):
        args = (shape.n_decode, shape.ctx_decode, shape.n_prefill, shape.prefill_ctx)
        assert cost.step_s(*args) == pytest.approx(TRUE.step_s(*args), rel=0.05)
    error = meter.fit.error()
    assert error is not None
    assert error < 0.05
    share = meter.prefill_share()
    assert share is not None
    assert 0.1 < share < 0.6


def test_time_between_the_steps_of_a_busy_engine_counts() -> None:
    """Calls wait for it as for the steps themselves; time without calls is nobody's."""
    gap_s = 0.004
    for busy, extra_s in ((True, gap_s), (False, 0.0)):
        rng, meter, now = random.Random(0), StepMeter(), 100.0
        for i in range(400):
            new = ((rng.randint(50, 400), 0),) * (rng.random() < 0.3)
            step = output(rng.randint(1, 20), new=new)
            now += gap_s
            meter.started(step, now, busy and i > 0)
            shape = step_shape(step)
            now += TRUE.step_s(shape.n_decode, 0, shape.n_prefill)
            meter.finished(step, None, now)
        cost = meter.fit.cost()
        assert cost is not None
        assert cost.step_s(10) == pytest.approx(TRUE.step_s(10) + extra_s, rel=0.05)


def test_rates_are_unknown_until_there_is_evidence() -> None:
    meter = StepMeter()
    assert meter.rates(512) is None
    assert meter.prefill_share() is None
    rates = drive(False, 0.0).rates(512)
    assert rates is not None
    assert 0.01 < rates.output_token_s < 0.04
    assert rates.prefill_s(1000) == pytest.approx(0.12, rel=0.2)


def test_an_output_that_never_came_back_is_forgotten() -> None:
    meter = StepMeter()
    lost, kept = output(1), output(2)
    meter.started(lost, 1.0)
    meter.started(kept, 2.0)
    meter.finished(kept, None, 2.5)
    meter.finished(lost, None, 9.0)
    meter.finished(output(3), None, 10.0)
    assert meter.steps == 1


def test_an_empty_step_takes_no_time_and_hides_none() -> None:
    meter = StepMeter()
    empty, after = output(0), output(2)
    meter.started(empty, 1.0)
    meter.started(after, 1.0)
    meter.finished(empty, None, 1.1)
    meter.finished(after, None, 1.5)
    assert meter.steps == 1


def test_slacks_are_counted() -> None:
    counts = slack_counts((-100, -0.5, 0.0, 0.5, 4, 1e12))
    assert sum(counts) == 6
    named = dict(zip([*SLACK_BOUNDS_S, float("inf")], counts, strict=True))
    assert {k: v for k, v in named.items() if v} == {
        -60.0: 1, 0.0: 2, 1.0: 1, 5.0: 1, float("inf"): 1,
    }  # fmt: skip
