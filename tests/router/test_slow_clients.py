"""Clients that do not read, or do not send: they harm themselves, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any, cast

import pytest

from hexgen_vllm.router.http.server import Connection
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.manual_clock import ManualClock
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from hexgen_vllm.types import EngineState
from tests.router.http.test_server import Wire, _connections, call, request

READY = EngineState.READY
HEAD = b"POST %b HTTP/1.1\r\nHost: a\r\n" % CHAT.encode()


def small_socket(stand: Stand) -> socket.socket:
    """Return a connection over which little fits."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", stand.router.port))
    client.setblocking(False)
    return client


async def narrow(stand: Stand) -> tuple[socket.socket, Connection]:
    """Return a connection over which little fits either way, and the router's end of it."""
    client = small_socket(stand)
    await stand.until(lambda: _connections(stand))
    (connection,) = cast(list[Connection], _connections(stand))
    server = cast(Any, connection.transport).get_extra_info("socket")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client, connection


def two() -> tuple[FakeSettings, FakeSettings]:
    return FakeSettings(), FakeSettings()


def unread(stand: Stand) -> list[Any]:
    return [one for one in stand.context.guard.attempts if one.client_is_slow()]


async def quiet(stand: Stand) -> None:
    """Wait until no buffer on the way to the clients takes any more."""
    before: list[int] = [-1]
    while before != (now := [one.progress for one in stand.context.guard.attempts]):
        before = now
        await asyncio.sleep(0.1)


async def test_streams_that_nobody_reads_take_no_engine_out() -> None:
    """Four clients start long streams and never read; all others are served as before."""
    clock = ManualClock()
    async with open_stand(*two(), clock=clock, engine_stall_secs=10.0) as stand:
        stuck = [small_socket(stand) for _ in range(4)]
        body = call(stand, stream=True, max_tokens=10**6, ignore_eos=True)
        for one in stuck:
            one.sendall(request(body))
        await stand.until(lambda: len(unread(stand)) == 4)
        await quiet(stand)
        for _ in range(40):
            clock.advance(10.0)
            stand.context.tick()
            assert [stand.state(i) for i in range(2)] == [READY, READY]
            async with stand.post(max_tokens=2) as answer:
                assert answer.status == 200
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 4}
        for engine in stand.context.fleet.engines.values():
            assert engine.breaker.failed(clock.now()) is False, "nothing was held against it"
        for one in stuck:
            one.close()
        stand.assert_settled()


async def test_a_stream_read_byte_by_byte_takes_no_engine_out() -> None:
    clock = ManualClock()
    async with open_stand(*two(), clock=clock, engine_stall_secs=10.0) as stand:
        client = small_socket(stand)
        client.sendall(request(call(stand, stream=True, max_tokens=10**6, ignore_eos=True)))
        await stand.until(lambda: unread(stand))
        await quiet(stand)
        for _ in range(40):
            clock.advance(10.0)
            if stand.context.ledger.open:
                client.recv(1)
            stand.context.tick()
            await asyncio.sleep(0)
            assert [stand.state(i) for i in range(2)] == [READY, READY]
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 1}
        client.close()


async def test_a_long_answer_that_is_no_stream_and_not_read_takes_no_engine_out() -> None:
    clock = ManualClock()
    async with open_stand(*two(), clock=clock, engine_stall_secs=10.0) as stand:
        client = small_socket(stand)
        client.sendall(request(call(stand, max_tokens=2 * 10**6, ignore_eos=True)))
        await stand.until(lambda: unread(stand))
        await quiet(stand)
        for _ in range(40):
            clock.advance(10.0)
            stand.context.tick()
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert [stand.state(i) for i in range(2)] == [READY, READY]
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 1}
        client.close()


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/no/such/page", "/ui/data"])
async def test_pages_that_nobody_reads_are_given_up(single: Stand, path: str) -> None:
    client, connection = await narrow(single)
    ask = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode()
    await asyncio.get_running_loop().sock_sendall(client, ask * 400)
    await single.until(lambda: connection.unsent and connection.task is None)
    await asyncio.sleep(0.05)
    assert connection.unsent < 2**20, "it does not grow with what is asked for"
    for _ in range(40):
        connection.sweep()
    await single.until(lambda: connection.transport is None)
    client.close()
    async with single.post(max_tokens=2) as answer:
        assert answer.status == 200


