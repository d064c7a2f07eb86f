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
from hexgen_vllm.recent import RecentCall, RecentWorkflow, Ring, parse
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
from hexgen_vllm.types import EngineReport, EngineSpec, StepCost

COST = StepCost(0.02, 1e-4, 0.0, 0.0, 2e-4, 0.0)


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
