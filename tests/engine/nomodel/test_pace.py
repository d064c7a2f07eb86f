"""A paced engine is as slow as it is told, computes the same tokens, and only it reads the pace."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.pace import (
    DeviceSpeed,
    PacedScheduler,
    PacedUrgencyScheduler,
)
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import expected


def test_step_time() -> None:
    pace = DeviceSpeed(prefill_tokens_per_s=1000.0, step_ms=10.0, per_sequence_ms=2.0)
    assert pace.step_s(3, 0) == pytest.approx(0.016)
    assert pace.step_s(0, 500) == pytest.approx(0.51)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("scheduler_class", [PacedScheduler, PacedUrgencyScheduler])
def test_steps_last_as_long_as_on_the_slower_device(
    build: Build, scheduler_class: type, async_scheduling: bool
) -> None:
    engine = build(
        scheduler_class,
        async_scheduling=async_scheduling,
        additional={"hexgen_pace": {"step_ms": 10.0, "prefill_tokens_per_s": 2000.0}},
    )
    for i in range(3):
        engine.add(f"r{i}", [10 + i] * 20, 8)
    began = time.monotonic()
    engine.run()
    # Eight steps at 10 ms and 60 prompt tokens at 2,000 a second; sleeping is never too short.
    assert time.monotonic() - began >= 8 * 0.010 + 60 / 2000
    assert engine.tokens == {f"r{i}": expected([10 + i] * 20, 8) for i in range(3)}
    engine.assert_clean()


def test_the_pace_is_what_the_engine_measures(build: Build) -> None:
    engine = build(
        PacedUrgencyScheduler, additional={"hexgen_pace": {"step_ms": 8.0, "per_sequence_ms": 1.0}}
    )
    engine.scheduler.hexgen_clock = time.monotonic
    for i in range(6):
        engine.add(f"r{i}", [10 + i] * 20, 12)
        engine.steps(4)
    engine.run()
    cost = engine.scheduler.hexgen_meter.fit.cost()
    assert cost is not None
    assert cost.step_s(2.0, 50.0) >= 0.009


@pytest.mark.parametrize(
    ("pace", "named"),
    [
        ({"step_ms": -1}, "step_ms"),
        ({"speed": 3}, "speed"),
        ({"prefill_tokens_per_s": "fast"}, "prefill_tokens_per_s"),
        ([1], "hexgen_pace"),
    ],
)
def test_a_wrong_pace_is_named_and_ours_alone_ignores_it(
    build: Build, pace: Any, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        build(PacedScheduler, additional={"hexgen_pace": pace})
    build(UrgencyScheduler, additional={"hexgen_pace": pace})


@pytest.mark.parametrize(
    ("options", "named"),
    [({"order": "random"}, "order"), ({"speed": 3}, "speed"), ("fast", "hexgen")],
)
def test_wrong_options_are_named(build: Build, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(UrgencyScheduler, additional={"hexgen": options})
