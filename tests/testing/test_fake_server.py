"""The fake engine: forced lengths, the forms of vLLM's answers, every fault, and what it notes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": 5}


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_lengths_are_honoured(server: FakeServer, client: aiohttp.ClientSession) -> None:
    for wanted, expected in (
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 50}, 8),
        ({"max_tokens": 50, "min_tokens": 50}, 50),
        ({"max_tokens": 50, "ignore_eos": True}, 50),
        ({"max_tokens": 50, "min_tokens": 20}, 20),
    ):
        async with client.post(server.url + CHAT, json={**BODY, **wanted}) as answer:
            content = await answer.json()
        assert content["usage"]["completion_tokens"] == expected
        text = content["choices"][0]["message"]["content"]
        assert text.split() == [f"t{i}" for i in range(expected)]


@pytest.mark.parametrize(
    ("path", "events"),
    [(CHAT, 8), ("/v1/completions", 7), ("/v1/responses", 7), ("/v1/messages", 8)],
)
async def test_streams_hold_one_event_a_token(
    server: FakeServer, client: aiohttp.ClientSession, path: str, events: int
) -> None:
    options = {"stream": True, "prompt": "p", "stream_options": {"include_usage": True}}
    async with client.post(server.url + path, json={**BODY, **options}) as answer:
        text = await answer.text()
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert len(blocks) == events
    for i in range(5):
        assert sum(f" t{i}" in b for b in blocks[:-1]) == 1


async def test_tokens_of_a_prompt_are_counted(
    server: FakeServer, client: aiohttp.ClientSession
) -> None:
    body = {"model": "tiny", "prompt": list(range(77)), "max_tokens": 1}
    async with client.post(server.url + "/v1/completions", json=body) as answer:
        assert (await answer.json())["usage"]["prompt_tokens"] == 77


@pytest.mark.parametrize("kind", ["reset", "close"])
@pytest.mark.parametrize("after", [None, 0, 2])
async def test_broken_connections_show_as_errors(
    server: FakeServer, client: aiohttp.ClientSession, kind: str, after: int | None
) -> None:
    server.faults.append(Fault(kind, after))  # type: ignore[arg-type]
    with pytest.raises(aiohttp.ClientError):
        async with client.post(server.url + CHAT, json={**BODY, "stream": True}) as answer:
            await answer.read()
    async with client.post(server.url + CHAT, json=BODY) as answer:
        assert answer.status == 200, "a fault in the queue is for one request"


@pytest.mark.parametrize("after", [None, 0, 2])
async def test_garbage_is_not_http(server: FakeServer, after: int | None) -> None:
    server.faults.append(Fault("garbage", after))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({**BODY, "stream": True}).encode()
    writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\n" % CHAT.encode())
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    answer = await reader.read()
    assert answer.count(b"data:") == (after or 0)
    assert answer.endswith(b"\x00\xffno chunk, no header\r\n\r\n")
    writer.close()


async def test_cut_streams_look_complete(server: FakeServer, client: aiohttp.ClientSession) -> None:
    server.faults.append(Fault("cut", 2))
    async with client.post(server.url + CHAT, json={**BODY, "stream": True}) as answer:
        text = await answer.text()
    assert "[DONE]" not in text
    assert text.count("data:") == 2


async def test_a_status_fault_answers_with_it(
    server: FakeServer, client: aiohttp.ClientSession
) -> None:
    server.fault = Fault("status", status=429, headers=(("Retry-After", "7"),))
    for _ in range(2):
        async with client.post(server.url + CHAT, json=BODY) as answer:
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "7"
            assert (await answer.json())["error"]["code"] == 429


async def test_a_hanging_request_ends_when_its_client_leaves(
    server: FakeServer, client: aiohttp.ClientSession
) -> None:
    server.fault = Fault("hang", 1)
    answer = await client.post(server.url + CHAT, json={**BODY, "stream": True})
    assert (await answer.content.readany()).startswith(b"data:")
    assert server.running == 1
    answer.close()
    while server.running:
        await asyncio.sleep(0.001)
    assert server.aborted == 1


async def test_dripped_bytes_are_the_same_bytes(
    server: FakeServer, client: aiohttp.ClientSession
) -> None:
    texts = []
    for fault in (None, Fault("drip")):
        server.fault = fault
        async with client.post(server.url + CHAT, json={**BODY, "stream": True}) as answer:
            texts.append(await answer.text())
    assert texts[0] == texts[1]


async def test_it_dies_and_comes_back_on_its_port(client: aiohttp.ClientSession) -> None:
    server = FakeServer()
    await server.start()
    url = server.url
    await server.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.get(url + "/health")
    await server.start()
    assert server.url == url
    async with client.get(url + "/health") as answer:
        assert answer.status == 200
    await server.stop()


async def test_it_notes_what_it_received_and_waits_for_slots(
    client: aiohttp.ClientSession,
) -> None:
    async with FakeServer(FakeSettings(slots=1, stats={"running": 0})) as server:
        server.fault = Fault("hang", 0)
        first = asyncio.ensure_future(client.post(server.url + CHAT, json=BODY))
        second = asyncio.ensure_future(client.post(server.url + CHAT, json=BODY))
        while server.waiting == 0:
            await asyncio.sleep(0.001)
        assert (server.running, server.waiting) == (1, 1)
        assert json.loads(server.received[0].body) == BODY
        async with client.get(server.url + "/hexgen/stats") as answer:
            assert await answer.json() == {"running": 0}
        for task in (first, second):
            task.cancel()


def test_a_manual_clock_moves_forward_only() -> None:
    clock = ManualClock(5.0)
    assert clock.now() == 5.0
    assert clock.advance(2.5) == clock.now() == 7.5
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1.0)
