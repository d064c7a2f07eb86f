"""Several processes as one: numbers add up, lists are merged, what all see alike stays."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hexgen_vllm.router.processes.shard import merged_exposition
from hexgen_vllm.router.status import overview
from hexgen_vllm.router.status.overview import Overview
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import open_stand
from tests.router.processes.test_processes import started

FINAL = {"x-hexgen-workflow-final": "1"}


async def part(*workflows: str, open_call: bool = False) -> dict[str, Any]:
    """Return the overview of a router that served ``workflows``."""
    async with open_stand(FakeSettings(step_s=0.2 if open_call else 0.0, slots=2)) as stand:
        for name in workflows:
            headers = {"x-hexgen-workflow-id": name, "x-hexgen-workflow-type": name[0], **FINAL}
            async with stand.post(headers=headers, max_tokens=1) as answer:
                await answer.read()
        headers = {"x-hexgen-workflow-id": "late", "x-hexgen-workflow-deadline-ms": "1"}
        call = stand.post(headers=headers) if open_call else None
        task = None if call is None else asyncio.create_task(call.__aenter__())
        if task is not None:
            await stand.until(lambda: stand.context.ledger.open == 1)
        found = Overview(stand.context).body()
        if task is not None:
            (await task).close()
    shown: dict[str, Any] = json.loads(found)
    return shown


async def test_one_process_is_itself() -> None:
    one = await part("a1", "b1", open_call=True)
    assert overview.total([one]) == one


async def test_numbers_add_up_and_lists_are_merged() -> None:
    one, two = await part("a1", "b1", open_call=True), await part("a2", "a3", open_call=True)
    both = overview.total([one, two])
    assert both.keys() == one.keys()
    assert both["calls"]["answered"] == 4
    assert both["calls"]["open"] == both["workflows"]["open"] == both["workflows"]["late"] == 2
    assert sum(both["slack"]["calls"]) == 2
    assert [t["type"] for t in both["ended"]["types"]] == ["a", "b"]
    assert sum(p["on-time"] for p in both["ended"]["periods"]) == 4
    assert [(e["name"], e["calls"]) for e in both["engines"]] == [("engine-0", 2)]
    assert both["engines"][0]["kv_usage"] == 0.25
    slack = [w["slack_s"] for w in both["workflows"]["shown"]]
    assert len(slack) == 2
    assert slack == sorted(slack)
    ages = [d["age_s"] for d in both["decisions"]]
    assert len(ages) == 6
    assert ages == sorted(ages)


def test_metrics_that_count_what_one_process_has_are_summed() -> None:
    text = (
        "# TYPE hexgen_router_workflows_at_risk gauge\n"
        'hexgen_router_workflows_at_risk{outlook="late"} 2.0\n'
        "# TYPE hexgen_router_engine_preemptions_total counter\n"
        'hexgen_router_engine_preemptions_total{engine="e"} 5.0\n'
    )
    lines = merged_exposition([text, text]).splitlines()
    assert 'hexgen_router_workflows_at_risk{outlook="late"} 4.0' in lines
    assert 'hexgen_router_engine_preemptions_total{engine="e"} 5.0' in lines, "the engine's own"


@pytest.mark.e2e
async def test_the_page_of_two_processes_shows_both_with_keys_too() -> None:
    async with FakeServer() as engine, started(engine.url, api_key="k") as router:
        for i in range(12):
            async with router.post(f"w{i}", max_tokens=2) as answer:
                assert answer.status == 200
                await answer.read()
        for _ in range(6):  # whichever process is asked
            shown = json.loads(await router.get("/ui/data"))
            assert shown["calls"]["answered"] == 12
            assert shown["workflows"]["open"] == 12
            assert len(shown["decisions"]) == 12
