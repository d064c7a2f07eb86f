"""An engine's answer on its way in.

It is not waited for piece by piece: what arrives is handed on in the same turn of the event loop,
and the task that serves the call sleeps until the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from hexgen_vllm.router.http_request import Pairs

T = TypeVar("T")
Sink = Callable[[bytes], None]


async def in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of ``work`` if it is there within ``seconds``.

    Unlike :func:`asyncio.wait_for` before Python 3.12 it loses no cancellation that comes in the
    turn in which the work ends.

    Raises:
        asyncio.TimeoutError: it is not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        task.add_done_callback(_forget)
        task.cancel()
        raise
    if task.done():
        return task.result()
    task.add_done_callback(_forget)
    task.cancel()
    raise asyncio.TimeoutError


def _forget(task: asyncio.Task[Any]) -> None:
    """Take the result of work that nobody waits for, and close it if that can be done."""
    if not task.cancelled() and task.exception() is None:
        close = getattr(task.result(), "close", None)
        if close is not None:
            close()


class Line(Protocol):
    """The connection that an answer comes over."""

    def pause(self, paused: bool) -> None:
        """Read no more for now, or read on."""

    def abandon(self) -> None:
        """Close it."""


class Answer:
    """An engine's answer, from the head to the end of the body.

    Attributes:
        status: HTTP status, 0 until the head is here.
        pairs: header names and values as they came.
        fed: pieces of the body so far that are not white space.
    """

    __slots__ = (
        "_error", "_line", "_pieces", "_sink", "_size", "_waiter", "_whole", "fed", "pairs",
        "status",
    )  # fmt: skip

    def __init__(self, line: Line) -> None:
        self._line: Line | None = line
        self.status = self.fed = 0
        self.pairs: Pairs = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._sink: Sink | None = None
        self._whole = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> str:
        """Return the value of the header with this lower-case name, empty if there is none."""
        for one, value in self.pairs:
            if one.lower() == name:
                return value.decode("latin-1")
        return ""

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self._whole

    async def head(self) -> None:
        """Wait for the head; whoever is not there to take it wants none of the answer.

        Raises:
            EngineBroke: the connection broke first.
        """
        try:
            while not self.status:
                await self._change()
        except BaseException:
            self.close()
            raise

    async def body(self, most: int) -> bytes | None:
        """Return the body, or ``None`` as soon as more than ``most`` bytes of it are here.

        Raises:
            EngineBroke: the connection broke first.
        """
        while not self._whole:
            if self._size > most:
                self.pause()
                return None
            await self._change()
        if self._size > most:
            return None
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    async def pour(self, sink: Sink) -> None:
        """Hand all of the body to ``sink`` as it comes; return at its end.

        Raises:
            EngineBroke: the connection broke first; ``sink`` has had everything that came.
        """
        pieces, self._pieces = self._pieces, []
        if pieces:
            sink(b"".join(pieces))
        self._sink = sink
        while not self._whole:
            await self._change()

    def _change(self) -> asyncio.Future[None]:
        """Return what is done when something has come."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def pause(self) -> None:
        """Take no more from the engine for now."""
        if self._line is not None:
            self._line.pause(True)

    def resume(self) -> None:
        """Take more."""
        if self._line is not None:
            self._line.pause(False)

    def enough(self) -> None:
        """Take for its end what came so far: :meth:`pour` returns."""
        if self._sink is not None and not self._whole:
            self._whole = True
            self._wake()

    def close(self) -> None:
        """Want no more of it: close the connection unless the answer has ended."""
        line, self._line = self._line, None
        if line is not None:
            line.abandon()

    # For the connection

    def began(self, status: int, pairs: Pairs) -> None:
        """Take in the head."""
        self.status, self.pairs = status, pairs
        self._wake()

    def feed(self, data: bytes) -> None:
        """Take in a piece of the body."""
        if not data.isspace():  # some proxies send it to keep connections open
            self.fed += 1
        if self._sink is None:
            self._pieces.append(data)
            self._size += len(data)
            self._wake()
            return
        try:
            self._sink(data)
        except Exception as error:  # it is the task's, not the event loop's
            self.close()
            self.broke(error)

    def ended(self) -> None:
        """Note the end."""
        self._whole, self._line = self._error is None, None
        self._wake()

    def broke(self, error: Exception) -> None:
        """Note that no more will come."""
        if not self._whole and self._error is None:
            self._error, self._line = error, None
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
