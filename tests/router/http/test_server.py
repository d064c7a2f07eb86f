"""The router's own HTTP server: what clients may send in which pieces, and what they get."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib

import pytest
from aiohttp import web

from hexgen_vllm.router.http import messages
from hexgen_vllm.testing.fake_server import Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand


class Wire:
    """A raw connection to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, stand: Stand) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", stand.router.port))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers, body


def request(
    body: bytes, *lines: str, path: str = CHAT, version: str = "1.1", method: str = "POST"
) -> bytes:
    more = "".join(f"{line}\r\n" for line in (*lines, f"Content-Length: {len(body)}"))
    return f"{method} {path} HTTP/{version}\r\nHost: a\r\n{more}\r\n".encode() + body


def call(stand: Stand, **more: object) -> bytes:
    return json.dumps(stand.body(**more)).encode()


async def test_requests_may_come_in_any_pieces(single: Stand) -> None:
    wire = await Wire.to(single)
    for size in (1, 7, 64):
        whole = request(call(single, max_tokens=2), "X-Request-ID: r")
        for i in range(0, len(whole), size):
            wire.writer.write(whole[i : i + size])
            await asyncio.sleep(0)
        status, headers, _ = await wire.answer()
        assert (status, headers["x-request-id"]) == (200, "r")
    assert {one.body for one in single.received()} == {call(single, max_tokens=2)}


async def test_requests_may_come_all_at_once(single: Stand) -> None:
    """Answers come in the order of the requests, streams and pages among them."""
    wire = await Wire.to(single)
    stream = request(call(single, max_tokens=3, stream=True), "X-Request-ID: b")
    page = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    wire.writer.write(
        request(call(single, max_tokens=2), "X-Request-ID: a") + stream + page + stream
    )
    found = [await wire.answer() for _ in range(4)]
    assert [status for status, _, _ in found] == [200] * 4
    ids = [headers["x-request-id"] for _, headers, _ in found]
    assert (ids[0], ids[1], ids[3]) == ("a", "b", "b")
    assert found[1][2] == found[3][2]
    assert found[1][2].endswith(b"data: [DONE]\n\n")
    single.assert_settled()


async def test_what_follows_a_request_and_is_no_http_is_refused_after_it(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(request(call(single)) + b"\x00\x01 nonsense\r\n\r\n")
    assert (await wire.answer())[0] == 200
    status, headers, body = await wire.answer()
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert await wire.reader.read() == b""


async def test_a_client_that_sends_ahead_without_end_is_cut_off(single: Stand) -> None:
    single.engines[0].faults.append(Fault("hang"))
    wire = await Wire.to(single)
    wire.writer.write(request(call(single)))
    await single.until(single.received)
    wire.writer.write(b"x" * 2**24)
    with pytest.raises(ConnectionError):
        await wire.reader.read()
    await single.until(lambda: single.context.ledger.open == 0)


def _connections(stand: Stand) -> list[object]:
    runner = stand.router._runner
    assert runner is not None
    return list(runner.server.open)  # type: ignore[union-attr]


async def test_old_clients_get_an_answer_that_ends_with_the_connection(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(request(call(single, max_tokens=3, stream=True), version="1.0"))
    head, _, body = (await wire.reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.endswith(b"data: [DONE]\n\n")
    wire = await Wire.to(single)
    wire.writer.write(request(call(single), "Connection: keep-alive", version="1.0") * 2)
    for _ in range(2):
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "keep-alive")


async def test_a_connection_closes_when_the_client_says_so(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(request(call(single), "Connection: close"))
    assert (await wire.answer())[1]["connection"] == "close"
    assert await wire.reader.read() == b""


async def test_head_requests_have_no_body(single: Stand) -> None:
    wire = await Wire.to(single)
    wire.writer.write(b"HEAD /version HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
    for _ in range(2):
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: " in head.lower()
    wire.writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
    assert json.loads((await wire.answer())[2])["router"] == "hexgen-vllm"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
async def test_compressed_bodies_are_read(single: Stand, encoding: str) -> None:
    body = call(single, max_tokens=2)
    packed = {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "raw deflate": zlib.compress(body, wbits=-15),
    }[encoding]
    wire = await Wire.to(single)
    wire.writer.write(request(packed, f"Content-Encoding: {encoding.removeprefix('raw ')}"))
    assert (await wire.answer())[0] == 200
    assert single.received()[0].body == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_bodies_that_are_not_compressed_as_they_say_are_refused(
    single: Stand, encoding: str
) -> None:
    wire = await Wire.to(single)
    wire.writer.write(request(call(single), f"Content-Encoding: {encoding}"))
    status, _, body = await wire.answer()
    assert (status, json.loads(body)["error"]["code"]) == (400, "bad_body")


async def test_a_small_body_that_is_large_in_the_clear_is_refused() -> None:
    async with open_stand(max_payload_size=10_000) as stand:
        wire = await Wire.to(stand)
        wire.writer.write(request(gzip.compress(b" " * 10**7), "Content-Encoding: gzip"))
        assert (await wire.answer())[0] == 413


async def test_a_compressed_body_has_a_bound_of_its_own() -> None:
    async def clear(raw: bytes, encoding: str = "gzip") -> int:
        return len(await messages.in_the_clear([raw], len(raw), encoding, 10**9))

    text = random.Random(1).randbytes(2**14).hex().encode()
    much = text * (messages.MOST_INFLATED // len(text))
    assert await clear(gzip.compress(much, 1)) == len(much)
    assert await clear(gzip.compress(b"x" * 2**20)) == 2**20, "a little may be very compressible"
    assert await clear(much + text, "identity") == len(much + text)
    for bad in (gzip.compress(much + text, 1), gzip.compress(b"x" * 2**24)):
        with pytest.raises(web.HTTPRequestEntityTooLarge):
            await clear(bad)


async def test_a_body_that_is_too_long_is_refused_before_its_end() -> None:
    async with open_stand(max_payload_size=10_000) as stand:
        wire = await Wire.to(stand)
        wire.writer.write(request(b"x" * 20_000)[:-1])
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
        assert await wire.reader.read() == b"", "the rest is not waited for"


async def test_long_heads_are_refused(single: Stand) -> None:
    for lines in ([f"X-{i}: {'x' * 8000}" for i in range(40)], ["X: " + "x" * 9000]):
        wire = await Wire.to(single)
        wire.writer.write(request(call(single), *lines))
        assert (await wire.answer())[0] in (400, 431)


async def test_silent_connections_are_closed(single: Stand) -> None:
    idle, slow, half = [await Wire.to(single) for _ in range(3)]
    slow.writer.write(b"POST /v1/chat/compl")
    half.writer.write(request(call(single))[:-1])
    await single.until(lambda: single.context.ledger.open == 1)
    await asyncio.sleep(0.02)
    for _ in range(17):
        for connection in _connections(single):
            connection.sweep()  # type: ignore[attr-defined]
    assert await idle.reader.read() == b""
    assert (await slow.answer())[0] == 408
    status, _, body = await half.answer()
    assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")
    single.assert_settled()


async def test_an_upgrade_is_not_made(single: Stand) -> None:
    wire = await Wire.to(single)
    body = call(single, max_tokens=1)
    for _ in range(2):
        wire.writer.write(request(body, "Connection: Upgrade", "Upgrade: h2c"))
        assert (await wire.answer())[0] == 200
    assert "Upgrade" not in single.received()[0].headers
