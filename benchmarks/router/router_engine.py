"""A fake engine that costs next to nothing, for the measurement of what stands before it.

Every answer is made in advance; every event goes out as an HTTP chunk of its own. Events follow
a clock that all streams share, as those of an engine follow its steps, or the reader's pace.
"""

from __future__ import annotations

import asyncio
import json
import re
from functools import cache
from typing import Final

MODEL: Final = "tiny"
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.I)
_TOKENS: Final = re.compile(rb'"max_tokens": ?(\d+)')
_SEED: Final = re.compile(rb'"seed": ?(\d+)')
_STREAM: Final = re.compile(rb'"stream": ?true')
_MOST_STEPS: Final = 1000
_DONE: Final = b"data: [DONE]\n\n"
_SSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
# Room for every stream of every measurement: what is measured is the way, not the queue.
_STATS: Final = {
    "max_num_seqs": 4096,
    "kv_tokens": 10**8,
    "running": 0,
    "waiting": 0,
    "kv_usage": 0.0,
    "cost": {"c0": 0.01, "c1": 1e-6, "c2": 1e-9, "p0": 1e-3, "p1": 1e-6, "p2": 1e-10},
}


@cache
def events(tokens: int) -> tuple[bytes, ...]:
    """Return the events of an answer of ``tokens`` tokens; the last one is ``[DONE]``."""
    found = []
    for i in range(tokens):
        choice = {"index": 0, "delta": {"content": f" t{i}"}, "logprobs": None}
        event = {
            "id": "chatcmpl-8d1c2f6be0a94c6e",
            "object": "chat.completion.chunk",
            "created": 1704067200,
            "model": MODEL,
            "choices": [{**choice, "finish_reason": "length" if i == tokens - 1 else None}],
        }
        found.append(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
    return (*found, _DONE)


@cache
def _chunks(tokens: int) -> tuple[bytes, ...]:
    framed = [b"%x\r\n%b\r\n" % (len(event), event) for event in events(tokens)]
    return (*framed[:-1], framed[-1] + b"0\r\n\r\n")


@cache
def body(tokens: int) -> bytes:
    """Return the answer to a call that does not stream."""
    text = "".join(f" t{i}" for i in range(tokens))
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 150, "total_tokens": 150 + tokens, "completion_tokens": tokens}
    answer = {
        "id": "chatcmpl-8d1c2f6be0a94c6e",
        "object": "chat.completion",
        "created": 1704067200,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": usage,
    }
    return json.dumps(answer).encode()


@cache
def _whole(tokens: int) -> bytes:
    return _framed(body(tokens))


def _framed(content: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 %b\r\nserver: uvicorn\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (status, kind, len(content)) + content


@cache
def _pages() -> dict[bytes, bytes]:
    card = {"id": MODEL, "object": "model", "max_model_len": 32768}
    return {
        b"/v1/models": _framed(json.dumps({"object": "list", "data": [card]}).encode()),
        b"/health": _framed(b""),
        b"/metrics": _framed(b"vllm:num_requests_running 0.0\n", kind=b"text/plain"),
    }


class FastEngine:
    """A server on ``127.0.0.1:port``.

    Attributes:
        port: where it listens, once started.
        step_s: seconds between two events of a stream; 0 leaves the pace to :meth:`Stream.send`.
        streams: open streams by the ``seed`` of their request.
    """

    def __init__(self, step_s: float = 0.01) -> None:
        self.port = 0
        self.step_s = step_s
        self.streams: dict[int, Stream] = {}
        self.steps = 0  # a count that stands still would tell of an engine that does
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after :meth:`stop`, on the same port as before."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=4096, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Abort every connection and refuse new ones."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        self.streams.clear()

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time()
        while True:
            at = max(at + (self.step_s or 0.01), loop.time())
            await asyncio.sleep(at - loop.time())
            if self.step_s:
                self.steps += 1
                for stream in list(self.streams.values()):
                    stream.send(stream.per_step)


class Stream:
    """One answer under way.

    Attributes:
        per_step: events that follow a step: 1, but more in answers of thousands of tokens.
    """

    __slots__ = ("_at", "_chunks", "_engine", "_seed", "_transport", "per_step")

    def __init__(
        self, engine: FastEngine, seed: int, tokens: int, transport: asyncio.Transport
    ) -> None:
        self._engine, self._seed, self._transport = engine, seed, transport
        self._chunks, self._at = _chunks(tokens), 1
        self.per_step = max(tokens // _MOST_STEPS, 1)
        transport.write(_SSE_HEAD + self._chunks[0])

    def send(self, count: int = 1) -> None:
        """Send the next ``count`` events, each one by itself."""
        for _ in range(min(count, len(self._chunks) - self._at)):
            self._transport.write(self._chunks[self._at])
            self._at += 1
        if self._at == len(self._chunks):
            self.end()

    def finish(self) -> int:
        """Send ``[DONE]`` instead of what is left; return the events sent before it."""
        sent, self._at = self._at, len(self._chunks)
        if sent < self._at:
            self._transport.write(self._chunks[-1])
        self.end()
        return min(sent, self._at - 1)

    def end(self) -> None:
        """Forget it."""
        if self._engine.streams.get(self._seed) is self:
            del self._engine.streams[self._seed]


class _Connection(asyncio.Protocol):
    """One connection: requests one after another."""

    transport: asyncio.Transport

    def __init__(self, engine: FastEngine) -> None:
        self._engine, self._rest = engine, b""
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._engine.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        if self._stream is not None:
            self._stream.end()

    def data_received(self, data: bytes) -> None:
        self._rest = data = self._rest + data
        head_end = data.find(b"\r\n\r\n") + 4
        if head_end < 4:
            return
        head = data[:head_end]
        length = _LENGTH.search(head)
        end = head_end + (int(length[1]) if length else 0)
        if len(data) >= end:
            self._rest = data[end:]
            self._answer(head, data[head_end:end])

    def _page(self, path: bytes) -> None:
        if path == b"/hexgen/stats":
            stats = {**_STATS, "steps": self._engine.steps}
            self.transport.write(_framed(json.dumps(stats).encode()))
        else:
            self.transport.write(_pages().get(path) or _framed(b"{}", b"404 Not Found"))

    def _answer(self, head: bytes, content: bytes) -> None:
        if head.startswith(b"GET "):
            self._page(head[4 : head.index(b" ", 4)])
            return
        self._engine.steps += 1
        tokens = _TOKENS.search(content)
        count = int(tokens[1]) if tokens else 16
        if not _STREAM.search(content):
            self.transport.write(_whole(count))
            return
        found = _SEED.search(content)
        seed = int(found[1]) if found else -1
        self._stream = Stream(self._engine, seed, count, self.transport)
        self._engine.streams[seed] = self._stream
