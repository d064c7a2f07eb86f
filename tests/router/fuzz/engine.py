"""An engine that answers calls with whatever bytes it was given, cut wherever it was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

_PAGES: Final = {
    "/health": b"",
    "/v1/models": json.dumps({"data": [{"id": "tiny", "object": "model"}]}).encode(),
}
OK_BODY: Final = b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


def whole(body: bytes, kind: str = "application/json") -> bytes:
    """Return a complete answer with ``body``."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunked(pieces: Sequence[bytes]) -> list[bytes]:
    """Return an event stream as it travels: head, one chunk for each piece, end."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%s\r\n" % (len(p), p) for p in pieces if p]
    return [head, *chunks, b"0\r\n\r\n"]


class ScriptedEngine:
    """An engine on 127.0.0.1.

    Attributes:
        script: what every call is answered with, written piece by piece.
        hang_up: whether the connection ends after the script.
        bodies: bodies of calls so far.
        port: its port, once started.
    """

    def __init__(self) -> None:
        self.script: Sequence[bytes] = (whole(OK_BODY),)
        self.hang_up = False
        self.bodies: list[bytes] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._answer(reader, writer):
                pass
        self._open.discard(writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        length = next(
            (
                int(line[15:])
                for line in head.lower().split("\r\n")
                if line.startswith("content-length:")
            ),
            0,
        )
        body = await reader.readexactly(length)
        if method == "GET":
            page = _PAGES.get(path)
            missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            writer.write(missing if page is None else whole(page))
            return True
        self.bodies.append(body)
        script, hang_up = self.script, self.hang_up
        for piece in script:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        return not hang_up
