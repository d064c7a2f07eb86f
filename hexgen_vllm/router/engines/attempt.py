"""One try of a call on one engine, and the guard that ends tries which hang.

The guard looks at all tries about once a second. No timer is set or moved for an event that
passes.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from hexgen_vllm.router.engines.watch import StreamWatch
from hexgen_vllm.router.errors import ClientGone, EngineFailed, Outcome
from hexgen_vllm.router.http.client import Answer
from hexgen_vllm.router.http.request import Request

_UNREAD_BYTES: Final = 2**16
_LINGER_S: Final = 1.0  # for an engine to end an answer that has said that it is at its end


class Attempt:
    """Turns whatever ends the work within it into :class:`EngineFailed`, or lets it pass.

    Used as a context manager around everything that waits for the engine.

    Attributes:
        target: what the call was placed on.
        engine: name of the engine.
        address: of the engine, host and port.
        answering: whether the client has been sent something.
        answer: the engine's answer, once it has begun.
        watch: looks at it, if it is a stream.
    """

    __slots__ = (
        "_guard",
        "_reason",
        "_request",
        "_seen",
        "_since_s",
        "_task",
        "address",
        "answer",
        "answering",
        "engine",
        "target",
        "watch",
    )  # fmt: skip

    def __init__(
        self, guard: Guard, request: Request, target: str, engine: str, address: str
    ) -> None:
        self._guard, self._request = guard, request
        self.target, self.engine, self.address = target, engine, address
        self._task: asyncio.Task[object] | None = None
        self._reason: Outcome | None = None
        self._seen, self._since_s = -1, 0.0
        self.answering = False
        self.answer: Answer | None = None
        self.watch: StreamWatch | None = None

    @property
    def progress(self) -> int:
        """Times that part of the answer came; comments and white space are none of it."""
        if self.watch is not None:
            return self.watch.progress
        return 0 if self.answer is None else self.answer.fed

    @property
    def begun(self) -> bool:
        """Whether an event of the answer has come, or part of a body: it is not asked for again."""
        return self.watch.events > 0 if self.watch is not None else self.progress > 0

    def __enter__(self) -> Attempt:
        self._task = self._request.task
        self._guard.attempts.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._guard.attempts.discard(self)
        if error is None:
            return
        if isinstance(error, asyncio.CancelledError):
            if self._reason is not None and not self._client_gone():
                _forget_cancel(self._task)
                raise self._failure(self._reason) from None
        elif isinstance(error, OSError | asyncio.TimeoutError):
            raise self._failure(
                Outcome.CLIENT_GONE if self._client_gone() else Outcome.LOST
            ) from error

    def _failure(self, reason: Outcome) -> Exception:
        if reason is Outcome.CLIENT_GONE:
            return ClientGone()
        repeats = reason is Outcome.LOST and not self.begun
        return EngineFailed(reason, retryable=repeats)

    def _client_gone(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()

    def abort(self, reason: Outcome) -> None:
        """End it from outside for ``reason``; who notices it from within knows already."""
        if self._task not in (None, asyncio.current_task()) and self._reason is None:
            self._reason = reason
            self._task.cancel()

    def silent_s(self, now: float) -> float:
        """Return the seconds since the guard first saw its present progress."""
        if self.progress != self._seen:
            self._seen, self._since_s = self.progress, now
        return now - self._since_s

    def client_reads(self) -> bool:
        """Whether the client is there and has taken most of what it was sent."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return False
        return transport.get_write_buffer_size() <= _UNREAD_BYTES

    def client_is_slow(self) -> bool:
        """Whether what was sent to the client still waits to be read."""
        return self._request.unsent > 0


def _forget_cancel(task: asyncio.Task[object] | None) -> None:
    uncancel = getattr(task, "uncancel", None)  # Python 3.11
    if uncancel is not None:
        uncancel()


class Guard:
    """All tries under way.

    Args:
        first_byte_s: longest wait for the first byte, seconds.
        stall_s: longest silence after it, seconds.
    """

    def __init__(self, first_byte_s: float, stall_s: float) -> None:
        self.attempts: set[Attempt] = set()
        self._first_byte_s, self._stall_s = first_byte_s, stall_s

    def tick(self, now: float) -> None:
        """End the tries that have been silent for too long."""
        for attempt in self.attempts:
            silent_s, watch = attempt.silent_s(now), attempt.watch
            if watch is not None and watch.complete():
                if silent_s > _LINGER_S and attempt.answer is not None:
                    attempt.answer.enough()
                continue
            if silent_s > (self._stall_s if attempt.begun else self._first_byte_s):
                attempt.abort(Outcome.CLIENT_GONE if attempt.client_is_slow() else Outcome.TIMEOUT)

    def engine_lost(self, engine: str) -> None:
        """End the tries on an engine that is down, where the client has not seen anything yet."""
        for attempt in self.attempts:
            if attempt.engine == engine and not attempt.answering:
                attempt.abort(Outcome.LOST)

    def end_all(self) -> None:
        """End all tries: the router stops."""
        for attempt in self.attempts:
            attempt.abort(Outcome.SHUTTING_DOWN)
