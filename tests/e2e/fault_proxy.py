"""A TCP proxy in front of a real server that breaks the connection of chosen requests.

async with FaultProxy(port) as proxy:
    proxy.faults.append(Fault("reset", after=500))  # meets the next POST
    ... talk to proxy.url ...
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import Literal, NamedTuple

GARBAGE = b"\x00\xff no chunk, no header"


class Fault(NamedTuple):
    """What happens to one answer.

    Attributes:
        kind: ``reset`` and ``close`` end the connection, ``half`` only this direction of it,
            ``garbage`` sends what is not HTTP first, ``hang`` sends no more, ``drip`` sends byte
            by byte.
        after: bytes of the answer, head included, that are passed on before.
    """

    kind: Literal["reset", "close", "half", "garbage", "hang", "drip"]
    after: int = 0


class FaultProxy:
    """Passes connections on to ``port`` of this machine.

    Attributes:
        faults: what the next POSTs meet, one each.
        port: where it listens.
    """

    def __init__(self, to_port: int) -> None:
        self.faults: deque[Fault] = deque()
        self.port = 0
        self._to_port = to_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultProxy:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await _Link(self, reader, writer).run(self._to_port)
        except (OSError, asyncio.CancelledError):
            pass  # one of the two sides is gone, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


class _Link:
    """One connection and its other half."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._fault: Fault | None = None
        self._passed = 0

    async def run(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        back = asyncio.ensure_future(self._answers(reader))
        try:
            while data := await self._reader.read(2**16):
                if data.startswith(b"POST ") and self._proxy.faults:
                    self._fault, self._passed = self._proxy.faults.popleft(), 0
                writer.write(data)
                await writer.drain()
        finally:
            back.cancel()
            writer.transport.abort()

    async def _answers(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(2**16):
            fault = self._fault
            if fault is None:
                self._writer.write(data)
            elif fault.kind == "drip":
                await self._drip(data)
            else:
                room = fault.after - self._passed
                self._writer.write(data[:room])
                self._passed += len(data)
                if self._passed > fault.after:
                    await self._break(fault)
            await self._writer.drain()
        self._writer.transport.abort()

    async def _drip(self, data: bytes) -> None:
        for i in range(len(data)):
            self._writer.write(data[i : i + 1])
            await asyncio.sleep(0)

    async def _break(self, fault: Fault) -> None:
        """Carry out a fault; ends when the connection does."""
        if fault.kind == "garbage":
            self._writer.write(GARBAGE)
        if fault.kind == "reset":
            plain = self._writer.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        elif fault.kind == "half":
            self._writer.write_eof()
        elif fault.kind != "hang":
            self._writer.close()
        await asyncio.Event().wait()