async def test_an_answer_read_too_slowly_is_given_up(single: Stand) -> None:
    """A byte now and then is not reading: what waits for it would stay for days."""
    client, connection = await narrow(single)
    client.sendall(request(call(single, max_tokens=50_000, ignore_eos=True)))
    await single.until(lambda: single.context.ledger.answered() == 1)
    assert connection.unsent > 10**5
    for _ in range(40):
        if connection.transport is None:
            break
        with contextlib.suppress(OSError):
            client.recv(64)
        await asyncio.sleep(0.002)
        connection.sweep()
    await single.until(lambda: connection.transport is None)
    client.close()


async def test_an_answer_read_slowly_but_steadily_is_read_to_its_end(single: Stand) -> None:
    client, connection = await narrow(single)
    client.sendall(request(call(single, max_tokens=20_000, ignore_eos=True), "Connection: close"))
    await single.until(lambda: single.context.ledger.answered() == 1)
    loop, found = asyncio.get_running_loop(), b""
    while piece := await loop.sock_recv(client, 2**17):
        found += piece
        connection.sweep()
    _, _, body = found.partition(b"\r\n\r\n")
    assert json.loads(body)["usage"]["completion_tokens"] == 20_000
    client.close()


async def test_a_body_that_comes_too_slowly_is_refused(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=2)
    wire.writer.write(request(body)[: -len(body)])
    await single.until(lambda: single.context.ledger.open == 1)
    (connection,) = cast(list[Connection], _connections(single))
    for i in range(8):  # 40 seconds, a byte in five each
        wire.writer.write(body[i : i + 1])
        await single.until(lambda i=i: connection._reading is None or connection._reading.size > i)
        connection.sweep()
    status, headers, answer = await wire.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(answer)["error"]["code"] == "body_timeout"
    assert await wire.reader.read() == b""
    single.assert_settled()


async def test_a_body_at_a_modest_rate_is_taken(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=2, user="x" * 60_000)
    wire.writer.write(request(body)[: -len(body)])
    await single.until(lambda: single.context.ledger.open == 1)
    (connection,) = cast(list[Connection], _connections(single))
    for i in range(0, len(body), 3000):  # 600 bytes per second
        wire.writer.write(body[i : i + 3000])
        await asyncio.sleep(0.005)
        connection.sweep()
    assert (await wire.answer())[0] == 200


async def test_the_bytes_of_bodies_are_bounded() -> None:
    """Beyond the bound calls are refused with a hint; what ends makes room."""
    async with open_stand(max_buffered_bytes=100_000) as stand:
        part = b"x" * 60_000
        slow = await Wire.to(stand)
        slow.writer.write(HEAD + b"Content-Length: 70000\r\n\r\n" + part)
        server = cast(Any, stand.router._runner).server
        await stand.until(lambda: server.buffered.size >= len(part))
        other = await Wire.to(stand)
        other.writer.write(request(part))
        status, headers, body = await other.answer()
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "rejected-saturated"
        slow.writer.close()
        other.writer.close()
        await stand.until(lambda: not _connections(stand))
        assert server.buffered.size == 0
        async with stand.post(max_tokens=2, user="x" * 60_000) as answer:
            assert answer.status == 200
        assert server.buffered.size == 0
        stand.assert_settled()


@pytest.mark.parametrize("after", [0, 1, 20])
async def test_a_half_closed_connection_ends_its_call(single: Stand, after: int) -> None:
    """As uvicorn has it; and no engine is blamed."""
    wire = await Wire.to(single)
    wire.writer.write(request(call(single, stream=True, max_tokens=10**6, ignore_eos=True)))
    for _ in range(after):
        await wire.reader.read(100)
    await single.until(single.received)
    wire.writer.write_eof()
    await single.until(lambda: single.context.ledger.open == 0)
    assert single.context.ledger.failed() == {"rejected-context-cancelled": 1}
    assert single.state(0) is READY
    single.assert_settled()
