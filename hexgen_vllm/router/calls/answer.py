"""Passes an engine's answer on to the client, byte for byte.

Nothing waits between an engine and a client: a piece of an answer goes out in the turn of the
event loop in which it came in. When the client does not read, the engine is not read either.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from hexgen_vllm.clock import Clock
from hexgen_vllm.router.calls.call import Job
from hexgen_vllm.router.calls.headers import slack_line
from hexgen_vllm.router.calls.transcript import Transcript
from hexgen_vllm.router.engines.attempt import Attempt
from hexgen_vllm.router.engines.watch import (
    TAIL_BYTES,
    StreamWatch,
    find_usage,
)
from hexgen_vllm.router.errors import (
    EngineFailed,
    Outcome,
    as_event,
    error_event,
    hung_up,
    refused_by_engine,
    told_event,
)
from hexgen_vllm.router.http.client import Answer
from hexgen_vllm.router.http.messages import SENT
from hexgen_vllm.router.service import Service

MAX_WHOLE_BYTES: Final = 4 * 2**20
"""Answers up to this size are read before they are passed on, so that one that breaks can still
be answered with an error object."""

_REPORT_EVERY: Final = 64  # events between two reports of progress


class StreamPass:
    """Passes on server-sent events; the coordinator hears of their progress.

    Nothing is passed on before the first event, and comments are none: until then the call can be
    sent to another engine. An answer counts as given when its last event has gone out, whatever the
    client or the engine do with their connections after that.

    Args:
        job: the call.
        attempt: the engine's.
        service: hears of progress.
        head: header lines of the answer.
        transcript: of the whole answer, where another engine may go on with it.
    """

    def __init__(
        self,
        job: Job,
        attempt: Attempt,
        service: Service,
        head: list[bytes],
        transcript: Transcript | None = None,
    ) -> None:
        self._job, self._attempt, self._service, self._head = job, attempt, service, head
        self._transcript = transcript
        rewrite = None if transcript is None else transcript.take
        self._watch = attempt.watch = StreamWatch(job.endpoint, rewrite)
        self._before = 0 if transcript is None else transcript.tokens
        self._report_at = 1
        self._given = False

    async def run(self, answer: Answer) -> web.StreamResponse:
        """Relay ``answer``; one that breaks off ends with an error event.

        Raises:
            EngineFailed: it broke off before the client was sent anything of it, or where another
                engine may go on with it.
        """
        job = self._job
        try:
            with self._attempt:
                job.request.draw_from(answer)
                await answer.pour(self._feed)
                self._finish()
        except EngineFailed as failure:
            if self._given:
                job.request.end()
            elif self._attempt.answering and self._may_go_on():
                job.kept_alive = True  # what comes next comes into the same stream
                raise
            elif self._attempt.answering:
                job.ended(failure.reason)
                job.request.end(error_event(failure, job.endpoint.path))
            else:
                raise
        return SENT

    def _may_go_on(self) -> bool:
        watch = self._watch
        return self._transcript is not None and watch.between and not watch.failed()

    def _feed(self, data: bytes) -> None:
        watch = self._watch
        ready = watch.feed(data)
        if ready:
            self._pass_on(ready)
        if self._transcript is not None and self._transcript.broken:
            raise EngineFailed(Outcome.ERROR)

    def _pass_on(self, ready: bytes) -> None:
        watch = self._watch
        if watch.failed():
            ready = self._told(ready)
        if self._attempt.answering or watch.events:
            self._send(ready)
        if watch.complete():
            self._note_end()
        if watch.tokens() >= self._report_at:
            self._report(self._report_at == 1)
            self._report_at = watch.tokens() + _REPORT_EVERY

    def _told(self, ready: bytes) -> bytes:
        """Return events with an engine's error as the client may see them.

        Raises:
            EngineFailed: the error is too long to be looked at.
        """
        if not self._watch.between:
            raise EngineFailed(Outcome.ERROR)
        return told_event(ready, self._attempt.address)

    def _send(self, data: bytes) -> None:
        self._job.sent += 1
        if self._job.sent == 1 and self._job.learn is not None:
            self._job.learn(data)
        if self._attempt.answering:
            self._job.request.send(data)
            return
        self._attempt.answering, self._job.rests = True, self._rests
        if self._job.kept_alive:
            self._job.request.send(data)
        else:
            self._job.request.begin(200, self._head, None, data)

    def _rests(self) -> bool:
        watch = self._watch
        ended = watch.complete() or watch.failed()
        return watch.between and not ended and not self._attempt.client_is_slow()

    def _report(self, first: bool) -> None:
        accepted = self._job.accepted
        if accepted is None:
            return
        if first:
            self._job.first_token(self._service.clock.now())
            self._service.started(accepted.call.call_id)
        else:
            tokens = self._before + self._watch.tokens()
            self._service.progressed(accepted.call.call_id, tokens)

    def _note_end(self) -> None:
        """Book the answer whose last event has gone out to a client that reads."""
        if self._given or not self._attempt.client_reads():
            return
        self._given = True
        self._book()

    def _book(self) -> None:
        watch, job = self._watch, self._job
        if watch.failed():
            job.ended(Outcome.ERROR)
        elif watch.cancelled():
            job.ended(Outcome.CLIENT_GONE)
        else:
            usage = watch.usage()
            if self._transcript is not None:
                usage = self._transcript.usage(usage)
            job.ended(Outcome.ANSWERED, usage)

    def _finish(self) -> None:
        """End a stream that the engine ended.

        Raises:
            EngineFailed: its last event is missing.
        """
        watch, attempt = self._watch, self._attempt
        rest = watch.ended()
        if not (watch.failed() or watch.complete() or not self._job.endpoint.ends):
            raise EngineFailed(Outcome.LOST, retryable=not attempt.begun)
        if watch.failed():
            rest = self._told(rest)
        if not attempt.answering:
            self._send(b"")
        self._job.request.end(rest)
        if not self._given:
            self._book()


async def whole_pass(
    job: Job, attempt: Attempt, answer: Answer, head: list[bytes], clock: Clock
) -> web.StreamResponse:
    """Pass on an answer that is no stream, in one piece when it is not too long.

    Raises:
        EngineFailed: it broke off before the client was sent anything.
    """
    with attempt:
        body = await answer.body(MAX_WHOLE_BYTES)
    head.append(slack_line(job.accepted, job.placement, clock.now(), ends_now=True))
    if body is None and answer.status < 400 and not job.kept_alive:
        return await _large_pass(job, attempt, answer, head)
    if body is not None and job.learn is not None:
        job.learn(body)
    _note_end(job, answer.status, b"" if body is None else body[-TAIL_BYTES:])
    if answer.status >= 400:
        told = refused_by_engine(answer.status, body, attempt.address)
    else:
        told = body or b""
    if told is not body and answer.status >= 400:
        head = [line for line in head if not line.lower().startswith(b"content-type:")]
        head.append(b"Content-Type: application/json\r\n")
    if job.kept_alive:
        job.request.end(as_event(told, job.endpoint.path))
        return SENT
    job.request.reply(answer.status, head, told)
    return SENT


def _note_end(job: Job, status: int, tail: bytes) -> None:
    if status < 400:
        job.ended(Outcome.ANSWERED, find_usage(tail))
    else:
        job.ended(Outcome.BAD_REQUEST if status < 500 else Outcome.ERROR)


async def _large_pass(
    job: Job, attempt: Attempt, answer: Answer, head: list[bytes]
) -> web.StreamResponse:
    """Pass on a long answer as it comes; if it breaks off, so does the client's connection."""
    request, tail = job.request, b""

    def feed(data: bytes) -> None:
        nonlocal tail
        tail = (tail + data)[-TAIL_BYTES:]
        request.send(data)

    length = answer.header(b"content-length")
    attempt.answering = True
    request.begin(answer.status, head, int(length) if length.isdecimal() else None, b"")
    try:
        with attempt:
            answer.resume()
            request.draw_from(answer)
            await answer.pour(feed)
    except asyncio.CancelledError:
        if answer.whole:
            _note_end(job, answer.status, tail)
        raise
    except EngineFailed as failure:
        job.ended(failure.reason)
        return hung_up(request)
    request.end()
    _note_end(job, answer.status, tail)
    return SENT
