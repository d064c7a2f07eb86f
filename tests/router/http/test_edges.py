"""Corners of HTTP/1.1: who misuses the connection to the router, or from it, gains nothing."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hexgen_vllm.router.calls import headers as outbound
from hexgen_vllm.router.http.client import Answer
from hexgen_vllm.router.http.errors import EngineBroke
from hexgen_vllm.router.http.messages import Buffered
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.router.http.server import Connection
from hexgen_vllm.testing.fake_server import Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from tests.router.http.test_client import HEAD, PLAIN, engine, says, whole
from tests.router.http.test_server import Wire, _connections, call, request

PAGE = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
START = b"POST %b HTTP/1.1\r\nHost: a\r\n" % CHAT.encode()


def only(stand: Stand) -> Connection:
    (found,) = _connections(stand)
    return cast(Connection, found)


def chunked(body: bytes, trailers: bytes = b"", lines: bytes = b"") -> bytes:
    head = START + lines + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length:\r\n 4\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"X: a\nTransfer-Encoding: chunked\r\n",
        b"X: a\r\n b\r\n",
        b"X: a\0b\r\n",
        b"Connection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity,chunked\r\n",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        b"Content-Encoding: identity\r\nContent-Length: 5\r\nContent-Encoding: gzip\r\n",
        b"Content-Length: 0\r\nHost: b\r\n",
        b"Content-Length: 0\r\nhost: a\r\n",
    ],
)
async def test_a_request_whose_end_is_doubtful_ends_the_connection(
    single: Stand, lines: bytes
) -> None:
    wire = await Wire.to(single)
    wire.writer.write(START + lines + b"\r\n0\r\n\r\n" + PAGE)
    assert (await wire.answer())[0] == 400
    assert await wire.reader.read() == b"", "what follows is not read as a request"
    assert not single.received()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Authorization", "Bearer a", "Bearer b"),
        ("X-API-Key", "a", "b"),
        ("X-Session-ID", "", "s"),
        ("X-Vllm-Priority", "0", "-9"),
    ],
)
async def test_a_header_that_engines_heed_comes_once(
    single: Stand, name: str, first: str, second: str
) -> None:
    for other in (name, name.lower()):
        wire = await Wire.to(single)
        lines = (f"{name}: {first}", "X-Other: x", "X-Other: x", f"{other}: {second}")
        wire.writer.write(request(call(single, max_tokens=1), *lines))
        status, _, body = await wire.answer()
        assert status == 400
        assert name.lower() in body.decode()
        assert await wire.reader.read() == b""
    assert not single.received()


async def test_an_old_request_in_chunks_is_refused(single: Stand) -> None:
    wire = await Wire.to(single)
    body = chunked(call(single), lines=b"Connection: keep-alive\r\n")
    wire.writer.write(body.replace(b"HTTP/1.1", b"HTTP/1.0") + PAGE)
    assert (await wire.answer())[0] == 400
    assert await wire.reader.read() == b""


async def test_what_follows_a_body_is_not_taken_for_headers(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=1)
    for _ in range(2):
        wire.writer.write(chunked(body, b"X-Vllm-Priority: -5\r\nX-Request-ID: r\r\n"))
        status, headers, _ = await wire.answer()
        assert (status, headers["x-request-id"] == "r") == (200, False)
    for one in single.received():
        assert "X-Vllm-Priority" not in one.headers
        assert one.body == body


@pytest.mark.parametrize("rest", [b"0\r\nX: " + b"x" * 2**20, b"0\r\n" + b"X: y\r\n" * 10**5])
async def test_endless_trailers_are_cut_off(single: Stand, rest: bytes) -> None:
    wire = await Wire.to(single)
    wire.writer.write(START + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
    assert (await wire.answer())[0] == 400
    assert await wire.reader.read() == b""


async def test_many_headers_are_refused(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(b"GET /version HTTP/1.1\r\n" + b"a: b\r\n" * 2000 + b"\r\n")
    assert (await wire.answer())[0] in (400, 431)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(
    "head",
    [
        b"GET /version HTTP/1.1\r\n" + b"X: %b\r\n" % (b"x" * 1000) * 100,
        b"GET /version HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n",
        b"GET /version HTTP/1.1\r\n" + b"a: b\r\n" * 2000,
        b"GET /version?" + b"x" * 70_000 + b" HTTP/1.1\r\n",
    ],
    ids=["many", "one", "small ones", "target"],
)
async def test_long_heads_are_refused_alike_in_any_packets(
    single: Stand, head: bytes, pieces: int
) -> None:
    """What is too long does not depend on how it comes, and the client sees the answer."""
    wire = await Wire.to(single)
    whole = head + b"\r\n" + PAGE
    size = len(whole) // pieces + 1
    for i in range(0, len(whole), size):
        wire.writer.write(whole[i : i + size])
        if pieces > 1:
            await asyncio.sleep(0)
    status, headers, _ = await wire.answer()
    assert (status, headers["connection"]) == (431, "close")
    assert await wire.reader.read() == b"", "what follows is not read as a request"


@pytest.mark.parametrize(
    "start",
    [
        b"\x00\x01 no HTTP\r\n\r\n",
        b"GET /version HTTP/1.1\r\nX: " + b"x" * 70_000,
        START + b"Content-Length: 100000000\r\n\r\n",
        PAGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    ],
    ids=["400", "431", "413", "200"],
)
async def test_who_is_refused_sees_the_answer_while_it_still_sends(
    single: Stand, start: bytes
) -> None:
    """To close a connection with unread data would reset it, and take the answer along."""
    loop = asyncio.get_running_loop()
    client = socket.create_connection(("127.0.0.1", single.router.port))
    client.setblocking(False)
    await loop.sock_sendall(client, start)
    for _ in range(50):
        await loop.sock_sendall(client, b"x" * 2**15)
        await asyncio.sleep(0.001)
    found = b""
    while piece := await loop.sock_recv(client, 2**16):
        found += piece
    assert found.startswith(b"HTTP/1.1 ")
    client.close()
    await single.until(lambda: not _connections(single))


async def test_who_is_refused_cannot_send_for_ever(single: Stand) -> None:
    wire = await Wire.to(single)

    async def send() -> None:
        while True:
            wire.writer.write(b"\0" * 2**16)
            await wire.writer.drain()

    with pytest.raises(ConnectionError):
        await send()


async def version(stand: Stand, target: bytes, host: bytes = b"a") -> tuple[int, str]:
    wire = await Wire.to(stand)
    wire.writer.write(PAGE.replace(b"/version", target).replace(b": a", b": " + host))
    status, headers, _ = await wire.answer()
    wire.writer.close()
    return status, headers.get("location", "")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://a:1/version", 200),
        (b"HTTP://a/version?x=1", 200),
        (b"https://u:p@a/version", 200),
        (b"/version#part", 200),
        (b"/%76ersion", 200),
        (b"http://a", 400),
        (b"http://a?x", 400),
        (b"version", 400),
        (b"http:///version", 400),
        (b"http://a/nothing", 404),
        (b"//version", 404),
    ],
)
async def test_targets_are_read_as_uvicorn_does(single: Stand, target: bytes, status: int) -> None:
    assert (await version(single, target))[0] == status


async def test_an_absolute_target_goes_on_as_a_path(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=2)
    wire.writer.write(request(body, path=f"http://elsewhere:99{CHAT}?x=%20y#z"))
    assert (await wire.answer())[0] == 200
    (received,) = single.received()
    assert received.path == f"{CHAT}?x=%20y"
    assert received.headers["Host"] == f"127.0.0.1:{single.engines[0].port}"


async def test_a_slash_at_the_end_leads_on_with_escapes_and_query(single: Stand) -> None:
    for target in (b"/version/?a=%2F", b"/%76ersion/?a=%2F", b"http://a/version/?a=%2F"):
        assert await version(single, target) == (307, "/version?a=%2F")


async def deaf(stand: Stand, asks: int) -> tuple[Wire, asyncio.ReadTransport]:
    """Ask for ``asks`` pages over small buffers, and do not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", stand.router.port))
    wire = Wire(*await asyncio.open_connection(sock=client))
    transport = cast(asyncio.ReadTransport, cast(Any, wire.reader)._transport)
    transport.pause_reading()
    await stand.until(lambda: _connections(stand))
    server = cast(Any, only(stand).transport).get_extra_info("socket")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wire.writer.write(PAGE.replace(b"/version", b"/metrics") * asks)
    await stand.until(lambda: only(stand)._full and only(stand).task is None)
    return wire, transport


