"""Engines behind vLLM's Rust server: no middleware, so telemetry and metadata go other ways."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import pytest

from hexgen_vllm import wire
from hexgen_vllm.engine.stats_server import StatsServer
from hexgen_vllm.router.options import Worker, parse_worker
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from hexgen_vllm.types import EngineKind

RUST = FakeSettings(rust=True)
DEADLINE = {"x-hexgen-workflow-id": "w1", "x-hexgen-workflow-deadline-ms": "60000"}


def snapshot(**more: Any) -> Callable[[], dict[str, Any]]:
    said = {"order": "due", "steps": 3, "running": 1, "max_num_seqs": 7, "kv_tokens": 4096}
    said |= {"slack_bounds_s": [], "slack_counts": [0], "cost": None, "preemptions": {}}
    return lambda: {**said, **more}


def free_ports(ranks: int = 1) -> tuple[int, int]:
    """Return a port whose telemetry ports are free too; none that systems give away by chance."""
    while True:
        port = random.randrange(11_000, 20_000)
        beside = wire.stats_port(port)
        assert beside is not None
        with ExitStack() as stack:
            try:
                for one in (port, *range(beside, beside + ranks)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", one))
            except OSError:
                continue
            return port, beside


@asynccontextmanager
async def behind_rust(*ranks: Callable[[], dict[str, Any]], **options: Any) -> AsyncIterator[Stand]:
    """Start an engine behind the Rust server, with telemetry where it is by default."""
    port, beside = free_ports(len(ranks))
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(FakeServer(RUST, port=port))
        for i, said in enumerate(ranks):
            server = StatsServer(said, beside + i, i, size=len(ranks))
            stack.callback(server.close)
        stand = await stack.enter_async_context(
            open_stand(wait=False, worker_urls=(engine.url,), **options)
        )
        stand.engines[:] = [engine]
        await stand.all_ready()
        yield stand


async def workers(stand: Stand) -> list[dict[str, Any]]:
    async with stand.get("/workers") as answer:
        found: list[dict[str, Any]] = (await answer.json())["workers"]
        return found


async def test_telemetry_is_found_beside_the_server() -> None:
    async with behind_rust(snapshot()) as stand:
        (seen,) = await workers(stand)
        assert (seen["kind"], seen["max_num_seqs"], seen["kv_tokens"]) == ("hexgen", 7, 4096)
        assert seen["telemetry_port"] == wire.stats_port(stand.engines[0].port)
        load = stand.context.service.coordinator.engines["engine-0"]
        await stand.until(lambda: load.report.running == 1)


async def test_metadata_goes_in_the_body() -> None:
    async with behind_rust(snapshot()) as stand:
        headers = {**DEADLINE, "x-hexgen-stage": "draft", "x-vllm-priority": "-2"}
        async with stand.post(headers=headers, vllm_xargs={"theirs": 1}) as answer:
            assert answer.status == 200
        (got,) = stand.received()
        assert not [name for name in got.headers if name.lower().startswith("x-hexgen-")]
        assert (got.headers["x-vllm-priority"], got.headers["x-session-id"]) == ("-2", "w1")
        assert int(got.headers["content-length"]) == len(got.body)
        body = json.loads(got.body)
        said = wire.from_xargs(body["vllm_xargs"])
        assert (said.workflow_id, said.stage) == ("w1", "draft")
        assert 0 < (said.workflow_deadline_ms or 0) <= 60_000
        assert said.tail_ms is not None
        assert body["vllm_xargs"]["theirs"] == 1
        assert {**body, "vllm_xargs": None} == {**stand.body(), "vllm_xargs": None}


async def test_a_long_body_gets_it_too() -> None:
    async with behind_rust(snapshot()) as stand:
        messages = [{"role": "user", "content": "vllm_xargs " * 20_000}]
        async with stand.post(headers=DEADLINE, messages=messages) as answer:
            assert answer.status == 200
        body = json.loads(stand.received()[0].body)
        assert body["vllm_xargs"]["hexgen_workflow_id"] == "w1"
        assert body["messages"] == messages


async def test_what_has_no_place_for_it_stays_as_it_is() -> None:
    async with behind_rust(snapshot()) as stand:
        async with stand.post("/v1/embeddings", headers=DEADLINE) as answer:
            assert answer.status == 200
        assert json.loads(stand.received()[0].body) == stand.body("/v1/embeddings")


async def test_a_stock_engine_behind_it_is_told_nothing() -> None:
    async with open_stand(RUST) as stand:
        assert stand.context.fleet.engines["engine-0"].kind is EngineKind.FCFS
        async with stand.post(headers=DEADLINE) as answer:
            assert answer.status == 200
        assert json.loads(stand.received()[0].body) == stand.body()


async def test_what_is_not_ours_on_that_port_does_not_count() -> None:
    async with behind_rust(lambda: {"steps": 1}) as stand:
        assert stand.context.fleet.engines["engine-0"].kind is EngineKind.FCFS


async def test_a_port_can_be_named() -> None:
    server = StatsServer(snapshot(), 0)
    try:
        async with FakeServer(RUST) as engine:
            url = f"e={engine.url}?stats_port={server.port}"
            async with open_stand(wait=False, worker_urls=(url,)) as stand:
                await stand.until(stand.context.fleet.ready)
                found = stand.context.fleet.engines["e"]
                assert (found.kind, found.worker.url) == (EngineKind.HEXGEN, engine.url)
                assert (await workers(stand))[0]["telemetry_port"] == server.port
    finally:
        server.close()


async def test_ranks_are_read_each_and_one_may_be_silent() -> None:
    async with behind_rust(snapshot(running=4), snapshot(running=9)) as stand:
        loads = stand.context.service.coordinator.engines
        await stand.until(lambda: len(loads) == 2 and all(e.report.running for e in loads.values()))
        assert sorted(e.report.running or 0 for e in loads.values()) == [4, 9]


async def test_telemetry_that_stops_becomes_unknown_and_may_come_back() -> None:
    port, beside = free_ports()
    server = StatsServer(snapshot(), beside)
    async with (
        FakeServer(RUST, port=port) as engine,
        open_stand(wait=False, worker_urls=(engine.url,), stats_interval_secs=0.02) as stand,
    ):
        stand.engines[:] = [engine]
        await stand.all_ready()
        load = stand.context.service.coordinator.engines["engine-0"]
        await stand.until(lambda: load.report.running == 1)
        server.close()
        async with stand.post(headers=DEADLINE) as answer:
            assert answer.status == 200  # calls do not need it
        server = StatsServer(snapshot(running=5), beside)
        await stand.until(lambda: load.report.running == 5)
        server.close()


async def test_an_engine_that_says_late_that_it_is_ours_is_believed() -> None:
    port, beside = free_ports()
    async with (
        FakeServer(RUST, port=port) as engine,
        open_stand(wait=False, worker_urls=(engine.url,)) as stand,
    ):
        stand.engines[:] = [engine]
        await stand.all_ready()
        found = stand.context.fleet.engines["engine-0"]
        assert found.kind is EngineKind.FCFS
        server = StatsServer(snapshot(), beside)
        try:
            await stand.until(lambda: found.kind is EngineKind.HEXGEN)
            async with stand.post(headers=DEADLINE) as answer:
                assert answer.status == 200
            assert "vllm_xargs" in json.loads(stand.received()[-1].body)
        finally:
            server.close()


async def test_priorities_of_a_stock_engine_fit_in_32_bits() -> None:
    policy = FakeSettings(rust=True, policy="priority")
    soon = {**DEADLINE, "x-hexgen-workflow-deadline-ms": "5000"}
    said = ({}, soon, {"x-vllm-priority": "-4000000000"}, {"x-vllm-priority": "9"})
    async with open_stand(policy) as stand:
        for headers in said:
            async with stand.post(headers=headers) as answer:
                assert answer.status == 200
        none, dated, first, last = (int(r.headers["x-vllm-priority"]) for r in stand.received())
        assert -(2**31) <= first < dated < none < last < 2**31


@pytest.mark.parametrize("priority", ["99999999999", "-99999999999"])
async def test_no_priority_is_too_large_for_our_engine_there(priority: str) -> None:
    async with behind_rust(snapshot()) as stand:
        async with stand.post(headers={"x-vllm-priority": priority}) as answer:
            assert answer.status == 200
        told = int(stand.received()[0].headers["x-vllm-priority"])
        assert abs(told) == 2**31 - 1
        assert (told > 0) is (int(priority) > 0)


async def test_a_bad_field_of_the_client_is_its_error() -> None:
    async with behind_rust(snapshot()) as stand:
        xargs = {"hexgen_stages_left": -1}
        async with stand.post(CHAT, vllm_xargs=xargs) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "hexgen_stages_left"
        stand.assert_settled()


@pytest.mark.parametrize(
    ("text", "worker"),
    [
        ("http://h:1?stats_port=8100", Worker("e", "http://h:1", 8100)),
        ("a=https://h/p/?stats_port=1", Worker("a", "https://h/p", 1)),
        ("http://h:1?deadline=llm-d", Worker("e", "http://h:1", None, "llm-d")),
        ("http://h:1?deadline=none&stats_port=2", Worker("e", "http://h:1", 2, "none")),
    ],
)
def test_how_a_port_is_named(text: str, worker: Worker) -> None:
    assert parse_worker(text, "e") == worker


@pytest.mark.parametrize(
    "more",
    [
        "stats_port=0", "stats_port=65536", "stats_port=", "x=1", "a&b",
        "deadline=", "deadline=soon", "deadline=none&deadline=none",
    ],
)  # fmt: skip
def test_no_such_port(more: str) -> None:
    with pytest.raises(ValueError, match="worker_urls must be like"):
        parse_worker(f"http://h:1?{more}", "e")
