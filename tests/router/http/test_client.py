"""The router's own HTTP client: connections used again, answers of every framing, breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from yarl import URL

from hexgen_vllm.router.engines.probe import Probe, Unreachable
from hexgen_vllm.router.http import client
from hexgen_vllm.router.http.client import Pool, in_time
from hexgen_vllm.router.http.errors import CannotConnect, ConnectTimeout, EngineBroke
from hexgen_vllm.router.options import RouterOptions, Worker
from hexgen_vllm.testing.stand import Stand

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
Act = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def engine(act: Act) -> AsyncIterator[tuple[Pool, URL, list[int]]]:
    """Run a server that answers with ``act``; it is told how many requests there were before."""
    requests: list[int] = []  # the number of the connection of each request
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        number, connections = connections, connections + 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                requests.append(number)
                await act(writer, len(requests) - 1)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = Pool(1.0)
    try:
        yield pool, URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"), requests
    finally:
        pool.close()
        server.close()


def says(*pieces: bytes, close: bool = False) -> Act:
    async def act(writer: asyncio.StreamWriter, _: int) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return act


async def whole(pool: Pool, url: URL, most: int = 10**6) -> bytes | None:
    answer = await pool.send(url, HEAD, b"")
    try:
        return await answer.body(most)
    finally:
        answer.close()


async def test_calls_in_turn_use_one_connection() -> None:
    async with engine(says(PLAIN)) as (pool, url, requests):
        assert [await whole(pool, url) for _ in range(5)] == [b"abc"] * 5
        assert requests == [0] * 5
        assert pool.open == 1


async def test_calls_at_once_use_several() -> None:
    async with engine(says(PLAIN)) as (pool, url, requests):
        assert await asyncio.gather(*(whole(pool, url) for _ in range(5))) == [b"abc"] * 5
        assert set(requests) == set(range(5))


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_KEEPALIVE_S", 0.02)
    async with engine(says(PLAIN)) as (pool, url, _):
        await whole(pool, url)
        while pool.open:
            await asyncio.sleep(0.005)
        assert not pool._idle, "engines come and go, and addresses with them"
        assert await whole(pool, url) == b"abc"


@pytest.mark.parametrize(
    "pieces",
    [
        (PLAIN,),
        tuple(PLAIN[i : i + 1] for i in range(len(PLAIN))),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r",
            b"\nc\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n", PLAIN),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN,),
    ],
)
async def test_answers_of_every_framing_are_read(pieces: tuple[bytes, ...]) -> None:
    async with engine(says(*pieces)) as (pool, url, _):
        for _ in range(2):
            assert await whole(pool, url) == b"abc"


async def test_without_a_length_the_end_of_the_connection_is_the_end() -> None:
    async with engine(says(b"HTTP/1.1 200 OK\r\n\r\nab", b"c", close=True)) as (
        pool,
        url,
        requests,
    ):
        for _ in range(2):
            assert await whole(pool, url) == b"abc"
        assert requests == [0, 1]


@pytest.mark.parametrize("cut", [10, len(PLAIN) - 1])
async def test_an_answer_that_breaks_off_is_an_error(cut: int) -> None:
    async with engine(says(PLAIN[:cut], close=True)) as (pool, url, _):
        with pytest.raises(EngineBroke):
            await whole(pool, url)


async def test_what_is_not_http_is_an_error() -> None:
    async with engine(says(b"SSH-2.0-x\r\n")) as (pool, url, _):
        with pytest.raises(EngineBroke):
            await whole(pool, url)


@pytest.mark.parametrize("more", [b"x", PLAIN])
async def test_a_connection_that_says_more_than_asked_is_not_used_again(more: bytes) -> None:
    async with engine(says(PLAIN + more)) as (pool, url, requests):
        for _ in range(2):
            assert await whole(pool, url) == b"abc"
        assert requests == [0, 1]


async def test_an_idle_connection_that_was_just_closed_is_no_failure() -> None:
    async def act(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            writer.close()
        else:
            writer.write(PLAIN)

    async with engine(act) as (pool, url, requests):
        assert [await whole(pool, url) for _ in range(2)] == [b"abc"] * 2
        assert requests == [0, 0, 1]


async def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(CannotConnect):
        await whole(Pool(1.0), URL("http://127.0.0.1:1/"))


async def test_a_long_answer_stops_and_goes_on() -> None:
    body = bytes(range(256)) * 4096
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with engine(says(head + body)) as (pool, url, _):
        answer = await pool.send(url, HEAD, b"")
        assert await answer.body(1000) is None
        found: list[bytes] = []
        pouring = asyncio.ensure_future(answer.pour(found.append))
        await asyncio.sleep(0.02)
        assert not pouring.done(), "it is paused"
        answer.resume()
        await pouring
        assert b"".join(found) == body


async def test_an_error_of_the_reader_ends_the_answer() -> None:
    async with engine(says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", b"c")) as (
        pool,
        url,
        _,
    ):

        def fail(data: bytes) -> None:
            raise ZeroDivisionError

        answer = await pool.send(url, HEAD, b"")
        with pytest.raises(ZeroDivisionError):
            await answer.pour(fail)
        answer.close()
        while pool.open:
            await asyncio.sleep(0.005)


async def test_the_router_uses_its_connections_again(single: Stand) -> None:
    for _ in range(10):
        async with single.post(max_tokens=1) as answer:
            await answer.read()
    assert single.router.engine_connections == 1


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("size", [2**8, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        OK + b"X-A: bcd\r\n" * 1000,
        OK + b"X: " + b"x" * 100_000,
        OK + b"X: %b\r\n" % (b"x" * 1000) * 100 + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000,
        b"HTTP/1.1 200 " + b"x" * 100_000,
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"X-A: b\r\n" * 20_000,
        OK + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000,
    ],
    ids=["many", "one", "long ones", "announced", "reason", "trailers", "size of a chunk"],
)
async def test_what_an_engine_sends_besides_bodies_is_bounded(text: bytes, size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    async with engine(says(*pieces)) as (pool, url, _):
        with pytest.raises(EngineBroke):
            await whole(pool, url)
        while pool.open:
            await asyncio.sleep(0)


async def test_a_head_of_ordinary_length_may_come_in_any_pieces() -> None:
    text = OK + b"X-A: %b\r\n" % (b"x" * 100) * 100 + b"Content-Length: 3\r\n\r\nabc"
    for size in (1, 100, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        async with engine(says(*pieces)) as (pool, url, _):
            assert await whole(pool, url) == b"abc"


async def test_a_long_body_in_one_packet_with_its_head_is_no_long_head() -> None:
    body = b"x" * 300_000
    text = OK + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with engine(says(text)) as (pool, url, _):
        for _ in range(3):
            assert await whole(pool, url) == body


async def test_a_head_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it drips, and whatever announced it; nothing of a head may take for ever."""
    monkeypatch.setattr(client, "_HEAD_S", 0.05)

    async def drip(writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" + OK + b"X: ")
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.005)

    async with engine(drip) as (pool, url, _):
        with pytest.raises(EngineBroke):
            await whole(pool, url)