async def test_a_client_that_asks_but_does_not_read_waits(single: Stand) -> None:
    """What is buffered for it does not grow with what it asks for."""
    wire, transport = await deaf(single, 200)
    await asyncio.sleep(0.02)
    kept = cast(asyncio.Transport, only(single).transport)
    assert kept.get_write_buffer_size() < 2**18
    assert only(single)._ready
    transport.resume_reading()
    for _ in range(200):
        assert (await wire.answer())[0] == 200


async def test_a_client_that_never_reads_its_answer_is_cut_off(single: Stand) -> None:
    wire, _ = await deaf(single, 200)
    connection = only(single)
    for _ in range(20):
        connection.sweep()
    await single.until(lambda: connection.transport is None)
    wire.writer.close()


async def test_requests_ahead_are_bounded(single: Stand) -> None:
    single.engines[0].faults.append(Fault("hang"))
    wire = await Wire.to(single)
    wire.writer.write(request(call(single)) + b"GET / HTTP/1.1\r\n\r\n" * 5000)
    await single.until(single.received)
    assert len(only(single)._ready) <= 512


async def test_many_upgrades_ahead_are_all_answered(single: Stand) -> None:
    wire = await Wire.to(single)
    asks = PAGE.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
    wire.writer.write(asks * 500)
    for _ in range(500):
        assert (await wire.answer())[0] == 200


