"""Engines with several data-parallel ranks: each gets calls of its own, and all share a fate."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineKind, EngineState

RANK = "X-data-parallel-rank"
FAST = {"c0": 0.001, "c1": 0.0, "c2": 0.0, "p0": 0.0, "p1": 1e-5, "p2": 0.0}
SLOW = {**FAST, "c0": 0.1}


def ours(*costs: dict[str, float], **more: Any) -> FakeSettings:
    """Return an engine of ours with a rank for each of ``costs``."""
    ranks = [{"cost": cost, "max_num_seqs": 4, "kv_tokens": 1000, "steps": 9} for cost in costs]
    return FakeSettings(stats={"ranks": ranks}, ranks=len(costs), **more)


def ranks_of(stand: Stand, engine: int = 0) -> list[str | None]:
    """Return the ranks that calls on an engine were sent to, in order."""
    return [one.headers.get(RANK) for one in stand.engines[engine].received]


def loads(stand: Stand) -> list[str]:
    """Return the names of what calls are placed on."""
    return sorted(stand.context.service.coordinator.engines)


async def test_each_rank_is_a_target_of_its_own() -> None:
    async with open_stand(ours(FAST, SLOW), FakeSettings(), policy="round_robin") as stand:
        assert loads(stand) == ["engine-0@0", "engine-0@1", "engine-1"]
        names = []
        for _ in range(6):
            async with stand.post() as answer:
                assert answer.status == 200
                names.append(answer.headers["x-hexgen-engine"])
        assert names == ["engine-0@0", "engine-0@1", "engine-1"] * 2
        assert ranks_of(stand) == ["0", "1"] * 2
        assert ranks_of(stand, 1) == [None] * 2
        stand.assert_settled()


async def test_each_rank_has_its_own_rates() -> None:
    async with open_stand(ours(SLOW, FAST)) as stand:
        slow, fast = (stand.context.service.coordinator.engines[n] for n in loads(stand))
        await stand.until(lambda: slow.cost() and fast.cost())
        assert (slow.cost().c0, fast.cost().c0) == (0.1, 0.001)  # type: ignore[union-attr]
        for _ in range(4):
            async with stand.post() as answer:
                assert answer.status == 200
        assert ranks_of(stand) == ["1"] * 4


async def test_each_rank_has_its_own_load() -> None:
    """Calls in flight on one rank make the next go to the other."""
    async with open_stand(FakeSettings(ranks=2, step_s=0.01), policy="least_outstanding") as stand:
        calls = [asyncio.ensure_future(answered(stand)) for _ in range(8)]
        await stand.until(lambda: len(stand.received()) == 8)
        engines = stand.context.service.coordinator.engines
        assert [len(engines[name].in_flight) for name in loads(stand)] == [4, 4]
        async with stand.get("/workers") as answer:
            (worker,) = (await answer.json())["workers"]
        assert (worker["name"], worker["load"], worker["data_parallel_size"]) == ("engine-0", 8, 2)
        assert await asyncio.gather(*calls) == [200] * 8
        assert Counter(ranks_of(stand)) == {"0": 4, "1": 4}
        stand.assert_settled()


async def answered(stand: Stand, **more: Any) -> int:
    async with stand.post(**more) as answer:
        await answer.read()
        return int(answer.status)


async def test_a_prompt_goes_back_to_the_rank_that_has_it_cached() -> None:
    cost = {**FAST, "p1": 0.01}
    async with open_stand(ours(cost, cost)) as stand:
        engines = stand.context.service.coordinator.engines
        await stand.until(lambda: all(load.cost() for load in engines.values()))
        for first in (1, 2, 1, 2, 2, 1):
            await answered(stand, path="/v1/completions", prompt=[first] * 600)
        by_prompt: dict[bytes, set[str | None]] = {}
        for one in stand.engines[0].received:
            by_prompt.setdefault(one.body, set()).add(one.headers[RANK])
        assert sorted(map(len, by_prompt.values())) == [1, 1]


async def test_what_a_client_says_of_ranks_yields_to_the_router() -> None:
    async with open_stand(FakeSettings(ranks=2), FakeSettings(), policy="round_robin") as stand:
        for _ in range(3):
            async with stand.post(headers={RANK: "0"}) as answer:
                assert answer.status == 200
        assert (ranks_of(stand), ranks_of(stand, 1)) == (["0", "1"], ["0"])


@pytest.mark.parametrize(("said", "targets"), [(0, 2), (1, 1), (4, 2)])
async def test_the_engine_knows_best_how_many_it_has(said: int, targets: int) -> None:
    async with open_stand(FakeSettings(ranks=2), intra_node_data_parallel_size=said) as stand:
        assert len(loads(stand)) == targets
        await answered(stand)
        assert ranks_of(stand) == [None if targets == 1 else "0"]
        async with stand.get("/workers") as answer:
            (worker,) = (await answer.json())["workers"]
        assert worker["kv_tokens"] == 3200


async def test_an_engine_without_metrics_has_as_many_as_the_option_says() -> None:
    settings = FakeSettings(ranks=3, metrics=False)
    async with open_stand(settings, intra_node_data_parallel_size=3) as stand:
        assert loads(stand) == ["engine-0@0", "engine-0@1", "engine-0@2"]


async def test_diagnostics_and_metrics_name_ranks() -> None:
    async with open_stand(ours(FAST, SLOW), policy="round_robin") as stand:
        assert await answered(stand) == 200
        async with stand.get("/scheduling/diagnostics") as answer:
            engines = (await answer.json())["engines"]
        assert [one["name"] for one in engines] == ["engine-0@0", "engine-0@1"]
        assert {one["kind"] for one in engines} == {EngineKind.HEXGEN.value}
        async with stand.get("/ui/data") as answer:
            shown = [one["name"] for one in (await answer.json())["engines"]]
        assert shown == ["engine-0@0", "engine-0@1"]
        async with stand.get("/metrics") as answer:
            families = list(text_string_to_metric_families(await answer.text()))
        for name in ("engine_up", "engine_calls", "engine_tokens"):
            (family,) = (f for f in families if f.name == f"hexgen_router_{name}")
            assert {s.labels["engine"] for s in family.samples} == {"engine-0@0", "engine-0@1"}
        (placed,) = (f for f in families if f.name == "hexgen_router_placements")
        total = [s for s in placed.samples if s.name.endswith("_total")]
        assert [s.labels["engine"] for s in total] == ["engine-0@0"]


async def test_operators_act_on_the_engine_with_all_its_ranks() -> None:
    options = {"admin_api_key": ("k",), "policy": "round_robin"}
    admin = {"Authorization": "Bearer k"}
    async with open_stand(FakeSettings(ranks=2), FakeSettings(), **options) as stand:
        url = stand.router.url + "/workers/"
        async with stand.client.post(url + "engine-0/drain", headers=admin) as answer:
            assert (await answer.json())["state"] == "draining"
        async with stand.client.post(url + "engine-0@0/drain", headers=admin) as answer:
            assert answer.status == 404
        assert [await answered(stand) for _ in range(3)] == [200] * 3
        assert (len(ranks_of(stand)), len(ranks_of(stand, 1))) == (0, 3)
        async with stand.client.post(url + "engine-0/undrain", headers=admin) as answer:
            assert answer.status == 200
        assert [await answered(stand) for _ in range(3)] == [200] * 3
        assert Counter(ranks_of(stand)) == {"0": 1, "1": 1}
        async with stand.client.delete(url + "engine-0", headers=admin) as answer:
            assert (await answer.json())["removed"] is True
        assert loads(stand) == ["engine-1"]
        body = {"url": stand.engines[0].url, "name": "new"}
        async with stand.client.post(url[:-1], json=body, headers=admin) as answer:
            assert (answer.status, (await answer.json())["data_parallel_size"]) == (201, 2)
        assert loads(stand) == ["engine-1", "new@0", "new@1"]


async def test_a_removal_waits_for_the_calls_of_every_rank() -> None:
    options = {"admin_api_key": ("k",), "policy": "round_robin"}
    admin = {"Authorization": "Bearer k"}
    async with open_stand(FakeSettings(ranks=2, step_s=0.02), **options) as stand:
        await answered(stand, max_tokens=1)
        long = asyncio.ensure_future(answered(stand))
        await stand.until(lambda: ranks_of(stand) == ["0", "1"])
        async with stand.client.delete(
            stand.router.url + "/workers/engine-0", headers=admin
        ) as answer:
            assert answer.status == 202
        assert await long == 200
        await stand.until(lambda: not stand.context.fleet.engines)
        stand.assert_settled()


async def test_a_lost_engine_is_lost_with_all_its_ranks() -> None:
    async with open_stand(FakeSettings(ranks=2), FakeSettings(), policy="round_robin") as stand:
        await stand.engines[0].stop()
        assert [await answered(stand) for _ in range(4)] == [200] * 4
        assert stand.state(0) is EngineState.DOWN
        states = {n: load.state for n, load in stand.context.service.coordinator.engines.items()}
        assert states["engine-0@0"] is states["engine-0@1"] is EngineState.DOWN
        assert len(ranks_of(stand, 1)) == 4
        await stand.engines[0].start()
        await stand.until(lambda: stand.state(0) is not EngineState.DOWN)
        assert loads(stand) == ["engine-0@0", "engine-0@1", "engine-1"]
        stand.assert_settled()


async def test_an_engine_that_comes_back_with_other_ranks_gets_other_targets() -> None:
    async with open_stand(ours(FAST, FAST)) as stand:
        stand.engines[0].settings = ours(FAST, FAST, FAST)
        await stand.until(lambda: len(loads(stand)) == 3)
        assert stand.state(0) is EngineState.READY, "scaled while it ran"
        stand.engines[0].settings = FakeSettings(stats={"cost": FAST})
        await stand.until(lambda: loads(stand) == ["engine-0"])
        assert await answered(stand) == 200
        assert ranks_of(stand) == [None]


async def test_one_silent_rank_takes_its_engine_out() -> None:
    """The rank beside it works on, which is no sign of life of the silent one."""
    clock = ManualClock()
    settings = ours(FAST, FAST)
    assert settings.stats is not None
    ranks: list[dict[str, Any]] = settings.stats["ranks"]
    limits = {"engine_stall_secs": 5.0, "engine_stall_steps": 0.0, "retry_jitter_factor": 0.0}
    stand_of = open_stand(
        settings, FakeSettings(), policy="round_robin", clock=clock, **limits,
        health_check_interval_secs=0.01, stats_interval_secs=0.01,
    )  # fmt: skip
    async with stand_of as stand:
        engine = stand.context.fleet.engines["engine-0"]
        stand.engines[0].faults.append(Fault("hang"))
        call = asyncio.ensure_future(answered(stand))
        await stand.until(lambda: ranks_of(stand) == ["0"])
        await stand.until(lambda: engine.steps == {"engine-0@0": 9, "engine-0@1": 9})
        for second in range(20):  # three times the limit: its health checks pass
            ranks[1]["steps"] = 10 + second
            clock.advance(1.0)
            await stand.until(lambda n=second: engine.steps["engine-0@1"] == 10 + n)
            stand.context.stalls.tick(clock.now())
        assert engine.stalled == {"engine-0@0"}
        assert stand.state(0) is EngineState.DOWN
        assert await call == 200, "it moved"
        ranks[0]["steps"] = 10
        clock.advance(1.0)
        await stand.until(lambda: engine.steps["engine-0@0"] == 10)
        stand.context.stalls.tick(clock.now())
        assert stand.state(0) is EngineState.TRIAL
