"""One call from its arrival to its end: placed, sent, relayed, sent again if nothing was seen.

What costs an engine little, or is no call at all, goes past the policy to the least busy engine
that serves its model, but is relayed, watched and counted alike.

    place ──► prompt at a prefill engine, where one engine is to compute it and another to answer
                  │
                  ▼
              try an engine ──► nothing sent to the client yet ──► elsewhere, while allowed
                  │
                  └──► first bytes relayed ──► it breaks ──► another goes on, where that is allowed
                                                  │
                                                  └──► error event, or a closed connection

Every path ends with exactly one ``finished`` for the coordinator and one entry in the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

from aiohttp import web
from yarl import URL

from hexgen_vllm.errors import BadRequest, HexgenError, Refused
from hexgen_vllm.router import access, errors
from hexgen_vllm.router.access import KEY_HEADER
from hexgen_vllm.router.calls import headers as outbound
from hexgen_vllm.router.calls import prefill, stored
from hexgen_vllm.router.calls.answer import MAX_WHOLE_BYTES, StreamPass, whole_pass
from hexgen_vllm.router.calls.call import Job, call_ended
from hexgen_vllm.router.calls.intake import (
    Accepted,
    Parsed,
    parsed_aside,
)
from hexgen_vllm.router.calls.tokenizer import Tokenizer
from hexgen_vllm.router.calls.transcript import Transcript, asking
from hexgen_vllm.router.context import Context, read_body
from hexgen_vllm.router.endpoints import Endpoint
from hexgen_vllm.router.engines.attempt import Attempt
from hexgen_vllm.router.engines.fleet import Engine
from hexgen_vllm.router.engines.ranks import RANK_HEADER, rank_of
from hexgen_vllm.router.engines.watch import TAIL_BYTES, Usage, find_usage
from hexgen_vllm.router.errors import (
    ClientGone,
    EngineFailed,
    Outcome,
    refused,
)
from hexgen_vllm.router.http.client import Answer, Pool, in_time
from hexgen_vllm.router.http.errors import CannotConnect, RouterShort
from hexgen_vllm.router.http.messages import LARGE_BYTES, SENT, aside
from hexgen_vllm.router.http.request import Request
from hexgen_vllm.types import Call, CallResult, EngineKind, Placement

_ELSEWHERE: Final = frozenset((429, 500, 502, 503, 504))
# How vLLM's API server says that the process behind it has died.
_DEAD: Final = re.compile(rb"EngineDead|EngineCore encountered|Engine (?:loop )?is dead", re.I)
_MOST_SAID_BYTES: Final = 4096
_PATIENCE_S: Final = 1.0
_STORED: Final = "stored"  # why a call goes to the engine that has what it is about
_ASK_TIMEOUT_S: Final = 2.0
_ASKING: Final = 4
AskOthers = Callable[[str], Awaitable[str | None]]
_LOG = logging.getLogger(__name__)


class Relay:
    """Answers the requests of the generation endpoints.

    Args:
        context: parts of the router.
        ask_others: asks the router's other processes which engine has a stored response; ``None``
            when there are none.
    """

    def __init__(self, context: Context, ask_others: AskOthers | None = None) -> None:
        self._context, options = context, context.options
        self._ask_others = ask_others
        self._asking = asyncio.Semaphore(_ASKING)
        self._engine_key = options.engine_api_key
        self._pool = Pool(options.connect_timeout_secs, access.for_engines(options))
        self._tokenizer = Tokenizer(self._pool, options.engine_api_key)

    @property
    def connections(self) -> int:
        """Connections to engines."""
        return self._pool.open

    def close(self) -> None:
        """Close the connections to engines."""
        self._pool.close()

    async def answer(self, endpoint: Endpoint, request: Request) -> web.StreamResponse:
        """Answer a request; every error becomes an OpenAI error object.

        One that comes after comments have begun a stream becomes an error event.
        """
        context = self._context
        trace = None
        if context.tracing is not None:
            trace = context.tracing.begin(request.method, endpoint.path, request.names)
        job = Job(request, endpoint, context.clock.now(), trace)
        context.ledger.arrived[endpoint.name] += 1
        response = await self._answered(job)
        if job.kept_alive and isinstance(response, web.Response) and response is not SENT:
            body = response.body if isinstance(response.body, bytes) else b""
            request.end(errors.as_event(body, endpoint.path))
            return SENT
        return response

    async def _answered(self, job: Job) -> web.StreamResponse:
        request, endpoint = job.request, job.endpoint
        try:
            return await self._serve(job)
        except BadRequest as error:
            job.ended(Outcome.BAD_REQUEST)
            return errors.from_error(error, job.request_id)
        except (Refused, EngineFailed) as error:
            job.ended(Outcome.of(error.reason))
            return errors.from_error(error, job.request_id)
        except (ClientGone, ConnectionError):
            job.client_left()
            return errors.hung_up(request)
        except asyncio.CancelledError:
            job.client_left()
            raise
        except Exception:
            _LOG.exception("call failed endpoint=%s request_id=%s", endpoint.name, job.request_id)
            return errors.from_error(HexgenError(), job.request_id)
        finally:
            self._close(job)

    def _close(self, job: Job) -> None:
        context, now = self._context, self._context.clock.now()
        context.keep_alives.discard(job)
        if job.accepted is not None:
            self._learn(job)
            if job.placed:
                call = job.accepted.call
                known = context.service.coordinator.workflows.get(call.workflow_id) is not None
                context.metrics.accounts.call_ended(call, job, now, known=known)
                context.service.finished(job.accepted.call.call_id, job.result)
        context.ledger.ended[job.endpoint.name, job.outcome] += 1
        context.metrics.ended(job, now)
        call_ended(job, now)
        if job.trace is not None:
            job.trace.ended(job.outcome, job.result)
        if job.result.ok and job.placement is not None:
            context.ledger.overdue += now > job.placement.due_s

    async def _serve(self, job: Job) -> web.StreamResponse:
        context = self._context
        job.request_id = context.intake.request_id(job.request.names)
        context.check_open()
        raw = job.request.whole or await read_body(job.request)
        parsed = (
            await parsed_aside(job.endpoint, job.request.names, raw)
            if len(raw) > LARGE_BYTES
            else None
        )
        accepted = job.accepted = self._read(job, raw, parsed)
        for claim in accepted.clamped:
            context.ledger.clamped[claim] += 1
        call = accepted.call
        context.check_model(call.model)
        if call.streamed:
            context.keep_alives.add(job, job.began_s)
        context.retries.call_arrived()
        context.metrics.began(call)
        if job.placed:
            context.metrics.accounts.call_began(call, job.request_id)
        if job.trace is not None:
            job.trace.accepted(job.request_id, call, accepted.agent)
        placement = await self._place(job, call)
        now = context.clock.now()
        context.metrics.held_s.observe(now - job.began_s)
        job.placed_s = now
        self._have_tokenized(job, accepted, placement)
        return await self._tried(job, accepted, placement, now)

    async def _tried(
        self, job: Job, accepted: Accepted, placement: Placement, now: float
    ) -> web.StreamResponse:
        """Send a call where it was placed, and elsewhere as long as that fails and may be done.

        Raises:
            EngineFailed: the last engine failed.
        """
        context, call = self._context, accepted.call
        path, sent = job.request.path_qs, self._first_request(accepted)
        while True:
            job.placement, job.sent_s = placement, now
            if job.trace is not None:
                job.trace.placed(placement, now)
            job.tries += 1
            if sent is not accepted and accepted.terms is not None and not job.sent:
                job.transcript = Transcript(accepted.terms, chat=job.endpoint.name == "chat")
            try:
                ready = sent
                if placement.prefill is not None:
                    placement, ready = await self._prefilled(job, sent, path, placement)
                    now = context.clock.now()
                return await self._try(job, ready, path, placement, now)
            except EngineFailed as failure:
                job.try_failed(failure.reason)
                seen = job.transcript if job.sent else None
                if seen is None:
                    placement = await self._elsewhere(job, call, failure)
                elif seen.ended and (rest := seen.closing(accepted.body)) is not None:
                    self._note_broken(job, seen, failure, "closed")
                    job.ended(Outcome.ANSWERED, seen.usage(Usage()))
                    job.request.end(rest)
                    return SENT
                else:
                    placement, path, sent = await self._moved(job, accepted, seen, failure)
                now = context.clock.now()

    def _read(self, job: Job, raw: bytes, parsed: Parsed | None) -> Accepted:
        context, request, endpoint = self._context, job.request, job.endpoint
        free = not (endpoint.known and endpoint.placed)
        default = context.any_model if free else context.default_model
        return context.intake.read(
            endpoint,
            request.names,
            raw,
            job.began_s,
            default,
            request.pairs,
            parsed,
            request.client,
        )

    async def _place(self, job: Job, call: Call) -> Placement:
        """Return where to send a call first.

        Raises:
            Refused: nobody can take it.
        """
        home = await self._home(job)
        if home is None:
            place = self._context.service.place
            return await place(call) if job.placed else self._least_busy(job, call)
        call.engine = home.name
        if job.placed and job.endpoint.known:
            return await self._context.service.place(call)
        if not home.takes_calls:
            raise refused(Outcome.NO_ENDPOINTS)
        job.tried.append(home.name)
        return Placement(call.call_id, next(iter(home.targets)), _STORED)

    async def _home(self, job: Job) -> Engine | None:
        """Return the engine that has what a request is about or follows, ``None`` if any may.

        Engines may not know conversations: one whose engine has left, or that is new, is theirs to
        judge.

        Raises:
            BadRequest: the engine has left, and the response with it, or what is named is none of
                this tenant.
        """
        context, now, accepted = self._context, self._context.clock.now(), job.accepted
        if accepted is None:
            return None
        response = stored.stored_id(job.request.path) or accepted.follows
        joins = response is None
        if response is None:
            response = accepted.conversation
        if response is None:
            return None
        own_id = job.own_id(response)
        name = context.stored.engine_of(own_id, now)
        if name is None:
            name = await self._found(job, response, own_id)
            if name is not None:
                context.stored.note(own_id, name, now)
        if name is None:
            if own_id != response:
                what = "Conversation" if joins or stored.is_conversation(response) else "Response"
                raise _not_there(f"{what} with id {response!r} not found.")
            return None
        engine = context.fleet.engines.get(name)
        if engine is None and not joins:
            text = f"Response with id {response!r} is no longer there: its engine has left."
            raise _not_there(text)
        return engine

    def _least_busy(self, job: Job, call: Call) -> Placement:
        engine = self._context.fleet.least_busy(call.model, job.tried)
        if engine is None:
            raise refused(Outcome.NO_ENDPOINTS)
        job.tried.append(engine.name)
        return Placement(call.call_id, next(iter(engine.targets)), "least-busy")

    async def _elsewhere(self, job: Job, call: Call, failure: EngineFailed) -> Placement:
        """Return where to send a call again.

        Raises:
            EngineFailed: ``failure``, when it may not be sent again or nobody else can take it.
        """
        context = self._context
        repeats = failure.retryable and (job.repeats or _was_not_begun(failure))
        at_home = job.placement is not None and job.placement.reason == _STORED
        if at_home or not repeats or not context.retries.allows(job.tries):
            raise failure
        await asyncio.sleep(context.retries.backoff_s(job.tries))
        try:
            placement = await self._replaced(job, call)
        except Refused:
            raise failure from None
        context.ledger.retries[failure.reason] += 1
        return placement

    async def _replaced(self, job: Job, call: Call) -> Placement:
        """Return where else to send a call.

        Raises:
            Refused: nobody can take it.
        """
        if job.placed:
            return await self._context.service.replace(call.call_id)
        return self._least_busy(job, call)

    def _have_tokenized(self, job: Job, accepted: Accepted, placement: Placement) -> None:
        """Have a new prompt tokenized where engines tell of their KV blocks."""
        call, events = accepted.call, self._context.kv_events
        if job.endpoint.goes_on and events.wants(call.prefix):
            engine = self._context.fleet.engine(placement.engine_id)
            tokenize = partial(self._tokenizer.tokens, accepted, engine)
            events.learn(call.prefix, call.prefix_chunk_tokens, tokenize)

    def _first_request(self, accepted: Accepted) -> Accepted:
        """Return what engines are sent: asked for token ids where another one could go on."""
        if accepted.terms is None or not self._context.options.migration_limit:
            return accepted
        body = asking(accepted.body)
        return accepted if body is None else accepted.with_body(body)

    async def _moved(
        self, job: Job, accepted: Accepted, transcript: Transcript, failure: EngineFailed
    ) -> tuple[Placement, str, Accepted]:
        """Return where to send the rest of a call whose stream broke, and the path and request.

        Raises:
            EngineFailed: ``failure``, when nobody may go on with it or nobody can.
        """
        if failure.reason is Outcome.SHUTTING_DOWN:
            raise failure
        call, rest, what = accepted.call, None, "impossible"
        if transcript.goes_on:
            if not self._context.retries.allows_migration(job.migrations):
                what = "limit"
            elif call.deadline_asked and call.deadline_s <= self._context.clock.now():
                what = "late"
            else:
                rest = await aside(transcript.rest, accepted.body, job.request.path_qs)
        if rest is None:
            self._note_broken(job, transcript, failure, what)
            raise failure
        try:
            placement = await self._replaced(job, call)
        except Refused:
            self._note_broken(job, transcript, failure, "no-engine")
            raise failure from None
        self._note_broken(job, transcript, failure, "continued")
        job.migrations += 1
        return placement, rest[0], accepted.with_body(rest[1])

    def _note_broken(
        self, job: Job, transcript: Transcript, failure: EngineFailed, what: str
    ) -> None:
        self._context.ledger.migrations[what] += 1
        _LOG.info(
            "stream broke reason=%s migration=%s engine=%s tokens=%d request_id=%s",
            failure.reason,
            what,
            "" if job.placement is None else job.placement.engine_id,
            transcript.tokens,
            job.request_id,
        )

    async def _prefilled(
        self, job: Job, accepted: Accepted, path: str, placement: Placement
    ) -> tuple[Placement, Accepted]:
        """Have the prompt of a call computed; return where it goes then, and as which request.

        A prefill engine that fails costs a retry. Without one the engine that answers computes the
        prompt itself, as it does where the first one declines.

        Raises:
            EngineFailed: the router stops.
        """
        context, call_id, failed = self._context, accepted.call.call_id, CallResult(ok=False)
        while placement.prefill is not None:
            try:
                answer = await self._prefill(job, accepted, path, placement.prefill)
            except EngineFailed as failure:
                context.ledger.prefills["failed"] += 1
                job.try_failed(failure.reason)
                if failure.reason is Outcome.SHUTTING_DOWN:
                    raise
                if not context.retries.allows(job.tries):
                    context.service.prefilled(call_id, failed)
                    break
                context.ledger.retries[failure.reason] += 1
                job.tries += 1
                job.placement = placement = await context.service.replace(call_id)
                continue
            if answer is None:
                context.ledger.prefills["declined"] += 1
                context.service.prefilled(call_id, failed)
                break
            context.ledger.prefills["done"] += 1
            usage = find_usage(answer[-TAIL_BYTES:])
            result = CallResult(True, usage.prompt_tokens, usage.cached_tokens, 1)
            context.service.prefilled(call_id, result)
            body = await _written(prefill.second_request, accepted.body, answer)
            return placement, accepted.with_body(body)
        return placement, accepted

    async def _prefill(
        self, job: Job, accepted: Accepted, path: str, half: Placement
    ) -> bytes | None:
        """Return a prefill engine's answer, ``None`` where it is not for it to compute the prompt.

        Raises:
            EngineFailed: the engine failed.
        """
        context, target = self._context, half.engine_id
        first = await _written(prefill.first_request, accepted.body)
        if first is None:
            return None
        engine = context.fleet.engine(target)
        outcome, sent = Outcome.CLIENT_GONE, accepted.with_body(first)
        attempt = Attempt(context.guard, job.request, target, engine.name, engine.host_port)
        try:
            with attempt:
                now = context.clock.now()
                answer = attempt.answer = await self._send(job, sent, path, half, engine, now)
                if answer.status in _ELSEWHERE:
                    raise _refused_by_engine(answer, await _said(answer), attempt.address)
                said = await answer.body(MAX_WHOLE_BYTES)
            outcome = Outcome.ANSWERED if answer.status == 200 else Outcome.BAD_REQUEST
            return said if answer.status == 200 else None
        except EngineFailed as failure:
            outcome = failure.reason
            raise
        finally:
            context.fleet.tried(engine, target, outcome)
            if attempt.answer is not None:
                attempt.answer.close()

    async def _try(
        self, job: Job, accepted: Accepted, path: str, placement: Placement, now: float
    ) -> web.StreamResponse:
        """Send a call to the engine it was placed on, and relay the answer.

        Args:
            job: the call.
            accepted: the call with the body for the engine.
            path: at the engine.
            placement: where it goes.
            now: time of sending.

        Raises:
            EngineFailed: the engine failed, and the client has seen nothing or nothing that
                another engine could not go on from.
        """
        context = self._context
        engine = context.fleet.engine(placement.engine_id)
        target, name = placement.engine_id, engine.name
        attempt = Attempt(context.guard, job.request, target, name, engine.host_port)
        outcome: Outcome | None = None
        try:
            with attempt:
                answer = attempt.answer = await self._send(
                    job, accepted, path, placement, engine, now
                )
            return await self._relay(job, attempt, answer)
        except EngineFailed as failure:
            outcome = failure.reason
            raise
        finally:
            # What nobody knows may be what no engine can do.
            if job.endpoint.known or outcome is not Outcome.ERROR:
                context.fleet.tried(engine, attempt.target, outcome or job.outcome)
            if attempt.answer is not None:
                attempt.answer.close()  # nothing to close when it was read to its end

    async def _send(
        self,
        job: Job,
        accepted: Accepted,
        path: str,
        placement: Placement,
        engine: Engine,
        now: float,
    ) -> Answer:
        context = self._context
        extra = self._key_for_engine(job.request)
        if placement.engine_id != engine.name:
            extra[RANK_HEADER] = rank_of(placement.engine_id)
        if job.trace is not None:
            job.trace.sending(placement.engine_id, extra)
        bare, body = engine.front.bare, accepted.body
        if bare and engine.kind is EngineKind.HEXGEN and job.endpoint.carries_fields:
            body = await _written(outbound.body_for, body, accepted, placement, now)
        url = engine.address(path)
        head = outbound.call_head(
            accepted,
            placement,
            engine.kind,
            url=url,
            now=now,
            epoch=context.epoch_s,
            request_id=job.request_id or "",
            extra=extra,
            method="GET" if job.request.method == "HEAD" else job.request.method,
            length=len(body),
            bare=bare,
            words=engine.worker.deadline,
        )
        try:
            return await self._pool.send(url, head, body, once=not job.repeats)
        except RouterShort:
            _LOG.error("nothing left to connect with engine=%s", engine.name)
            text = "The router has nothing left to connect to an engine with."
            raise refused(Outcome.OUT_OF_CONNECTIONS, text) from None
        except CannotConnect:
            context.fleet.lost(engine.name, "a connection failed")
            raise
        except OSError:
            context.suspect(engine.name)
            raise

    async def _relay(self, job: Job, attempt: Attempt, answer: Answer) -> web.StreamResponse:
        # A redirect would show the client where the engine is.
        leads = None if job.endpoint.known else self._own_path(answer, attempt.engine)
        if answer.status in _ELSEWHERE or (300 <= answer.status < 400 and leads is None):
            raise _refused_by_engine(answer, await _said(answer), attempt.address)
        head = outbound.answer_head(answer.pairs, attempt.target, job.request_id or "")
        if leads is not None:
            head.append(f"Location: {leads}\r\n".encode("utf-8", "surrogateescape"))
        if answer.status == 200 and job.endpoint.name == "responses":
            job.learn = partial(self._learn_response, job, attempt.engine)
        elif answer.status in (200, 201) and _creates_conversation(job.request):
            job.learn = partial(self._learn_conversation, job, attempt.engine)
        clock = self._context.service.clock
        if answer.status == 200 and _is_stream(answer):
            head.append(
                outbound.slack_line(job.accepted, job.placement, clock.now(), ends_now=False)
            )
            service = self._context.service
            return await StreamPass(job, attempt, service, head, job.transcript).run(answer)
        if job.sent:  # no stream to go on with
            raise EngineFailed(Outcome.ERROR)
        return await whole_pass(job, attempt, answer, head, clock)

    def _learn_response(self, job: Job, engine: str, answer: bytes) -> None:
        self._note_stored(job, engine, stored.told(answer, stored.RESPONSE_ID))
        if job.accepted is not None:
            self._note_stored(job, engine, job.accepted.conversation)

    def _learn_conversation(self, job: Job, engine: str, answer: bytes) -> None:
        self._note_stored(job, engine, stored.told(answer, stored.CONVERSATION_ID))

    def _note_stored(self, job: Job, engine: str, name: str | None) -> None:
        if name is not None:
            self._context.stored.note(job.own_id(name), engine, self._context.clock.now())

    async def _found(self, job: Job, response: str, own_id: str) -> str | None:
        """Ask for a response that another process saw, or this one before it started.

        Engines do not know whose their responses are, so where they belong to tenants only the
        router's processes are asked. Only a few such questions are under way at once: ids are the
        clients' to choose.
        """
        path = stored.path_of(response)
        if path is None:
            return None
        async with self._asking:
            name = None if self._ask_others is None else await self._ask_others(own_id)
            ready = self._context.fleet.ready()
            if name is not None or own_id != response or len(ready) < 2:
                return name
            found = await asyncio.gather(*(self._has(job, e, path) for e in ready))
        return next((e.name for e, has in zip(ready, found, strict=True) if has), None)

    async def _has(self, job: Job, engine: Engine, path: str) -> bool:
        key = self._key_for_engine(job.request)
        headers = {**key, "Accept-Encoding": "identity"}
        if not key and "authorization" in job.request.names:
            headers["Authorization"] = job.request.names["authorization"]
        try:
            url = URL(engine.worker.url + path, encoded=True)
            pool = self._context.pool
            status, _ = await pool.get(url, headers, most=0, within_s=_ASK_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError):
            return False
        return status == 200

    def _own_path(self, answer: Answer, engine: str) -> str | None:
        """Return where on the same engine a redirect leads, ``None`` if elsewhere or nowhere."""
        found = self._context.fleet.engines.get(engine)
        said = answer.header(b"location")
        if found is None or not said:
            return None
        target = said.removeprefix(found.worker.url.rstrip("/"))
        return target if target.startswith("/") and target[1:2] not in ("/", "\\") else None

    def _key_for_engine(self, request: Request) -> dict[str, str]:
        """Return the headers that show an engine a key: vLLM knows bearers only."""
        names, key = request.names, self._engine_key
        if key is None:
            shown = KEY_HEADER in names and "authorization" not in names
            return {"authorization": f"Bearer {names[KEY_HEADER]}"} if shown else {}
        replaced = {"authorization": f"Bearer {key}"}
        return {**replaced, KEY_HEADER: key} if KEY_HEADER in names else replaced

    def _learn(self, job: Job) -> None:
        accepted, result = job.accepted, job.result
        if accepted is not None and result.prompt_tokens and not accepted.prompt.ids:
            model, chars = accepted.call.model, accepted.prompt.chars
            self._context.ratios.learn(model, chars, result.prompt_tokens)


_Written = TypeVar("_Written")


async def _written(make: Callable[..., _Written], body: bytes, *more: object) -> _Written:
    """Return another body made of ``body``, which may be long."""
    return await aside(make, body, *more) if len(body) > LARGE_BYTES else make(body, *more)


def _not_there(text: str) -> BadRequest:
    return BadRequest(text, status=404, param="response_id")


def _creates_conversation(request: Request) -> bool:
    return request.method == "POST" and request.path.rstrip("/") == stored.CONVERSATIONS


def _was_not_begun(failure: EngineFailed) -> bool:
    """Whether an engine certainly did not begin a call."""
    return failure.reason is Outcome.BUSY or isinstance(failure.__cause__, CannotConnect)


def _is_stream(answer: Answer) -> bool:
    kind = answer.header(b"content-type").partition(";")[0]
    return kind.strip().lower() == "text/event-stream"


async def _said(answer: Answer) -> bytes:
    """Return the body of an engine's refusal, or nothing if it is long or late."""
    try:
        return await in_time(answer.body(_MOST_SAID_BYTES), _PATIENCE_S) or b""
    except (OSError, asyncio.TimeoutError):
        return b""


def _refused_by_engine(answer: Answer, said: bytes, address: str) -> EngineFailed:
    """Return the error for an answer that another engine may better; logs get a clue."""
    dead = _DEAD.search(said) is not None
    usual = answer.status in (429, 503) and not dead and b"Traceback" not in said
    level = logging.DEBUG if usual else logging.WARNING
    what = errors.clue(said)
    _LOG.log(level, "engine refused engine_url=%s status=%d said=%r", address, answer.status, what)
    if answer.status in (429, 503) and not dead:
        wait = answer.header(b"retry-after")
        return EngineFailed(
            Outcome.BUSY,
            status=answer.status,
            retry_after_s=float(wait) if wait.isdecimal() and len(wait) < 6 else 1.0,
            retryable=True,
        )
    return EngineFailed(Outcome.ERROR, retryable=True)
