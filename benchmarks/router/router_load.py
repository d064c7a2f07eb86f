"""A load client that costs next to nothing: raw connections, kept alive, one call each at a time.

It knows what every answer must be, byte for byte, and counts events that are missing, doubled or
out of place.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from dataclasses import dataclass, field
from itertools import zip_longest
from time import perf_counter
from typing import Final

import httptools

from benchmarks.router import router_engine

PATH: Final = "/v1/chat/completions"
_NARROW_BYTES: Final = 4096
PROGRAM: Final = "program"
_PROMPT: Final = "Which of the customers ordered more than once in the last year? " * 10
_LONGEST_S: Final = 30.0  # a call that takes longer is lost
# Servers close what is idle (our router after 75 s); a call must not meet that on its way.
_IDLE_S: Final = 60.0
STAGES: Final = 4
"""Calls of a workflow."""


@dataclass(slots=True)
class Call:
    """One call and what came of it.

    Attributes:
        seed: its number.
        tokens: output tokens asked for.
        stream: whether they come as events.
        sent_s: when it was sent.
        first_s: when the first byte of the answer's body came.
        body: of the answer.
        events: that came so far.
        status: of the answer, 0 until it is complete.
        sent: events before ``[DONE]`` of a stream that the engine cut short.
    """

    seed: int
    tokens: int
    stream: bool
    sent_s: float = 0.0
    first_s: float = 0.0
    body: list[bytes] = field(default_factory=list)
    events: int = 0
    status: int = 0
    sent: int | None = None

    def request(self, says: str) -> bytes:
        """Return the request; its place in a workflow is said the router's own way (``says``)."""
        workflow, stage = divmod(self.seed, STAGES)
        content: dict[str, object] = {
            "model": router_engine.MODEL,
            "messages": [{"role": "user", "content": f"{workflow}. {_PROMPT}"}],
            "max_tokens": self.tokens,
            "seed": self.seed,
            "stream": self.stream,
        }
        if says == PROGRAM:
            agent = {
                "program_id": f"w{workflow}",
                "task_id": f"w{workflow}",
                "deadline_seconds": 60,
            }
            content["vllm_xargs"] = {"agentic_context": agent}
            said = ""
        else:
            said = (
                f"x-hexgen-workflow-id: w{workflow}\r\nx-hexgen-workflow-type: bench\r\n"
                f"x-hexgen-workflow-deadline-ms: 60000\r\nx-hexgen-stage: s{stage}\r\n"
                f"x-hexgen-workflow-final: {int(stage == STAGES - 1)}\r\n"
            )
        raw = json.dumps(content).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
            f"content-type: application/json\r\nauthorization: Bearer none\r\n"
            f"user-agent: bench\r\n{said}content-length: {len(raw)}\r\n\r\n"
        )
        return head.encode() + raw

    def wrong(self) -> int:
        """Return how many events (or answers that do not stream) are not what was sent."""
        found = b"".join(self.body)
        if self.stream:
            *events, done = router_engine.events(self.tokens)
            expected = b"".join(events[: self.sent]) + done
            if found == expected and self.status == 200:
                return 0
            pairs = zip_longest(_cut(found), _cut(expected))
            return max(sum(1 for a, b in pairs if a != b), 1)
        return 0 if self.status == 200 and found == router_engine.body(self.tokens) else 1


def _cut(stream: bytes) -> list[bytes]:
    return stream.removesuffix(b"\n\n").split(b"\n\n")


class _Connection(asyncio.Protocol):
    """One connection and the call on it."""

    transport: asyncio.Transport
    idle_since_s = 0.0

    def __init__(self, client: Client) -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._done: asyncio.Future[Call] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, call: Call, done: asyncio.Future[Call]) -> None:
        self._call, self._done = call, done
        request = call.request(self._client.says)
        call.sent_s = perf_counter()
        self.transport.write(request)

    def read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def serves(self, call: Call) -> bool:
        return self._call is call

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, piece: bytes) -> None:
        call = self._call
        if call is None:
            return
        if not call.body:
            call.first_s = perf_counter()
        call.body.append(piece)
        if call.stream:
            count = piece.count(b"\n\n")
            call.events += count
            self._client.on_events(call, count)

    def on_message_complete(self) -> None:
        call, done, self._call = self._call, self._done, None
        if call is None or done is None:
            return
        call.status = self._parser.get_status_code()
        if self._parser.should_keep_alive():
            self._parser = httptools.HttpResponseParser(self)
            self.idle_since_s = perf_counter()
            self._client.idle.append(self)
        else:
            self.transport.close()
        if not done.done():
            done.set_result(call)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._client.idle:
            self._client.idle.remove(self)
        if self._call is not None and self._done is not None and not self._done.done():
            self._done.set_result(self._call)  # its status stays 0


class Client:
    """Calls one address.

    Args:
        port: on 127.0.0.1.
        says: ``program`` for a router that reads ``agentic_context``, anything else for ours.

    Attributes:
        calls: number of the next call.
        idle: connections to use again.
        underway: calls by their number.
        lost: events (or whole answers) that were not as they should be.
    """

    def __init__(self, port: int, says: str = "") -> None:
        self._port, self.says = port, says
        self.calls = 0
        self.idle: deque[_Connection] = deque()
        self.underway: dict[int, Call] = {}
        self.lost = 0

    def on_events(self, call: Call, count: int) -> None:
        """Take note of ``count`` more events; for subclasses."""

    def judge(self, call: Call) -> None:
        """Look at what came of a call; for subclasses that expect more than answers."""
        self.lost += call.wrong()

    async def call(
        self,
        tokens: int,
        *,
        stream: bool,
        patience_s: float = _LONGEST_S,
        still_s: float = 0.0,
        seed: int | None = None,
    ) -> Call:
        """Make one call and return it when its answer is complete or has broken off.

        After ``patience_s`` seconds the client hangs up; the call then has status 0. For
        ``still_s`` seconds it does not read what comes, and little fits on the way. Without a
        ``seed`` it is the next call of the latest workflow.
        """
        call = Call(self.calls if seed is None else seed, tokens, stream)
        self.calls += 1
        self.underway[call.seed] = call
        loop = asyncio.get_running_loop()
        connection = None if still_s else self._idle_one()
        if connection is None:
            connection = await self._new_one(narrow=still_s > 0.0)
        done: asyncio.Future[Call] = loop.create_future()
        connection.send(call, done)
        if still_s:
            connection.transport.pause_reading()
            loop.call_later(still_s, connection.read_on)
        try:
            await asyncio.wait_for(done, patience_s)
        except asyncio.TimeoutError:
            if connection.serves(call):  # else its answer came just now, and another call has it
                connection.transport.abort()
        del self.underway[call.seed]
        self.judge(call)
        call.body.clear()
        return call

    async def _new_one(self, *, narrow: bool) -> _Connection:
        loop, made = asyncio.get_running_loop(), socket.socket()
        if narrow:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW_BYTES)
        made.setblocking(False)
        await loop.sock_connect(made, ("127.0.0.1", self._port))
        _, connection = await loop.create_connection(lambda: _Connection(self), sock=made)
        return connection

    def _idle_one(self) -> _Connection | None:
        oldest_s = perf_counter() - _IDLE_S
        while self.idle and self.idle[0].idle_since_s < oldest_s:
            self.idle.popleft().transport.close()
        return self.idle.pop() if self.idle else None

    def close(self) -> None:
        """Close the connections that no call is on."""
        for connection in list(self.idle):
            connection.transport.close()
