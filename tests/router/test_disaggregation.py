"""Calls of two engines: what each is sent, what the client sees, and what becomes of faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.options import parse_worker
from hexgen_vllm.testing import fake_tokens
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault
from hexgen_vllm.testing.fake_settings import FaultKind
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from hexgen_vllm.types import Role

COMPLETIONS = "/v1/completions"
PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "p"}
LONG = "SELECT name FROM singer WHERE age > 30; " * 500
ROLES = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
COST = {"c0": 0.01, "c1": 0.0, "c2": 0.0, "p0": 0.0, "p1": 1e-4, "p2": 0.0}
QUICK = {"max_num_seqs": 8, "cost": COST}  # at prompts
SLOW = {"max_num_seqs": 8, "cost": {**COST, "p1": 1e-2}}
SHARED = FakeSettings(stats=QUICK)  # says nothing of where KV is
NIXL = replace(SHARED, kv_transfer_params=PARAMS)
ANSWERS = FakeSettings(stats=SLOW)


@asynccontextmanager
async def opened(
    *settings: FakeSettings, roles: tuple[Role, ...] = ROLES, **options: Any
) -> AsyncIterator[Stand]:
    """Open a stand whose engines have ``roles``, the first ones for prefill."""
    given = settings or [NIXL if role is Role.PREFILL else ANSWERS for role in roles]
    async with open_stand(*given, roles=roles, **options) as stand:
        loads = stand.context.service.coordinator.engines
        await stand.until(lambda: all(load.cost() is not None for load in loads.values()))
        yield stand


def bodies(engine: FakeServer) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in engine.received]


def long_body(path: str, **more: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": LONG}]} if path == CHAT else {"prompt": LONG}
    return {**said, **more}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_prompt_goes_to_one_engine_and_its_kv_to_another(path: str, stream: bool) -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE)) as stand:
        prefiller, answerer = stand.engines
        sent = long_body(path, stream=stream, max_tokens=5, min_tokens=2, temperature=0)
        if path == CHAT:
            sent["max_completion_tokens"] = 6
        if stream:
            sent["stream_options"] = {"include_usage": True}
        headers = {
            "X-Request-Id": "one",
            "x-hexgen-workflow-id": "w",
            "x-hexgen-workflow-deadline-ms": "9000",
        }
        async with stand.post(path, headers=headers, **sent) as answer:
            said = await answer.text()
            assert answer.status == 200
            assert answer.headers["x-hexgen-engine"] == "engine-1"
            assert answer.headers["x-request-id"] == "one"
        (first,), (second,) = bodies(prefiller), bodies(answerer)
        asked = {"model": "tiny", **sent}
        assert second == {**asked, "kv_transfer_params": PARAMS}
        assert first["max_tokens"] == 1
        assert first["stream"] is False
        assert first["kv_transfer_params"]["do_remote_decode"] is True
        assert "min_tokens" not in first
        assert "stream_options" not in first
        assert first.get("max_completion_tokens", 1) == 1
        kept = ("model", "messages", "prompt", "temperature")
        assert [first.get(name) for name in kept] == [second.get(name) for name in kept]
        ids = {one.headers["x-request-id"] for one in stand.received()}
        assert ids == {"one"}
        # The client's answer, counts included, is that of the second engine, and is counted once.
        expected = 6 if path == CHAT else 5
        assert f'"completion_tokens": {expected}'.replace(" ", "") in said.replace(" ", "")
        book = stand.context.ledger
        assert book.answered() == book.arrived.total() == 1
        assert dict(book.prefills) == {"done": 1, "failed": 0, "declined": 0}
        assert book.placements["engine-0", "prefill"] == 1
        stand.assert_settled()


async def test_engines_that_share_storage_say_nothing_of_kv() -> None:
    async with opened(SHARED, ANSWERS, roles=(Role.PREFILL, Role.DECODE)) as stand:
        async with stand.post(COMPLETIONS, **long_body(COMPLETIONS)) as answer:
            assert answer.status == 200
        (second,) = bodies(stand.engines[1])
        assert "kv_transfer_params" not in second
        assert len(stand.engines[0].received) == 1


async def test_both_halves_of_engines_of_ours_are_told_when_they_are_due() -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE)) as stand:
        headers = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "60000"}
        async with stand.post(CHAT, headers=headers, **long_body(CHAT)) as answer:
            assert answer.status == 200
        first, second = (engine.received[0].headers for engine in stand.engines)
        left = [float(one["x-hexgen-workflow-deadline-ms"]) for one in (first, second)]
        assert 0 < left[1] <= left[0] <= 60_000
        assert float(first["x-hexgen-tail-ms"]) > float(second["x-hexgen-tail-ms"])
        assert first["x-hexgen-expected-output-tokens"] == "1"
        assert first["x-hexgen-workflow-id"] == second["x-hexgen-workflow-id"] == "w"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (COMPLETIONS, {"n": 2}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"prompt": [LONG, LONG]}),
        (COMPLETIONS, {"prompt_logprobs": 0}),
        (COMPLETIONS, {"kv_transfer_params": {"do_remote_decode": True}}),
        (CHAT, {"use_beam_search": True}),
        (COMPLETIONS, {"prompt": "hi"}),  # short
        ("/v1/responses", {"input": LONG}),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}),
        ("/v1/embeddings", {"input": LONG}),
    ],
)
async def test_other_calls_are_sent_whole(path: str, more: dict[str, Any]) -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE)) as stand:
        sent = {**(long_body(path) if path in (CHAT, COMPLETIONS) else {}), **more}
        async with stand.post(path, **sent) as answer:
            assert answer.status == 200
        assert not stand.engines[0].received
        assert bodies(stand.engines[1]) == [{**stand.body(path), **sent}]


KINDS: tuple[FaultKind, ...] = ("reset", "close", "half", "garbage", "status")


@pytest.mark.parametrize("after", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_prefill_engine_that_fails_costs_its_clients_nothing(
    kind: FaultKind, after: int | None
) -> None:
    async with opened() as stand:
        for engine in stand.engines[:2]:
            engine.fault = Fault(kind, after)
        async with stand.post(CHAT, **long_body(CHAT, stream=True)) as answer:
            assert answer.status == 200
            assert (await answer.text()).endswith("[DONE]\n\n")
        sent = [len(engine.received) for engine in stand.engines]
        if kind != "status" or after is None:
            assert sent[:2] == [1, 1]
            assert stand.context.ledger.prefills["failed"] == 2
        assert sum(sent[2:]) == 1
        (last,) = bodies(stand.engines[2]) + bodies(stand.engines[3])
        assert ("kv_transfer_params" in last) is (stand.context.ledger.prefills["done"] == 1)
        stand.assert_settled()


async def test_retries_that_are_not_allowed_leave_the_prompt_to_the_engine_that_answers() -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE), disable_retries=True) as stand:
        stand.engines[0].fault = Fault("reset")
        async with stand.post(CHAT, **long_body(CHAT)) as answer:
            assert answer.status == 200
        assert stand.context.ledger.prefills["failed"] == 1
        assert len(stand.engines[1].received) == 1
        stand.assert_settled()


async def test_what_a_prefill_engine_refuses_the_other_engine_judges() -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE)) as stand:
        stand.engines[0].fault = Fault("status", status=400)
        async with stand.post(CHAT, **long_body(CHAT)) as answer:
            assert answer.status == 200
        assert dict(stand.context.ledger.prefills) == {"done": 0, "failed": 0, "declined": 1}
        stand.engines[1].fault = Fault("status", status=400)
        async with stand.post(CHAT, **long_body(CHAT)) as answer:
            assert answer.status == 400
        stand.assert_settled()


async def test_an_engine_that_dies_with_the_kv_is_replaced_and_the_prompt_computed_anew() -> None:
    async with opened() as stand:
        one, other = stand.engines[2:]
        one.fault = Fault("reset")
        while not one.received:
            assert (await ask(stand))[0] == 200
        calls = len(other.received)
        assert stand.context.ledger.prefills["done"] == calls + 1
        assert len(stand.engines[0].received) == calls + 1
        assert stand.context.ledger.retries["engine-lost"] == 1
        stand.assert_settled()


async def test_a_prefill_engine_that_dies_in_the_middle_is_replaced() -> None:
    hung = replace(NIXL, prefill_tokens_per_s=1.0)
    slower = replace(NIXL, stats={**QUICK, "cost": {**COST, "p1": 2e-4}})
    async with opened(hung, slower, ANSWERS, roles=ROLES[:3]) as stand:
        task = asyncio.create_task(ask(stand))
        await stand.until(lambda: stand.engines[0].running)
        await stand.engines[0].stop()
        assert (await task)[0] == 200
        assert len(stand.engines[1].received) == 1
        assert bodies(stand.engines[2])[0]["kv_transfer_params"] == PARAMS
        stand.assert_settled()


async def ask(stand: Stand, **more: Any) -> tuple[int, str]:
    async with stand.post(CHAT, **long_body(CHAT, **more)) as answer:
        return answer.status, await answer.text()


async def test_clients_that_leave_stop_both_halves() -> None:
    roles = (Role.PREFILL, Role.DECODE)
    hung, slow = replace(NIXL, prefill_tokens_per_s=1.0), replace(ANSWERS, step_s=60.0)
    async with opened(hung, slow, roles=roles) as stand:
        prefiller, answerer = stand.engines
        task = asyncio.create_task(ask(stand))
        await stand.until(lambda: prefiller.running)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
            await task
        await stand.until(lambda: prefiller.aborted and not stand.context.ledger.open)
        assert not answerer.received
        stand.assert_settled()
    async with opened(NIXL, slow, roles=roles) as stand:
        task = asyncio.create_task(ask(stand))
        await stand.until(lambda: stand.engines[1].running)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
            await task
        await stand.until(lambda: stand.engines[1].aborted and not stand.context.ledger.open)
        stand.assert_settled()


async def test_streams_that_break_go_on_by_way_of_prefill_engines() -> None:
    settings = [SHARED, *[replace(ANSWERS, event_tokens=(1, 2))] * 2]
    roles = (Role.PREFILL, Role.DECODE, Role.DECODE)
    async with opened(*settings, roles=roles, migration_limit=4) as stand:
        sent = long_body(COMPLETIONS, stream=True, temperature=0, max_tokens=40)
        for engine in stand.engines[1:]:
            engine.faults.append(Fault("reset", 7))
        async with stand.post(COMPLETIONS, **sent) as answer:
            said = await answer.text()
        whole = b"".join(fake_tokens.events(COMPLETIONS, {"model": "tiny", **sent}, "x", (1,)))
        assert text(said) == text(whole.decode())
        assert len(stand.engines[0].received) == 3
        stand.assert_settled()


def text(stream: str) -> str:
    events = [one.removeprefix("data: ") for one in stream.split("\n\n") if one]
    choices = [c for event in events[:-1] for c in json.loads(event)["choices"]]
    return "".join(choice["text"] for choice in choices)


def test_a_role_stands_in_the_url() -> None:
    assert parse_worker("p=http://h:1?role=prefill", "x").role is Role.PREFILL
    both = parse_worker("http://h:1?stats_port=2&role=decode", "x")
    assert (both.url, both.stats_port, both.role) == ("http://h:1", 2, Role.DECODE)
    assert parse_worker("http://h:1", "x").role is Role.BOTH
    for odd in ("role=", "role=Prefill", "role=decode&role=decode", "role=none"):
        with pytest.raises(ConfigError, match="worker_urls"):
            parse_worker(f"http://h:1?{odd}", "x")


async def test_prefill_engines_alone_make_no_router_ready() -> None:
    slow = replace(ANSWERS, step_s=60.0)
    async with opened(NIXL, slow, roles=(Role.PREFILL, Role.DECODE)) as stand:
        async with stand.get("/readiness") as answer:
            assert answer.status == 200
        async with stand.get("/workers") as answer:
            workers = (await answer.json())["workers"]
        assert [one["role"] for one in workers] == ["prefill", "decode"]
        # What goes past the policy goes to who answers, too, however busy that is.
        task = asyncio.create_task(ask(stand))
        await stand.until(lambda: stand.engines[1].running)
        found = stand.context.fleet.least_busy("tiny")
        assert found is not None
        assert found.name == "engine-1"
        await stand.engines[1].stop()
        await stand.until(lambda: not stand.context.fleet.engines["engine-1"].up)
        assert (await task)[0] >= 500
        async with stand.get("/readiness") as answer:
            assert answer.status == 503
        assert (await ask(stand))[0] == 503
        stand.assert_settled()


async def test_the_last_engine_that_answers_is_not_taken_out_for_errors() -> None:
    async with opened(roles=(Role.PREFILL, Role.DECODE), cb_failure_threshold=2) as stand:
        stand.engines[1].fault = Fault("status", status=500)
        for _ in range(4):
            assert (await ask(stand))[0] >= 500
        stand.engines[1].fault = None
        assert (await ask(stand))[0] == 200
        # A prefill engine is: the others do without.
        stand.engines[0].fault = Fault("status", status=500)
        for _ in range(4):
            assert (await ask(stand))[0] == 200
        assert stand.context.fleet.engines["engine-0"].why == "too many of its calls failed"
        stand.assert_settled()
