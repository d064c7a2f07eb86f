"""Online tuning in the router: what is recorded, when a search runs, what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.router.observe.recorder import Recorder
from hexgen_vllm.router.tuning import (
    Files,
    SearchFailed,
    Tuning,
    fleet_text,
    search_apart,
    search_command,
)
from hexgen_vllm.sim.scenario_file import load_fleet
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.manual_clock import ManualClock
from hexgen_vllm.testing.stand import open_stand
from hexgen_vllm.tune.online import OnlineOptions, TuningPhase
from hexgen_vllm.tune.recent import RecentCall, RecentWorkflow, Ring, parse
from hexgen_vllm.types import Call, CallResult, EngineReport, EngineSpec, Placement, StepCost

COST = StepCost(0.02, 1e-4, 0.0, 0.0, 2e-4, 0.0)
OK = CallResult(ok=True, prompt_tokens=90, cached_tokens=64, output_tokens=5)


def call(name: str, workflow: str = "w", **more: Any) -> Call:
    return Call(
        name, workflow, 0.0, 100, "sql", "revise", tenant="t", model="m", deadline_s=50.0, **more
    )


def test_calls_become_a_workflow() -> None:
    recorder = Recorder(Ring())
    recorder.arrived(call("a"), 10.0)
    recorder.ended("a", OK, 12.0)
    recorder.arrived(call("b"), 12.5)
    recorder.arrived(call("c", final=True), 12.5)
    recorder.ended("c", OK, 13.0)
    assert len(recorder.ring) == 0  # b is open
    recorder.ended("b", CallResult(ok=True, output_tokens=7), 14.0)
    (workflow,) = recorder.ring
    assert workflow.calls[0] == RecentCall("revise", 0.0, 2.0, 90, 5, 64)
    assert workflow.calls[2] == RecentCall("revise", 2.5, 1.5, 100, 7, None)
    assert (workflow.type, workflow.tenant, workflow.arrived_s) == ("sql", "t", 10.0)
    assert (workflow.deadline_s, workflow.latency_s) == (40.0, 4.0)
    assert parse(recorder.ring.text().splitlines(), "ring") == [workflow]


def test_the_routers_own_estimate_stands_in_for_unsaid_cache_hits() -> None:
    recorder = Recorder(Ring())
    recorder.arrived(call("a", final=True), 0.0)
    recorder.placed(Placement("a", "fast", "finish", uncached_tokens=30))
    recorder.ended("a", CallResult(ok=True, output_tokens=7), 1.0)
    (workflow,) = recorder.ring
    assert (workflow.calls[0].prompt, workflow.calls[0].cached) == (100, 70)


def test_silence_and_the_clients_word_end_a_workflow() -> None:
    recorder = Recorder(Ring(), idle_s=60.0)
    for name in ("a", "b"):
        recorder.arrived(call(name, name), 0.0)
        recorder.ended(name, OK, 1.0)
    recorder.finished("a")
    assert recorder.ring.seen == 1
    recorder.tick(60.0)
    assert recorder.ring.seen == 1
    recorder.tick(61.0)
    assert recorder.ring.seen == 2


def test_a_workflow_at_work_keeps_no_silent_one_from_ending() -> None:
    recorder = Recorder(Ring(), idle_s=60.0)
    for name in ("at-work", "silent"):
        recorder.arrived(call(name, name), 0.0)
    recorder.ended("silent", OK, 1.0)
    recorder.tick(61.0)
    assert recorder.ring.seen == 1
    recorder.ended("at-work", OK, 100.0)
    recorder.tick(159.0)
    assert recorder.ring.seen == 1
    recorder.tick(160.0)
    assert recorder.ring.seen == 2


def test_a_failed_call_leaves_no_latency() -> None:
    recorder = Recorder(Ring())
    recorder.arrived(call("a"), 0.0)
    recorder.arrived(call("b", final=True), 0.0)
    recorder.ended("a", OK, 1.0)
    recorder.ended("b", CallResult(ok=False, reason="abort"), 2.0)
    recorder.ended("b", OK, 3.0)  # twice is harmless
    (workflow,) = recorder.ring
    assert (workflow.latency_s, len(workflow.calls)) == (None, 1)


def test_open_workflows_are_bounded() -> None:
    recorder = Recorder(Ring(), max_open=2)
    for name in ("a", "b", "c"):
        recorder.arrived(call(name, name), 0.0)
    recorder.ended("a", OK, 1.0)  # forgotten, harmless
    recorder.finished("a")
    recorder.ended("c", OK, 1.0)
    recorder.finished("c")
    assert recorder.ring.seen == 1


class Stand:
    """A tuner of a router that has served 40 workflows, with a search that answers at once."""

    def __init__(self, mode: str, *losses: float, policy: str = "paper") -> None:
        self.clock = ManualClock()
        self.coordinator = Coordinator(DispatchOptions(policy=policy))
        self.applied: list[dict[str, float]] = []
        self.searches: list[Files] = []
        self._losses = losses
        self.ring = Ring()
        self.serve(12.0)
        spec = EngineSpec("fast", max_num_seqs=8, max_num_batched_tokens=512)
        self.coordinator.engine_joined(spec, 0.0)
        self.coordinator.engine_reported("fast", EngineReport(cost=COST, fit_error=0.01))
        options = OnlineOptions(tune=mode, tune_workflows=40, tune_least_s=10.0)
        self.tuning = Tuning(
            options, self.coordinator, self.clock, self.ring, self._apply, self._search
        )

    def serve(self, latency_s: float) -> None:
        for index in range(40):
            calls = (RecentCall("a", 0.0, latency_s, 100, 10),)
            jitter = 0.01 * (index % 7)
            at = float(self.ring.seen)
            latency = latency_s + jitter
            self.ring.add(RecentWorkflow("x", at, calls, "t", 20.0, latency))

    def _apply(self, values: Mapping[str, float]) -> None:
        self.applied.append(dict(values))

    async def _search(self, files: Files, *_: object) -> dict[str, Any]:
        self.searches.append(files)
        if not self._losses:
            raise SearchFailed("no luck")
        after, before = self._losses
        trials = [
            {"values": {"alpha": a}, "losses": {"1": loss, "2": loss + 0.1}}
            for a, loss in ((0.2, before), (0.6, after))
        ]
        return {"proposed": {"alpha": 0.6}, "trials": trials}


async def test_a_better_setting_is_turned_and_a_worse_result_turned_back() -> None:
    stand = Stand("auto", 9.0, 12.0)
    await stand.tuning.look()
    assert stand.searches == []  # too early
    stand.clock.advance(11.0)
    await stand.tuning.look()
    assert stand.applied == [{"alpha": 0.6}]
    stand.serve(30.0)
    await stand.tuning.look()
    assert stand.applied == [{"alpha": 0.6}, {"alpha": 0.2}]
    assert stand.tuning.tuner.counts == {"search": 1, "apply": 1, "revert": 1}


async def test_suggest_turns_nothing() -> None:
    stand = Stand("suggest", 9.0, 12.0)
    stand.clock.advance(11.0)
    await stand.tuning.look()
    assert stand.applied == []
    assert stand.tuning.tuner.state(0.0)["suggested"] == {"alpha": 0.6}


async def test_a_failed_search_is_noted() -> None:
    stand = Stand("auto")
    stand.clock.advance(11.0)
    await stand.tuning.look()
    assert stand.tuning.tuner.phase is TuningPhase.WATCHING
    assert stand.tuning.tuner.history[-1].why == "no luck"


async def test_an_engine_without_a_rate_or_a_baseline_policy_is_not_tuned() -> None:
    stand = Stand("auto", 9.0, 12.0)
    stand.coordinator.engine_joined(EngineSpec("new"), 0.0)
    stand.clock.advance(11.0)
    await stand.tuning.look()
    assert stand.searches == []
    assert "engine new has not been measured" in stand.tuning.tuner.history[-1].why
    other = Stand("auto", 9.0, 12.0, policy="round_robin")
    other.clock.advance(11.0)
    await other.tuning.look()
    assert other.tuning.tuner.counts == {}


def test_the_simulator_reads_the_fleet_of_the_router(tmp_path: Path) -> None:
    stand = Stand("auto")
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_text(list(stand.coordinator.engines.values())))
    (model,) = load_fleet(path)
    assert (model.engine_id, model.cost) == ("fast", COST)
    assert (model.max_num_seqs, model.max_num_batched_tokens) == (8, 512)


def test_the_search_knows_the_values_in_force() -> None:
    words = search_command(
        [Path("r"), Path("f"), Path("o")], DispatchOptions(alpha=0.7), OnlineOptions()
    )
    assert "alpha=0.7" in words
    assert words[words.index("--nice") + 1] == "19"


async def test_a_real_search_runs_apart() -> None:
    stand = Stand("auto")
    files = (stand.ring.text(), fleet_text(list(stand.coordinator.engines.values())))
    options = OnlineOptions(tune="auto", tune_simulations=6)
    found = await search_apart(files, DispatchOptions(policy="paper", alpha=0.7), options)
    assert found["trials"][0]["values"]["alpha"] == 0.7
    assert json.dumps(found["proposed"])
    with pytest.raises(SearchFailed, match="line 1 is not JSON"):
        await search_apart(("nonsense", files[1]), DispatchOptions(policy="paper"), options)


async def test_the_router_records_and_shows_its_tuning() -> None:
    async with open_stand(FakeSettings(), tune="suggest") as stand:
        headers = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-final": "true"}
        async with stand.post(headers=headers) as answer:
            assert answer.status == 200
            await answer.read()
        stand.assert_settled()
        assert stand.context.tuning is not None
        async with stand.client.get(f"{stand.router.url}/tuning") as page:
            shown = await page.json()
        assert (shown["mode"], shown["phase"], shown["history"]) == ("suggest", "watching", [])
        (recorded,) = stand.context.tuning.recent
        assert [c.stage for c in recorded.calls] == ["default"]
        async with stand.client.get(f"{stand.router.url}/tuning/recent") as page:
            assert parse((await page.text()).splitlines(), "page") == [recorded]


async def test_the_fleet_can_be_read_as_the_tuner_needs_it(tmp_path: Path) -> None:
    async with open_stand(FakeSettings()) as stand:
        page_url = f"{stand.router.url}/tuning/fleet"
        async with stand.client.get(page_url) as page:
            assert page.status == 404
            assert "has not been measured yet" in await page.text()
        (name,) = stand.context.service.coordinator.engines
        stand.context.service.engine_reported(name, EngineReport(cost=COST, fit_error=0.01))
        async with stand.client.get(page_url) as page:
            (tmp_path / "fleet.yaml").write_text(await page.text())
        assert [m.cost for m in load_fleet(tmp_path / "fleet.yaml")] == [COST]


async def test_tuning_is_off_by_default() -> None:
    async with open_stand(FakeSettings()) as stand:
        async with stand.client.get(f"{stand.router.url}/tuning") as page:
            assert await page.json() == {"mode": "off"}
        async with stand.client.get(f"{stand.router.url}/tuning/recent") as page:
            assert page.status == 404
            assert "--tune" in await page.text()
        async with stand.client.get(f"{stand.router.url}/metrics") as page:
            assert "hexgen_router_tune" not in await page.text()


async def test_knobs_turn_in_a_running_router() -> None:
    async with open_stand(FakeSettings(), tune="auto", policy="paper") as stand:
        stand.context.service.retune({"alpha": 0.9})
        assert stand.context.service.coordinator.options.alpha == 0.9
        async with stand.post() as answer:
            assert answer.status == 200
        async with stand.client.get(f"{stand.router.url}/metrics") as page:
            assert "hexgen_router_tune_events_total" in await page.text()


def test_a_router_with_tuning_loads_no_simulator() -> None:
    code = (
        "import sys, hexgen_vllm.router.app; print(*(n for n in sys.modules if '_vllm.sim' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