async def test_an_engine_may_announce_its_answer_and_think(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_HEAD_S", 0.02)

    async def think(writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.write(PLAIN)

    async with engine(think) as (pool, url, _):
        for _ in range(2):
            assert await whole(pool, url) == b"abc"


async def test_no_cancellation_is_lost_when_the_work_ends_in_the_same_turn() -> None:
    """As when a guard ends a try in the turn in which its connection is there."""
    work: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> int:
        return await work

    task = asyncio.ensure_future(in_time(wait(), 60.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    work.set_result(1)
    await asyncio.sleep(0)  # the work has ended, who waits has not heard of it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_large_body_is_sent_as_the_engine_takes_it() -> None:
    """The rest is neither copied nor lost, and a connection with unsent bytes is not kept."""
    body = bytes(range(256)) * 2**16
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
    reads, got = asyncio.Event(), bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reads.wait()
        got.extend(await reader.readexactly(len(body)))
        writer.write(PLAIN)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN)  # before the body is read
        await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url, pool = URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"), Pool(1.0)
    sending = asyncio.ensure_future(pool.send(url, head, body))
    while not pool.open:
        await asyncio.sleep(0.001)
    (connection,) = pool._open
    for _ in range(20):
        await asyncio.sleep(0.001)
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < len(body) // 8
    reads.set()
    assert await (await sending).body(10) == b"abc"
    assert got == body
    early = await pool.send(url, head, body)
    assert await early.body(10) == b"abc"
    assert not connection.usable(), "the rest of that body is still to be sent"
    pool.close()
    server.close()


async def test_a_page_is_asked_for_with_these_headers() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(PLAIN)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port, pool = server.sockets[0].getsockname()[1], Pool(1.0)
    url = URL(f"http://127.0.0.1:{port}/v1/models?a=%20", encoded=True)
    try:
        assert await pool.get(url, {"user-agent": "x"}, most=3, within_s=10) == (200, b"abc")
        assert pool.open == 1, "kept for the next one"
    finally:
        pool.close()
        server.close()
    host = f"127.0.0.1:{port}".encode()
    wanted = b"GET /v1/models?a=%20 HTTP/1.1\r\nhost: " + host + b"\r\nuser-agent: x\r\n\r\n"
    assert heads == [wanted]


@pytest.mark.parametrize("status", [200, 307])
async def test_a_page_that_is_too_long_counts_as_empty(status: int) -> None:
    said = b"HTTP/1.1 %d X\r\nLocation: /\r\nContent-Length: 4\r\n\r\nabc" % status
    async with engine(says(said)) as (pool, url, requests):
        assert await pool.get(url, {}, most=2, within_s=10) == (status, b"")
        await asyncio.sleep(0)
        assert pool.open == 0, "nobody waits for the rest of it"
        assert requests == [0], "a redirect is not followed"


async def test_a_page_must_be_there_in_time() -> None:
    async with engine(says(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc")) as (pool, url, _):
        with pytest.raises(asyncio.TimeoutError):
            await pool.get(url, {}, most=4, within_s=0.05)
        while pool.open:
            await asyncio.sleep(0)


async def test_an_address_that_takes_no_connection_may_only_be_busy() -> None:
    class Dropping(Pool):
        async def _make(self, address: Any) -> Any:
            await asyncio.sleep(60)

    pool = Dropping(0.01)
    with pytest.raises(ConnectTimeout):
        await pool.send(URL("http://127.0.0.1:9/"), HEAD, b"")
    with pytest.raises(Unreachable) as error:
        await Probe(pool, RouterOptions()).healthy(Worker("e", "http://127.0.0.1:9"))
    assert (error.value.silent, error.value.refused) == (True, False)