async def test_a_request_after_a_long_silence_may_come_in_pieces(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(PAGE)
    await wire.answer()
    connection = only(single)
    for _ in range(12):
        connection.sweep()
    wire.writer.write(PAGE[:20])
    await single.until(lambda: connection._head_bytes)
    connection.sweep()
    wire.writer.write(PAGE[20:])
    assert (await wire.answer())[0] == 200


async def test_a_request_behind_a_long_one_is_not_late(single: Stand) -> None:
    single.engines[0].faults.append(Fault("hang"))
    wire = await Wire.to(single)
    body = call(single)
    wire.writer.write(request(body) + request(body)[:-1])
    await single.until(single.received)
    connection = only(single)
    for _ in range(20):
        connection.sweep()
    assert connection._refusal is None


async def test_the_word_to_go_on_comes_after_the_answer_before(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=1)
    asks = request(body, "Expect: 100-continue")
    wire.writer.write(request(body) + asks[: -len(body)])
    assert (await wire.answer())[0] == 200
    assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.writer.write(body)
    assert (await wire.answer())[0] == 200


async def test_a_body_that_is_announced_too_long_is_not_asked_for() -> None:
    async with open_stand(max_payload_size=1000) as stand:
        wire = await Wire.to(stand)
        wire.writer.write(START + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
        assert (await wire.answer())[0] == 413


async def test_a_client_that_leaves_with_more_asked_for_ends_its_call(single: Stand) -> None:
    single.engines[0].faults.append(Fault("hang"))
    wire = await Wire.to(single)
    wire.writer.write(request(call(single)) + PAGE * 10)
    await single.until(single.received)
    wire.writer.close()
    await single.until(lambda: single.context.ledger.open == 0)
    await single.until(lambda: not _connections(single))
    single.assert_settled()


def test_small_pieces_of_a_body_take_no_object_each() -> None:
    server = cast(Any, SimpleNamespace(max_body_bytes=10**6, mark=None, buffered=Buffered(10**9)))
    read = Request(
        Connection(server, cast(Any, None)), "POST", "/", [], persists=True, can_chunk=True
    )
    for i in range(5000):
        read.feed(b"%04d" % i)
    assert len(read._pieces) <= 2
    assert b"".join(read._pieces) == b"".join(b"%04d" % i for i in range(5000))


# Towards engines


async def test_only_a_connection_that_was_idle_is_tried_again() -> None:
    async with engine(says(close=True)) as (pool, url, requests):
        with pytest.raises(EngineBroke):
            await whole(pool, url)
        assert requests == [0]


async def test_what_was_answered_in_part_is_not_sent_again() -> None:
    async def act(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(PLAIN[:10] if number else PLAIN)
        if number:
            writer.close()

    async with engine(act) as (pool, url, requests):
        await whole(pool, url)
        with pytest.raises(EngineBroke):
            await whole(pool, url)
        assert requests == [0, 0]


async def test_an_engines_trailers_are_not_taken_for_headers() -> None:
    text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n"
    async with engine(says(text)) as (pool, url, _):
        answer = await pool.send(url, HEAD, b"")
        assert await answer.body(10) == b"a"
        assert answer.header(b"x") == ""


async def test_an_early_answer_ends_the_connection() -> None:
    """The rest of the request may still be on its way."""
    done = asyncio.Event()

    async def act(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(PLAIN)
        if not number:
            await done.wait()  # and read nothing meanwhile

    async with engine(act) as (pool, url, requests):
        answer = await pool.send(url, HEAD, b"x" * 2**25)
        assert await answer.body(10) == b"abc"
        try:  # the answer to one that is sent after the unread rest never comes
            await asyncio.wait_for(whole(pool, url), 30)
        finally:
            done.set()
        assert requests == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    ],
)
async def test_a_doubtful_answer_is_an_error(text: bytes) -> None:
    async with engine(says(text)) as (pool, url, _):
        with pytest.raises(EngineBroke):
            await whole(pool, url)


async def test_an_error_at_the_end_of_an_answer_is_not_lost() -> None:
    answer = Answer(cast(Any, SimpleNamespace(abandon=lambda: None)))
    answer.broke(ZeroDivisionError())
    answer.ended()
    with pytest.raises(ZeroDivisionError):
        await answer.pour(lambda _: None)


def test_named_headers_are_dropped_wherever_they_stand() -> None:
    pairs = [(b"X-One", b"1"), (b"Two", b"2"), (b"Connection", b"x-one"), (b"cONNECTION", b"two")]
    head = b"".join(outbound.answer_head(pairs, "e", "r")).lower()
    assert b"x-one" not in head
    assert b"two" not in head
    many = [(bytes(name), b"x-one") for name in _casings(b"connection")]
    assert outbound._kept_lines([*many, *pairs[:2]], {}) == ([b"Two: 2\r\n"], {"two"})


def _casings(word: bytes) -> list[bytes]:
    found = [b""]
    for letter in (word[i : i + 1] for i in range(len(word))):
        found = [one + form for one in found for form in (letter, letter.upper())]
    return found


def test_which_pages_may_read_is_not_for_engines_to_say() -> None:
    pairs = [(b"access-control-allow-origin", b"*"), (b"Content-Type", b"x")]
    assert not any(b"access-control" in line for line in outbound.answer_head(pairs, "e", "r"))
