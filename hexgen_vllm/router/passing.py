"""Passes an engine's answer on to the client, byte for byte."""

from __future__ import annotations

from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from hexgen_vllm.router import ledger
from hexgen_vllm.router.answers import (
    EngineFailed,
    error_event,
    hung_up,
    refused_by_engine,
)
from hexgen_vllm.router.attempt import LOST, Attempt, failed
from hexgen_vllm.router.job import Job
from hexgen_vllm.router.service import Service
from hexgen_vllm.router.watch import TAIL_BYTES, StreamWatch, find_usage

MAX_WHOLE_BYTES: Final = 4 * 2**20
"""Answers up to this size are read before they are passed on, so that one that breaks can still
be answered with an error object."""

_REPORT_EVERY: Final = 64  # events between two reports of progress


class StreamPass:
    """Passes on server-sent events; the coordinator hears of their progress."""

    def __init__(self, job: Job, attempt: Attempt, service: Service) -> None:
        self._job, self._attempt, self._service = job, attempt, service
        self._watch = StreamWatch(job.endpoint)

    async def run(
        self, answer: aiohttp.ClientResponse, head: CIMultiDict[str]
    ) -> web.StreamResponse:
        """Relay ``answer``; one that breaks off ends with an error event.

        Raises:
            EngineFailed: it broke off before the client was sent anything.
        """
        response = web.StreamResponse(status=200, headers=head)
        try:
            with self._attempt:
                await self._pump(answer.content, response)
                await self._finish(response)
        except EngineFailed as failure:
            if not self._attempt.answering:
                raise
            self._job.ended(failure.reason)
            await response.write(error_event(failure, self._job.endpoint.path))
            await response.write_eof()
        return response

    async def _pump(self, content: aiohttp.StreamReader, response: web.StreamResponse) -> None:
        job, attempt, watch = self._job, self._attempt, self._watch
        report_at = 1
        while chunk := await content.readany():
            attempt.progress += 1
            ready = watch.feed(chunk)
            if ready:
                if not attempt.answering:
                    await response.prepare(job.request)
                    attempt.answering = True
                await response.write(ready)
            if watch.events >= report_at:
                self._report(report_at == 1)
                report_at = watch.events + _REPORT_EVERY

    def _report(self, first: bool) -> None:
        accepted = self._job.accepted
        if accepted is None:
            return
        if first:
            self._job.first_token(self._service.clock.now())
            self._service.started(accepted.call.call_id)
        else:
            self._service.progressed(accepted.call.call_id, self._watch.tokens())

    async def _finish(self, response: web.StreamResponse) -> None:
        """End a stream that the engine ended.

        Raises:
            EngineFailed: its last event is missing.
        """
        watch, attempt = self._watch, self._attempt
        engine_failed = watch.failed()
        if not (engine_failed or watch.complete()):
            raise failed(LOST, retryable=attempt.progress == 0)
        if not attempt.answering:
            await response.prepare(self._job.request)
            attempt.answering = True
        await response.write_eof(watch.rest)
        if engine_failed:
            self._job.ended("engine-error")
        else:
            self._job.ended(ledger.ANSWERED, watch.usage())


async def whole_pass(
    job: Job, attempt: Attempt, answer: aiohttp.ClientResponse, head: CIMultiDict[str]
) -> web.StreamResponse:
    """Pass on an answer that is no stream, in one piece when it is not too long.

    Raises:
        EngineFailed: it broke off before the client was sent anything.
    """
    pieces: list[bytes] = []
    size = 0
    with attempt:
        while size <= MAX_WHOLE_BYTES and (piece := await answer.content.readany()):
            attempt.progress += 1
            pieces.append(piece)
            size += len(piece)
    body = b"".join(pieces)
    if size > MAX_WHOLE_BYTES:
        return await _large_pass(job, attempt, answer, head, body)
    _note_end(job, answer.status, body[-TAIL_BYTES:])
    if answer.status >= 400 and b'"error"' not in body:
        body = refused_by_engine(answer.status)
        head["Content-Type"] = "application/json"
    return web.Response(status=answer.status, body=body, headers=head)


def _note_end(job: Job, status: int, tail: bytes) -> None:
    if status < 400:
        job.ended(ledger.ANSWERED, find_usage(tail))
    else:
        job.ended(ledger.BAD_REQUEST if status < 500 else "engine-error")


async def _large_pass(
    job: Job,
    attempt: Attempt,
    answer: aiohttp.ClientResponse,
    head: CIMultiDict[str],
    first: bytes,
) -> web.StreamResponse:
    """Pass on a long answer as it comes; if it breaks off, so does the client's connection."""
    response = web.StreamResponse(status=answer.status, headers=head)
    response.content_length = answer.content_length
    tail = first[-TAIL_BYTES:]
    try:
        with attempt:
            await response.prepare(job.request)
            attempt.answering = True
            await response.write(first)
            while piece := await answer.content.readany():
                attempt.progress += 1
                tail = (tail + piece)[-TAIL_BYTES:]
                await response.write(piece)
            await response.write_eof()
    except EngineFailed as failure:
        job.ended(failure.reason)
        return hung_up(job.request)
    _note_end(job, answer.status, tail)
    return response
