"""How many engines the router says there should be, to autoscalers that are not ours."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hexgen_vllm.router.status.demand import INTERVAL_S, DemandCollector
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

SLOW: dict[str, Any] = {
    "cost": {"c0": 1.0, "c1": 0.0, "c2": 0.0, "p0": 0.0, "p1": 0.01, "p2": 0.0},
    "running": 1, "waiting": 0, "kv_usage": 0.5, "kv_tokens": 4096, "max_num_seqs": 1,
    "fit_error": 0.01,
}  # fmt: skip


async def scaling(stand: Stand) -> dict[str, Any]:
    async with stand.get("/scaling") as answer:
        assert answer.status == 200
        return await answer.json()  # type: ignore[no-any-return]


async def call(stand: Stand) -> None:
    async with stand.post(headers={"x-hexgen-workflow-deadline-ms": "60000"}) as answer:
        await answer.read()


async def test_more_engines_are_wanted_than_can_serve_what_waits() -> None:
    async with open_stand(FakeSettings(stats=SLOW), FakeSettings(stats=SLOW)) as stand:
        demand = DemandCollector(stand.context)
        demand.tick(0.0)
        for engine in stand.engines:
            engine.fault = Fault("hang", 1)
        before = stand.context.ledger.open
        tasks = [asyncio.create_task(call(stand)) for _ in range(30)]
        await stand.until(lambda: stand.context.ledger.open == before + 30)
        demand.tick(2 * INTERVAL_S)
        found = demand.view()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert found["ready"] == 2
    assert found["wanted"] > 2
    assert found["ratio"] == found["wanted"] / 2
    samples = {s.name: s.value for family in demand.collect() for s in family.samples}
    assert samples["hexgen_router_engines_wanted"] == found["wanted"]
    assert samples["hexgen_router_engine_demand_ratio"] == found["ratio"]


async def test_idle_engines_are_spared_one_at_a_time() -> None:
    fast = {**SLOW, "cost": {**SLOW["cost"], "c0": 0.001, "p1": 1e-6}, "max_num_seqs": 64}
    async with open_stand(*(FakeSettings(stats=fast) for _ in range(3))) as stand:
        await call(stand)
        demand = DemandCollector(stand.context)
        demand.tick(0.0)
        assert demand.view() == {"ready": 3, "wanted": 2, "ratio": pytest.approx(2 / 3, abs=1e-3)}


async def test_nothing_is_asked_for_that_nobody_can_judge() -> None:
    async with open_stand(FakeSettings(), FakeSettings()) as stand:
        demand = DemandCollector(stand.context)
        demand.tick(0.0)
        assert demand.view() == {"ready": 2, "wanted": 2, "ratio": 1.0}
        await stand.until(lambda: stand.router._pages.demand.view()["ready"] == 2)
        assert await scaling(stand) == {"ready": 2, "wanted": 2, "ratio": 1.0}
    async with open_stand(worker_urls=("http://127.0.0.1:9",), wait=False) as stand:
        demand = DemandCollector(stand.context)
        demand.tick(0.0)
        assert demand.view() == {"ready": 0, "wanted": 0, "ratio": 1.0}
