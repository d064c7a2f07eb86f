"""Calibration: the probe design, the fit of timings, vllm-router's names, a fake engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.calibrate import entry, facts
from hexgen_vllm.calibrate.command import CalibrateOptions, calibrate, calibration_text
from hexgen_vllm.calibrate.entry import to_calibration
from hexgen_vllm.calibrate.fit import DecodeTiming, PrefillTiming, fit
from hexgen_vllm.calibrate.measure import design
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.sim.scenario_file import load_fleet
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.types import StepCost

COST = StepCost(c0=0.02, c1=4e-4, c2=6e-8, p0=0.003, p1=2e-4, p2=8e-9)
coefficient = st.floats(1e-9, 1.0)


def timings(cost: StepCost) -> tuple[list[PrefillTiming], list[DecodeTiming]]:
    """Return what an engine of this cost takes for the probes of a long-context model."""
    prefills, decodes = [], []
    for probe in design(8192, 32):
        if probe.output_tokens == 1:
            n = probe.prompt_tokens
            prefills.append(PrefillTiming(n, cost.c0 + cost.prefill_s(n, chunk=10_000)))
        else:
            context = probe.prompt_tokens + 12.0
            step_s = cost.step_s(probe.batch, probe.batch * context)
            decodes.append(DecodeTiming(probe.batch, context, step_s))
    return prefills, decodes


def test_timings_of_a_known_engine_give_its_cost_back() -> None:
    found = fit(*timings(COST), chunk=None)
    assert found.error < 1e-6
    assert found.cost.c1 == pytest.approx(COST.c1, rel=1e-3)
    assert found.cost.c2 == pytest.approx(COST.c2, rel=1e-3)
    assert found.cost.p0 == pytest.approx(COST.p0, rel=1e-3)
    assert found.cost.p2 == pytest.approx(COST.p2, rel=1e-2)


def test_a_fit_never_has_a_negative_term() -> None:
    # Times that fall with length: an unconstrained fit would have a negative slope.
    prefills = [PrefillTiming(n, 0.1 - n / 1e6) for n in (10, 100, 1000, 5000)]
    decodes = [DecodeTiming(b, 100.0, 0.02 - b / 1e5) for b in (1, 2, 4, 8)]
    cost = fit(prefills, decodes, chunk=512).cost
    assert min(cost.c0, cost.c1, cost.c2, cost.p0, cost.p1, cost.p2) >= 0
    assert cost.c0 > 0


def test_a_fit_that_does_not_hold_says_so() -> None:
    prefills, decodes = timings(COST)
    noisy = [
        PrefillTiming(p.prompt_tokens, p.seconds * (1 + i % 2)) for i, p in enumerate(prefills)
    ]
    assert fit(noisy, decodes[:1], chunk=None).error > 0.05


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few calls"):
        fit([PrefillTiming(10, 0.1)], [], chunk=None)


@given(context=st.integers(64, 200_000), slots=st.integers(1, 512))
def test_no_probe_is_too_long_or_queues(context: int, slots: int) -> None:
    probes = design(context, slots)
    assert all(p.prompt_tokens + p.output_tokens <= context for p in probes)
    assert all(p.batch <= slots for p in probes)
    assert {p.batch for p in probes if p.output_tokens > 1} >= {1, min(slots, 2)}


def test_a_prompt_takes_the_same_time_in_both_languages() -> None:
    model = to_calibration(COST)["prefill_cost_model"]
    n = 3.0
    theirs = model["intercept_seconds"] + model["linear_seconds_per_1k_tokens"] * n
    theirs += model["quadratic_seconds_per_1k_tokens_squared"] * n * n
    assert theirs == pytest.approx(COST.c0 + COST.prefill_s(3000, chunk=3000))
    model = to_calibration(COST)["decode_throughput_model"]
    theirs = model["fixed_step_seconds"] + model["batch_step_seconds_per_request"] * 7
    theirs += model["context_step_seconds_per_token"] * 5000
    assert theirs == pytest.approx(COST.step_s(7, 5000))


def test_the_command_line_wins_and_gaps_are_named() -> None:
    said = facts.Facts(max_num_seqs=64, kv_tokens=1000)
    limits, assumed = entry.complete(said, facts.Facts(max_num_seqs=8))
    assert (limits.max_num_seqs, limits.kv_tokens) == (8, 1000)
    assert assumed == ["max_num_batched_tokens", "block_size", "prefix_caching"]


def test_the_simulator_reads_what_calibration_writes(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    limits, _ = entry.complete(facts.Facts(), facts.Facts(max_num_seqs=8, kv_tokens=4096))
    for name in ("a", "b", "a"):  # the second a replaces the first
        entry.write(path, entry.fleet_entry(name, COST, limits), 0.004)
    models = load_fleet(path)
    assert [m.engine_id for m in models] == ["b", "a"]
    assert models[0].cost == COST
    assert (models[0].max_num_seqs, models[0].kv_tokens) == (8, 4096)


def test_a_file_that_is_no_fleet_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump({"fleet": "reference-4", "arrivals": {"rates": [1.0]}}))
    with pytest.raises(ConfigError, match=r"scenario\.yaml must hold nothing but a fleet"):
        entry.write(path, {"name": "a"}, 0.0)


async def test_a_plain_engine_is_measured_by_its_answers() -> None:
    settings = FakeSettings(step_s=0.004, prefill_tokens_per_s=20_000.0, slots=2)
    async with FakeServer(settings) as engine:
        found = await calibrate(engine.url, CalibrateOptions(max_num_seqs=2, kv_tokens=500))
    assert found.source == "timings"
    assert found.assumed == ["max_num_batched_tokens", "prefix_caching"]
    assert found.fit.cost.step_s(1) >= 0.004  # a busy machine is slower, never faster
    assert found.fleet_entry["kv_tokens"] == 500
    assert "fit (timings)" in calibration_text(found)


async def test_a_url_without_an_engine_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        await calibrate("http://127.0.0.1:9", CalibrateOptions())
    with pytest.raises(ConfigError, match="url must start with http"):
        await calibrate("gpu-1:8000", CalibrateOptions())


async def test_a_router_is_not_measured() -> None:
    async with FakeServer() as engine:
        options = RouterOptions(worker_urls=(engine.url,), port=0)
        async with Router(options, DispatchOptions()) as router:
            with pytest.raises(ConfigError, match="is a router; give the URL of one engine"):
                await calibrate(router.url, CalibrateOptions())
