"""Engines join late, are what they say they are, report, restart, and serve different models."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace
from typing import Any

import pytest
from multidict import CIMultiDict

from hexgen_vllm.router.endpoints import ENDPOINTS
from hexgen_vllm.router.engines.health import Watcher
from hexgen_vllm.router.options import Worker
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineKind, EngineReport, EngineState

COST = {"c0": 0.01, "c1": 0.002, "c2": 0.0, "p0": 0.0, "p1": 0.001, "p2": 0.0}
STATS: dict[str, Any] = {"cost": COST, "fit_error": 0.1, "running": 1, "steps": 100,
                         "max_num_seqs": 4, "kv_tokens": 1000}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "assumed", "kind", "slots", "kv_tokens"),
    [
        (FakeSettings(stats=STATS), "auto", EngineKind.HEXGEN, 4, 1000),
        (FakeSettings(), "auto", EngineKind.FCFS, None, 1600),
        (FakeSettings(), "priority", EngineKind.PRIORITY, None, 1600),
        (FakeSettings(policy="priority", slots=7), "auto", EngineKind.PRIORITY, 7, 1600),
        (FakeSettings(policy="fcfs", slots=7), "priority", EngineKind.FCFS, 7, 1600),
    ],
)
async def test_an_engine_is_what_it_says(
    settings: FakeSettings, assumed: str, kind: EngineKind, slots: int | None, kv_tokens: int
) -> None:
    async with open_stand(settings, stock_scheduling=assumed) as stand:
        spec = stand.context.fleet.engines["engine-0"].spec
        assert spec is not None
        found = (spec.kind, spec.max_num_seqs, spec.kv_tokens, spec.models)
        assert found == (kind, slots, kv_tokens, {"tiny"})


async def test_each_kind_is_told_in_its_own_words() -> None:
    settings = (FakeSettings(stats=STATS), FakeSettings(policy="priority"), FakeSettings())
    async with open_stand(*settings, policy="round_robin") as stand:
        for _ in range(3):
            said = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "5000"}
            async with stand.post(headers=said) as answer:
                assert answer.status == 200
        ours, priority, fcfs = (engine.received[0].headers for engine in stand.engines)
        assert 0 < float(ours["x-hexgen-workflow-deadline-ms"]) <= 5000
        assert "X-Vllm-Priority" not in ours
        assert int(priority["X-Vllm-Priority"]) > 0
        for headers in (priority, fcfs):
            assert not [name for name in headers if name.lower().startswith("x-hexgen-")]
            assert headers["X-Session-ID"] == "w"
        assert "X-Vllm-Priority" not in fcfs


async def test_the_start_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hexgen_vllm.router"):
        async with open_stand(FakeSettings(stats=STATS), FakeSettings()):
            pass
    text = "\n".join(m for m in caplog.messages if "joined" in m)
    assert "engine=engine-0 kind=hexgen models=tiny max_num_seqs=4 kv_tokens=1000" in text
    assert "engine=engine-1 kind=fcfs" in text
    (stock,) = (line for line in text.splitlines() if "engine=engine-1" in line)
    assert "--stock-scheduling" in stock


async def test_a_router_starts_before_its_engines() -> None:
    async with open_stand(FakeSettings(), FakeSettings()) as old:
        urls = tuple(engine.url for engine in old.engines)
        for engine in old.engines:
            await engine.stop()
        async with open_stand(worker_urls=urls, wait=False) as stand:
            async with stand.get("/readiness") as answer:
                assert answer.status == 503
            async with stand.get("/liveness") as answer:
                assert answer.status == 200
            async with stand.post() as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
            await old.engines[1].start()
            await stand.until(lambda: stand.state(1) is EngineState.READY)
            async with stand.get("/readiness") as answer:
                assert answer.status == 200
            async with stand.post() as answer:
                assert answer.headers["x-hexgen-engine"] == "engine-1"
            stand.assert_settled()


async def test_telemetry_arrives_and_a_smaller_step_count_is_a_restart() -> None:
    stats = dict(STATS)
    async with open_stand(FakeSettings(stats=stats)) as stand:
        load = stand.context.service.coordinator.engines["engine-0"]
        await stand.until(lambda: load.report.cost is not None)
        assert load.report.running == 1
        async with stand.post("/v1/completions", prompt=[1] * 600) as answer:
            assert answer.status == 200
        raw = stand.engines[0].received[-1].body
        call = stand.context.intake.read(ENDPOINTS[1], CIMultiDict(), raw, 0.0, None).call
        assert load.prefixes.match(call) > 0
        stats["steps"] = 5
        await stand.until(lambda: load.prefixes.match(call) == 0)
        await stand.until(lambda: load.report.cost is not None)


async def test_a_stock_engine_counts_steps_too() -> None:
    async with open_stand() as stand:
        engine = stand.context.fleet.engines["engine-0"]
        async with stand.post(stream=True, max_tokens=20, ignore_eos=True) as answer:
            await answer.read()
        (fake,) = stand.engines
        assert fake.steps > 20
        await stand.until(lambda: engine.steps.get("engine-0") == fake.steps)
        raw = fake.received[-1].body
        call = stand.context.intake.read(ENDPOINTS[0], CIMultiDict(), raw, 0.0, None).call
        load = stand.context.service.coordinator.engines["engine-0"]
        load.prefixes.add(replace(call, prefix=(1,), prefix_chunk_tokens=1))
        fake.counts.steps.clear()  # as after a restart
        await stand.until(lambda: engine.steps.get("engine-0") == 0)
        assert load.prefixes.match(replace(call, prefix=(1,), prefix_chunk_tokens=1)) == 0


async def test_telemetry_that_stops_becomes_unknown() -> None:
    stats: dict[str, Any] = dict(STATS)
    async with open_stand(FakeSettings(stats=stats)) as stand:
        load = stand.context.service.coordinator.engines["engine-0"]
        await stand.until(lambda: load.report.cost is not None)
        stats.clear()
        await stand.until(lambda: load.report == EngineReport())
        async with stand.post() as answer:
            assert answer.status == 200


async def test_why_an_engine_is_not_up_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with open_stand(FakeSettings()) as stand:
        parts = stand.context
        late = parts.fleet.add(Worker("late", "http://127.0.0.1:9"))
        probe = parts.watchers.probe
        watcher = Watcher(late, parts.fleet, parts.service, probe, parts.options, parts.clock)
        with caplog.at_level(logging.INFO, "hexgen_vllm.router.engines.health"):
            for _ in range(3):
                await watcher.turn()
        assert [record.getMessage() for record in caplog.records if "late" in record.args] == [
            "engine not up engine=late reason='nobody listens there'"
        ]


async def test_who_watched_an_engine_that_was_removed_lets_its_successor_alone() -> None:
    async with open_stand(FakeSettings(), wait=False) as stand:
        parts = stand.context
        there = Worker("again", stand.engines[0].url)
        gone = parts.fleet.add(Worker("again", "http://127.0.0.1:9"))
        probe = parts.watchers.probe
        watcher = Watcher(gone, parts.fleet, parts.service, probe, parts.options, parts.clock)
        running = asyncio.ensure_future(watcher.run())
        await stand.until(lambda: gone.why == "nobody listens there")
        parts.fleet.remove("again")  # its watcher was not cancelled, or did not notice
        gone.up = True
        parts.watchers.add(there, await probe.find(there))
        await watcher.turn()
        assert parts.fleet.engines["again"].up
        watcher.suspect()
        await running


async def test_models_decide_where_a_call_may_go() -> None:
    settings = [FakeSettings(models=names) for names in (("a", "x"), ("b",), ("b", "x"))]
    async with open_stand(*settings, policy="round_robin") as stand:
        for model, engines in (("a", {0}), ("b", {1, 2}), ("x", {0, 2})):
            seen = set()
            for _ in range(4):
                async with stand.post(model=model) as answer:
                    seen.add(answer.headers["x-hexgen-engine"])
            assert seen == {f"engine-{i}" for i in engines}
        async with stand.post(model="c") as answer:
            assert answer.status == 404
            error = (await answer.json())["error"]
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        async with stand.post(model=None) as answer:
            assert answer.status == 400
        async with stand.get("/v1/models") as answer:
            cards = (await answer.json())["data"]
        assert sorted(card["id"] for card in cards) == ["a", "b", "x"]
        await stand.engines[0].stop()
        async with stand.post(model="a") as answer:
            assert answer.status in (502, 503), "known, only not up"
        stand.assert_settled()


async def test_adapters_are_models_and_may_come_and_go() -> None:
    settings = (FakeSettings(models=("base",), adapters=("sql",)), FakeSettings(models=("base",)))
    async with open_stand(*settings, policy="round_robin") as stand:
        load = stand.context.service.coordinator.engines["engine-1"]
        assert load.spec.max_model_len == 32768
        assert stand.context.service.coordinator.engines["engine-0"].spec.max_model_len == 32768
        for model, engines in (("sql", {0}), ("base", {0, 1})):
            assert await placed_on(stand, model) == engines
        assert await placed_on(stand, "chat") == {404}
        load.assigned_s = 7.0
        stand.engines[1].settings = FakeSettings(models=("base",), adapters=("chat", "sql"))
        await stand.until(lambda: "chat" in load.spec.models)
        for model, engines in (("sql", {0, 1}), ("chat", {1}), ("base", {0, 1})):
            assert await placed_on(stand, model) == engines
        assert load.assigned_s == 7.0, "nothing else was forgotten"
        async with stand.get("/v1/models") as answer:
            cards = {card["id"]: card["parent"] for card in (await answer.json())["data"]}
        assert cards == {"base": None, "sql": "base", "chat": "base"}
        stand.engines[1].settings = settings[1]
        await stand.until(lambda: load.spec.models == {"base"})
        assert await placed_on(stand, "chat") == {404}
        stand.assert_settled()


async def placed_on(stand: Stand, model: str) -> set[int]:
    """Return the engines that get calls for ``model``, or the status that refuses them."""
    seen = set()
    for _ in range(4):
        async with stand.post(model=model) as answer:
            name = answer.headers.get("x-hexgen-engine", str(answer.status))
            seen.add(int(name.removeprefix("engine-")))
    return seen


async def test_a_long_call_goes_where_it_fits() -> None:
    settings = [FakeSettings(max_model_len=n) for n in (500, 4000)]
    async with open_stand(*settings, policy="round_robin") as stand:
        for prompt, tokens, engines in ((100, 10, {0, 1}), (1000, 10, {1}), (100, 1000, {1}),
                                        (9000, 10, {0, 1})):  # fmt: skip
            seen = set()
            for _ in range(4):
                body = {"prompt": [1] * prompt, "max_tokens": tokens}
                async with stand.post("/v1/completions", **body) as answer:
                    seen.add(answer.headers["x-hexgen-engine"])
                    await answer.read()
            assert seen == {f"engine-{i}" for i in engines}
        async with stand.get("/workers") as answer:
            workers = (await answer.json())["workers"]
        assert [one["max_model_len"] for one in workers] == [500, 4000]


async def test_engine_names_can_be_given() -> None:
    async with open_stand() as other:
        url = f"fast={other.engines[0].url}"
        async with open_stand(worker_urls=(url,), wait=False) as stand:
            await stand.until(stand.context.fleet.ready)
            async with stand.post() as answer:
                assert answer.headers["x-hexgen-engine"] == "fast"


@pytest.mark.parametrize(
    ("words", "kind", "header"),
    [
        ("llm-d", EngineKind.FCFS, "x-llm-d-slo-ttft-ms"),
        ("dynamo", EngineKind.FCFS, "x-dynamo-slo-ttft-ms"),
        ("priority", EngineKind.PRIORITY, "x-vllm-priority"),
        ("none", EngineKind.FCFS, None),
    ],
)
async def test_each_engine_is_told_in_the_words_that_were_said(
    words: str, kind: EngineKind, header: str | None
) -> None:
    async with FakeServer(FakeSettings()) as engine:
        url = f"e={engine.url}?deadline={words}"
        async with open_stand(wait=False, worker_urls=(url,), stock_scheduling="priority") as stand:
            await stand.until(stand.context.fleet.ready)
            assert stand.context.fleet.engines["e"].kind is kind
            said = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "30000"}
            async with stand.post(headers=said) as answer:
                assert answer.status == 200
        (told,) = (one.headers for one in engine.received if one.method == "POST")
    found = {name.lower() for name in told} & {
        "x-llm-d-slo-ttft-ms", "x-dynamo-slo-ttft-ms", "x-vllm-priority",
    }  # fmt: skip
    assert found == ({header} if header else set())
    if header and header.endswith("-ms"):
        assert 0 < int(told[header]) <= 30_000


async def test_a_host_that_nobody_knows_is_no_engine_that_is_down() -> None:
    """Who mistyped a name does not look for a process that does not run."""
    host = "no-such-host.invalid"
    with pytest.raises(socket.gaierror) as unknown:
        socket.getaddrinfo(host, 8000)
    if unknown.value.errno == socket.EAI_AGAIN:
        pytest.skip("there is no resolver here that would know")
    url = f"http://{host}:8000"
    async with open_stand(wait=False, worker_urls=(url,)) as stand:
        (engine,) = stand.context.fleet.engines.values()
        await stand.until(lambda: host in engine.why)
