"""Runs with rates that engines fit to their own noisy steps, as live, beside the true ones."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hexgen_vllm.cli import main
from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.cost import CostFit
from hexgen_vllm.report import plot
from hexgen_vllm.report.summary import percentile
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.pricing import Pricing
from hexgen_vllm.sim.engine.sequence import EngineModel, Sequence
from hexgen_vllm.sim.fleets import engine_on
from hexgen_vllm.sim.limits import limits
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.simulator import SimOptions, Simulation, engine_of
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    generator,
    poisson,
    scaled,
    timed,
)
from hexgen_vllm.types import EngineKind, Placement, StepCost

QUIET = SimOptions(record_calls=False)


def fleet(*devices: str, slower: float = 1.0, slots: int = 16) -> tuple[EngineModel, ...]:
    """One engine on each device, each step of which takes ``slower`` times as long."""
    models = [engine_on(device, f"{device}-{i}") for i, device in enumerate(devices)]
    return tuple(replace(m, cost=m.cost.scaled(slower), max_num_seqs=slots) for m in models)


def workload(
    models: tuple[EngineModel, ...], count: int, load: float, length_scale: float = 0.3
) -> tuple[WorkflowSpec, ...]:
    drawn = tuple(scaled(spec, length_scale) for spec in text2sql(count, seed=1))
    rate = load * limits(models, drawn[:100]).rate_per_s
    return timed(drawn, poisson(count, rate, generator(1, "arrivals")))


def p95_s(simulation: Simulation) -> float:
    latencies = [w.latency_s for w in simulation.workflows]
    return percentile([math.inf if v is None else v for v in latencies], 0.95)


def fit_of(engine: SimEngine) -> CostFit:
    assert engine.batch.pricing.fit is not None
    return engine.batch.pricing.fit


def gap(fit: CostFit, cost: StepCost) -> float:
    """How far the time of a step with a call is from what it costs."""
    found = fit.cost()
    assert found is not None
    return abs(found.step_s(4, 8_000) / cost.step_s(4, 8_000) - 1.0)


@pytest.mark.slow
def test_fitted_rates_are_as_good_as_true_ones_over_a_day() -> None:
    """11 hours of two engines; the one that does most learns from 15,000 steps and more."""
    models = fleet("A100", "L40S", slower=28.0)
    specs = workload(models, 1_050, 0.6)
    found = {}
    for rates in ("true", "fitted"):
        options = replace(QUIET, rates=rates, report_interval_s=10.0)
        simulation = Simulation(models, named("slack"), lambda _: 2_000.0, options, seed=1)
        simulation.run(specs)
        assert simulation.now > 10 * 3600
        found[rates] = p95_s(simulation)
    assert max(fit_of(e).steps for e in simulation.engines.values()) > 15_000
    assert all(gap(fit_of(e), e.model.cost) < 0.02 for e in simulation.engines.values())
    assert found["fitted"] <= 1.03 * found["true"]


def taught(simulation: Simulation, factors: tuple[float, ...]) -> None:
    """Let each engine believe that its steps take so many times longer than they do."""
    for (name, engine), factor in zip(simulation.engines.items(), factors, strict=True):
        rng, cost = generator(5, name), engine.model.cost.scaled(factor)
        for _ in range(500):
            n, chunk = rng.randint(1, 16), rng.choice((0, 0, 0, 512))
            took_s = cost.step_s(n, 2_000 * n, chunk, chunk * 1_000) * rng.gauss(1.0, 0.03)
            fit_of(engine).observe_step(n, 2_000 * n, chunk, chunk * 1_000, took_s)


def played(rates: str, factors: tuple[float, ...] = ()) -> Simulation:
    models = fleet("A100", "A6000", "L40S")
    options = replace(QUIET, rates=rates)
    simulation = Simulation(models, named("slack"), lambda _: 100.0, options, seed=1)
    if factors:
        taught(simulation, factors)
    simulation.run(workload(models, 200, 0.6, 0.5))
    return simulation


def test_rates_that_were_wrong_at_first_are_put_right() -> None:
    true_s = p95_s(played("true"))
    for factors in ((0.7, 1.3, 0.7), (1.3, 0.7, 1.3)):
        simulation = played("fitted", factors)
        assert all(gap(fit_of(e), e.model.cost) < 0.06 for e in simulation.engines.values())
        assert p95_s(simulation) <= 1.1 * true_s  # as other seeds would give


class Governor:
    """Sets the speed of engines by the time, and sees when that is known and where calls go."""

    def __init__(self, name: str, slowdown: Callable[[float], float]) -> None:
        self._name, self._slowdown = name, slowdown
        self._since_s = self._busy_s = 0.0
        self._wrong = False
        self.found_s: list[float] = []  # busy time from each change until it was known

    def stepped(self, engine: SimEngine, start_s: float, steps: int) -> None:
        if engine.model.engine_id != self._name:
            return
        # The step that has just ended began under the old slowdown.
        took_s = engine.end_s - start_s
        cost = engine.model.cost.scaled(engine.slowdown)
        fit = engine.batch.pricing.fit
        if self._wrong:
            self._busy_s += took_s
            if fit is not None and fit.cost() is not None and gap(fit, cost) < 0.2:
                self.found_s.append(self._busy_s)
                self._wrong = False
        now = engine.end_s
        slowdown = self._slowdown(now)
        if slowdown != engine.slowdown:
            engine.slowdown, self._wrong, self._busy_s = slowdown, True, 0.0


def calls_on(simulation: Simulation, name: str, since_s: float, until_s: float) -> float:
    """The share of calls placed in a span of time that went to an engine."""
    placed = Counter(
        decision.engine_id
        for at, decision in simulation.coordinator.log
        if since_s <= at < until_s and isinstance(decision, Placement)
    )
    return placed[name] / max(placed.total(), 1)


def governed(slowdown: Callable[[float], float], count: int = 200) -> tuple[Simulation, Governor]:
    models = fleet("A100", "A100", "A100")
    governor = Governor("A100-0", slowdown)
    simulation = Simulation(
        models, named("slack"), lambda _: 100.0, QUIET, observer=governor, seed=1
    )
    simulation.coordinator.log = type(simulation.coordinator.log)()  # without a bound
    simulation.run(workload(models, count, 0.6, 0.5))
    return simulation, governor


def test_a_device_that_slows_down_is_known_in_30_s_and_gets_fewer_calls() -> None:
    end_s = governed(lambda _: 1.0)[0].now
    slow, fast = 0.3 * end_s, 0.7 * end_s
    simulation, governor = governed(lambda now: 3.0 if slow <= now < fast else 1.0)
    assert len(governor.found_s) == 2
    assert max(governor.found_s) < 30
    before = calls_on(simulation, "A100-0", 0.05 * end_s, slow)
    during = calls_on(simulation, "A100-0", slow + 30, fast)
    after = calls_on(simulation, "A100-0", fast + 30, end_s)
    assert during < 0.7 * before
    assert after > 0.8 * before


def test_a_device_that_goes_to_and_fro_keeps_its_share_and_loses_nobody() -> None:
    """Calls go back and forth no more than the device does: it neither starves nor drowns."""
    steady, _ = governed(lambda _: 2.0)
    flapping, governor = governed(lambda now: 3.0 if now % 50 < 25 else 1.0)
    assert len(governor.found_s) >= 4
    assert max(governor.found_s) < 30
    shares = [
        calls_on(flapping, "A100-0", at, at + 50) for at in range(50, int(flapping.now) - 80, 50)
    ]
    assert min(shares) > 0.05
    assert max(shares) < 0.5
    assert all(w.error is None for w in flapping.workflows)
    assert p95_s(flapping) < 1.5 * p95_s(steady)


# Engines that say nothing of their rates


@pytest.mark.parametrize("slower", [1 / 30, 1.0])
def test_protection_refuses_nobody_who_would_be_on_time_on_engines_that_say_nothing(
    slower: float,
) -> None:
    """Fast and slow stock engines: what they cost is learned from whole answers alone."""
    models = fleet("A100", "L40S", slower=slower, slots=64)
    specs = workload(models, 120, 0.5, 1.0)
    deadline_s = 3.0 * limits(models, specs[:100]).base_s
    simulation = Simulation(
        models,
        replace(
            named("slack", DispatchOptions(overload="protect")),
            engine=EngineOptions(order="fcfs"),
            kind=EngineKind.FCFS,
        ),
        lambda _: deadline_s,
        replace(QUIET, router_latency_s=0.0),
        seed=1,
    )
    simulation.run(specs)
    assert all(w.error is None for w in simulation.workflows)
    assert p95_s(simulation) < deadline_s
    for model in models:
        learned = simulation.coordinator.engines[model.engine_id].cost()
        assert learned is not None
        ratio = learned.step_s(4, 8_000) / model.cost.step_s(4, 8_000)
        assert 0.5 < ratio < 2.5  # waits within the engine count as its steps


# Noise


COST = StepCost(c0=0.02, c1=1e-3, c2=1e-6, p0=0.002, p1=1e-4, p2=0.0)
MODEL = EngineModel("e", COST, max_num_seqs=4, max_num_batched_tokens=256, kv_tokens=16_000)


def busy_s(noise: float, seed: int, calls: int = 400) -> float:
    options = SimOptions(step_noise=noise)
    engine = engine_of(MODEL, named("slack"), options, seed)
    for i in range(calls):
        placement = Placement(str(i), "e", "test", expected_output_tokens=8)
        engine.submit(Sequence(placement, 200, 8), 0.0)
    while engine.steps:
        engine.step_ended(engine.end_s)
        last_s = engine.start_s
    return last_s


def test_steps_vary_around_their_cost() -> None:
    exact = busy_s(0.0, 1)
    assert busy_s(0.0, 2) == exact
    found = [busy_s(0.1, seed) for seed in range(10)]
    assert len(set(found)) == 10
    assert busy_s(0.1, 0) == found[0]
    assert sum(found) / 10 == pytest.approx(exact, rel=0.01)


def test_only_what_learns_rates_is_told_fitted_ones() -> None:
    for name, learns in (
        ("slack", True), ("oracle", False), ("paper", False), ("round_robin+fcfs", False),
    ):  # fmt: skip
        engine = engine_of(MODEL, named(name), SimOptions(), 1)
        assert (engine.batch.pricing.fit is not None) == learns
        assert engine_of(MODEL, named(name), SimOptions(rates="true"), 1).batch.pricing.fit is None
    assert engine_of(MODEL, named("slack"), SimOptions(), 1).report().cost is None
    assert engine_of(MODEL, named("paper"), SimOptions(), 1).report().cost == COST


def test_engines_order_by_assumed_rates_until_they_have_fitted_theirs() -> None:
    engine = engine_of(MODEL, named("slack"), SimOptions(), 1)
    seeds = engine.batch.pricing.rates
    known = SimEngine(MODEL, EngineOptions())
    for one in (engine, known):
        for i in range(60):
            placement = Placement(str(i), "e", "test", expected_output_tokens=30)
            one.submit(Sequence(placement, 200, 30), 0.0)
        one.step_ended(one.end_s)
        assert one.batch.pricing.rates == seeds
        while one.steps:
            one.step_ended(one.end_s)
    ours, true = engine.batch.pricing.rates, known.batch.pricing.rates
    assert ours != seeds
    assert ours.output_token_s == pytest.approx(true.output_token_s, rel=0.25)
    assert ours.prefill_token_s == pytest.approx(true.prefill_token_s, rel=0.1)


def test_rates_are_looked_at_every_32_steps() -> None:
    pricing = Pricing(EngineOptions(), COST, 256)
    assert not pricing.stepped(31, 31 * 0.03, 0.0)
    assert pricing.stepped(1, 0.03, 0.0)
    assert not pricing.stepped(31, 31 * 0.3, 0.0)
    assert pricing.stepped(1, 0.3, 0.0), "steps are ten times as long"
    pricing.stepped(320, 320 * 0.3, 0.0)
    assert not pricing.stepped(32, 32 * 0.3, 0.0), "nothing new"


# What says so


SCENARIO: dict[str, Any] = {
    "fleet": [{"name": "one", "cost": COST.__reduce__()[1], "max_num_seqs": 4}],
    "workload": {"workflows": 5, "length_scale": 0.1},
    "arrivals": {"loads": [0.5]},
    "seeds": [1],
}
SCENARIO["fleet"][0]["cost"] = dict(
    zip(("c0", "c1", "c2", "p0", "p1", "p2"), SCENARIO["fleet"][0]["cost"], strict=True)
)


def written(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump({**SCENARIO, **more}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("argv", "simulation", "rates"),
    [
        ([], {}, "fitted"),
        (["--rates", "true"], {}, "true"),
        (["--rates", "fitted"], {"rates": True}, "fitted"),
        ([], {"rates": True}, "true"),
        ([], {"rates": "true"}, "true"),
        ([], {"rates": "fitted"}, "fitted"),
    ],
)
def test_results_with_true_rates_say_so(
    argv: list[str],
    simulation: dict[str, Any],
    rates: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plot, "_annotate", _spy(titles, plot._annotate))
    out, image = tmp_path / "out.json", tmp_path / "out.png"
    path = written(tmp_path, simulation=simulation) if simulation else written(tmp_path)
    assert main(["sim", str(path), *argv, f"--json={out}", f"--plot={image}"]) == 0
    rows = json.loads(out.read_text())
    assert [row["rates"] for row in rows] == [rates]
    assert rows[0]["step_noise"] == 0.03
    assert ("true rates" in capsys.readouterr().out) == (rates == "true")
    assert ["true rates" in title for title in titles] == [rates == "true"]


def _spy(titles: list[str], annotate: Callable[..., None]) -> Callable[..., None]:
    def spied(axes: Any, *args: Any) -> None:
        annotate(axes, *args)
        titles.append(axes.get_title(loc="left"))

    return spied


@pytest.mark.parametrize("rates", ["false", "live", 3, False, ["true"]])
def test_other_rates_are_refused(rates: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rates"):
        load(written(tmp_path, simulation={"rates": rates}))
