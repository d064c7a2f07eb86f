"""Sends the requests of batches: as many at once as nobody else needs room for.

Of all processes that share a store one sends. A batch goes on where it was: what has an answer is
never sent again, what was in flight when a process died is sent once more.

How many calls are in flight is found out by trying, as TCP does: the window doubles as long as
all goes well, halves when a call is refused (429, 503), and then grows by one for each window of
answers. A refusal also stops all sending for as long as ``Retry-After`` says. Nothing new is sent
while calls of others wait for room.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sqlite3
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from hexgen_vllm.batches.lines import (
    MAX_ERRORS,
    BatchRequest,
    Serves,
    WrongLine,
    answered,
    check_url,
    parse,
    unanswered,
)
from hexgen_vllm.batches.store import Answered, BatchJob, Disk
from hexgen_vllm.clock import SystemClock, unix_s
from hexgen_vllm.errors import error_object
from hexgen_vllm.tasks import woken

_LOG = logging.getLogger(__name__)
_CLOCK: Final = SystemClock()
OUTCOMES: Final = ("completed", "failed", "repeated")
"""What can become of a request: answered well, not well, or sent once more."""

_LOOK_S: Final = 0.5
_SWEEP_S: Final = 60.0
_AGAIN_S: Final = 5.0  # after a failure of the disk
_TICK_S: Final = 0.02  # between looks whether there is room
_FIRST_WINDOW: Final = 8.0
_PAGE_BYTES: Final = 2**18  # of a file, looked through at once: a few ms
_PAGE_LINES: Final = 256
_ENVELOPE_BYTES: Final = 2**16  # of a line around its body
_ACTIVE: Final = 32  # batches that are read at once
_OF_ONE: Final = 4  # of them of one tenant
_REFUSALS: Final = frozenset((429, 503))
_FAILURES: Final = frozenset((408, 499, 500, 502, 504))
_MAX_FAILURES: Final = 5
_FIRST_WAIT_S: Final = 0.25
_LONGEST_WAIT_S: Final = 30.0
_SUSPECT: Final = 2  # engines lost, after which a request is sent while no other one is
_LOST: Final = (b'"engine-lost"', b'"connection_lost"')  # codes that say so
_DEATHS: Final = 5  # of the process while a request was in flight, until it is given up
_CLOSE_S: Final = 5.0


class LineAnswer(NamedTuple):
    """What came back.

    Attributes:
        status: of HTTP.
        body: of the answer.
        request_id: of the answer.
        retry_after_s: as the answer says, ``None`` if it does not.
    """

    status: int
    body: bytes
    request_id: str
    retry_after_s: float | None = None

    @classmethod
    def of(
        cls, status: int, headers: Mapping[bytes, bytes], body: bytes, request_id: str
    ) -> LineAnswer:
        """Return an answer with these headers, by lower-case name, to a request of that id."""
        wait = headers.get(b"retry-after", b"").decode("latin-1")
        said = headers.get(b"x-request-id", b"").decode("latin-1")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else None
        return cls(status, body, said or request_id, seconds)


class BatchSender(Protocol):
    """What sends a request of a batch, as a call that nobody waits for."""

    async def send(self, batch: BatchJob, request: BatchRequest, request_id: str) -> LineAnswer:
        """Return the answer to a request.

        Raises:
            OSError: it broke off.
        """
        ...

    def has_room(self, in_flight: int) -> bool:
        """Whether a call beside ``in_flight`` ones of batches would keep nobody else waiting."""
        ...

    def most(self) -> int:
        """Return how many calls may be in flight at most."""
        ...


class SendWindow:
    """How many calls are in flight at once.

    Args:
        sender: knows whether there is room.

    Attributes:
        limit: calls that may be in flight.
        in_flight: calls that are.
    """

    def __init__(self, sender: BatchSender) -> None:
        self.limit, self.in_flight = _FIRST_WINDOW, 0
        self._sender = sender
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._doubles = True
        self._paused_until_s = self._cut_s = 0.0

    async def enter(self) -> None:
        """Wait until one more call may be sent; who asks first goes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.look()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Note the end of a call."""
        self.in_flight -= 1
        self.look()

    def look(self) -> None:
        """Let in who may go; called when something changed, and from time to time."""
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
                continue
            full = self.in_flight >= min(int(self.limit), max(self._sender.most(), 1))
            if full or self.paused_s() > 0.0 or not self._sender.has_room(self.in_flight):
                return
            self.in_flight += 1
            self._waiting.popleft().set_result(None)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def paused_s(self) -> float:
        """Return for how long nothing may be sent, seconds."""
        return max(self._paused_until_s - _CLOCK.now(), 0.0)

    def answered(self) -> None:
        """Note an answer; if the window was in use, it may grow."""
        if self.in_flight >= int(self.limit) // 2:
            grown = self.limit + (1.0 if self._doubles else 1.0 / self.limit)
            self.limit = min(grown, float(max(self._sender.most(), 1)))

    def refused(self, wait_s: float) -> None:
        """Note a refusal: send half as much, and nothing for ``wait_s``; at most once a second."""
        now = _CLOCK.now()
        self._paused_until_s = max(self._paused_until_s, now + wait_s)
        if now - self._cut_s > 1.0:
            self._cut_s, self._doubles = now, False
            self.limit = max(self.limit / 2.0, 1.0)


class _Turns:
    """Who may send: many together, or one alone, for whom the others wait."""

    def __init__(self) -> None:
        self._sending = self._wanted = 0
        self._alone = False
        self._waiting: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Send beside others."""
        await self._until(lambda: not self._wanted)
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1
            self._wake()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Send when nobody else does."""
        self._wanted += 1
        try:
            await self._until(lambda: not (self._sending or self._alone))
            self._alone = True
            try:
                yield
            finally:
                self._alone = False
        finally:
            self._wanted -= 1
            self._wake()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class _Writer:
    """Commits what many calls want written down, all that waits at once."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._waiting: list[tuple[Answered | tuple[str, int], asyncio.Future[None]]] = []
        self._wanted = asyncio.Event()

    async def add(self, what: Answered | tuple[str, int]) -> None:
        """Return when an answer, or the beginning of a request, is on disk."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((what, future))
        self._wanted.set()
        await future

    async def run(self) -> None:
        """Write, again and again; what cannot be written now is tried again."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            taken, self._waiting = self._waiting, []
            found = [one for one, _ in taken if isinstance(one, Answered)]
            begun = [one for one, _ in taken if not isinstance(one, Answered)]
            while True:
                try:
                    await self._disk.do(self._write, found, begun)
                    break
                except (OSError, sqlite3.Error) as error:
                    _LOG.error("answers of batches cannot be written: %s", error)
                    await asyncio.sleep(_AGAIN_S)
            for _, future in taken:
                if not future.done():
                    future.set_result(None)

    def _write(self, found: list[Answered], begun: list[tuple[str, int]]) -> None:
        store = self._disk.store
        if found:
            store.add_answers(found)
        for batch in {batch for batch, _ in begun}:
            store.begin(batch, [line for of, line in begun if of == batch])


class Runner:
    """Runs all batches of a store.

    Args:
        disk: with the store.
        sender: sends requests.
        serves: whether a path takes batches.
        dies_with: the process that sends is the one that a request may bring down, so that one
            which was there each time is given up.

    Attributes:
        window: calls in flight.
        counts: requests by what became of them, since the start.
    """

    def __init__(
        self, disk: Disk, sender: BatchSender, serves: Serves, *, dies_with: bool = False
    ) -> None:
        self._disk, self._sender, self._serves = disk, sender, serves
        self._dies_with = dies_with
        self.window = SendWindow(sender)
        self.counts = Counter(dict.fromkeys(OUTCOMES, 0))
        self._writer = _Writer(disk)
        self._works: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._woken = asyncio.Event()
        self._turns = _Turns()
        self._swept_s = 0.0
        self.leads = False

    def wake(self) -> None:
        """Look at the store now: a batch has come, or shall end."""
        self._woken.set()

    async def run(self) -> None:
        """Run batches until cancelled; what is in flight then is sent again by whoever is next."""
        helpers = [asyncio.create_task(self._writer.run()), asyncio.create_task(self._tick())]
        try:
            while True:
                try:
                    await self._look()
                except (OSError, sqlite3.Error) as error:
                    _LOG.error("batches cannot be read: %s", error)
                await woken(self._woken, _LOOK_S)
        finally:
            tasks = [*self._works.values(), *helpers]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CLOSE_S)
            if self.leads and self._dies_with:  # it ends in order: no request is to blame
                await self._disk.do(self._disk.store.forget_begun)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S if self.window.wanted else 5 * _TICK_S)
            self.window.look()

    async def _look(self) -> None:
        store = self._disk.store
        if not self.leads:
            self.leads = await self._disk.do(store.lead)
            if not self.leads:
                return
            _LOG.info("runs the batches")
        now = _CLOCK.now()
        if now - self._swept_s >= _SWEEP_S:
            self._swept_s = now
            await self._disk.do(store.sweep)
        for name in [name for name, task in self._works.items() if task.done()]:
            del self._works[name], self._ends[name]
        found = await self._disk.do(store.open_batches)
        active = Counter(batch.owner for batch in found if batch.id in self._works)
        for batch in found:
            few = len(self._works) < _ACTIVE and active[batch.owner] < _OF_ONE
            if batch.id not in self._works and (few or batch.cancelled):
                active[batch.owner] += 1
                self._ends[batch.id] = asyncio.Event()
                self._works[batch.id] = asyncio.create_task(self._work(batch))
            if batch.cancelled and batch.id in self._ends:
                self._ends[batch.id].set()

    async def _work(self, batch: BatchJob) -> None:
        """Bring one batch to its end."""
        try:
            if batch.status == "validating":
                await self._validate(batch)
            if batch.status in ("in_progress", "finalizing"):
                await self._finish(batch, await self._answers(batch))
        except FileNotFoundError:
            await self._fail(batch, [_error("input_file_gone", "The input file is not there.")])
        except (OSError, sqlite3.Error) as error:
            _LOG.error("batch waits for the disk batch=%s: %s", batch.id, error)
            await asyncio.sleep(_AGAIN_S)
        except Exception:  # whatever it was, no answer must get lost: it is tried again
            _LOG.exception("batch was interrupted batch=%s", batch.id)
            await asyncio.sleep(_AGAIN_S)
        self.wake()

    # Validation

    async def _validate(self, batch: BatchJob) -> None:
        wrong, seen = _Wrong(), set[str]()
        total = 0
        async for page in self._pages(batch):
            if self._ends[batch.id].is_set():
                break
            total += len(page)
            await self._disk.with_file(self._check, batch, page, seen, wrong)
            if total > self._disk.store.limits.max_requests:
                text = f"A batch must have at most {self._disk.store.limits.max_requests} requests."
                return await self._fail(batch, [_error("too_many_requests", text)])
        if self._ends[batch.id].is_set() and not wrong.errors:
            batch.total = 0
            return await self._finish(batch, "cancelled")
        if not total:
            return await self._fail(batch, [_error("empty_file", "The file has no requests.")])
        if wrong.errors:
            return await self._fail(batch, wrong.told())
        batch.total, batch.status = total, "in_progress"
        await self._disk.do(self._disk.store.save, batch)
        return None

    def _check(
        self, batch: BatchJob, page: list[tuple[int, bytes]], seen: set[str], wrong: _Wrong
    ) -> None:
        for number, text in page:
            try:
                request = self._parse(number, text)
                check_url(request, batch.endpoint, self._serves)
                if request.custom_id in seen:
                    said = "The custom_id of this request is that of an earlier one."
                    raise WrongLine("duplicate_custom_id", said, "custom_id")
                seen.add(request.custom_id)
            except WrongLine as error:
                wrong.add(error.told(number))

    def _parse(self, number: int, text: bytes) -> BatchRequest:
        return parse(number, text, self._disk.store.limits.max_body_bytes)

    async def _fail(self, batch: BatchJob, errors: list[dict[str, Any]]) -> None:
        batch.status, batch.errors = "failed", errors
        await self._disk.do(self._disk.store.save, batch)
        _LOG.warning("batch failed batch=%s errors=%d", batch.id, len(errors))

    # Requests

    async def _pages(self, batch: BatchJob) -> AsyncIterator[list[tuple[int, bytes]]]:
        """Yield the lines of the input, numbered from 1, without empty ones."""
        store = self._disk.store
        most = store.limits.max_body_bytes + _ENVELOPE_BYTES
        file: Any = await self._disk.with_file(store.path(batch.input_file).open, "rb")
        try:
            pages = _pages(file, most)
            while page := await self._disk.with_file(next, pages, None):
                yield page
        finally:
            file.close()

    async def _answers(self, batch: BatchJob) -> str:
        """Get all requests of a batch answered; return the status that it ends with."""
        left_s = batch.expires - unix_s()
        sending = asyncio.create_task(self._send_all(batch))
        ending = asyncio.create_task(self._ends[batch.id].wait())
        try:
            await asyncio.wait(
                (sending, ending), timeout=max(left_s, 0.0), return_when=asyncio.FIRST_COMPLETED
            )
            if sending.done():
                sending.result()
                return "completed"
        finally:
            ending.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        if self._ends[batch.id].is_set():
            left = await self._give_up(batch, "batch_cancelled", "The batch was cancelled.")
            return "cancelled" if left else "completed"
        text = "This request could not be executed before the completion window expired."
        left = await self._give_up(batch, "batch_expired", text)
        return "expired" if left else "completed"

    async def _send_all(self, batch: BatchJob) -> None:
        store = self._disk.store
        done = await self._disk.do(store.answered_lines, batch.id)
        deaths = await self._disk.do(store.tries, batch.id) if self._dies_with else {}
        tasks: set[asyncio.Task[None]] = set()
        broken: list[BaseException] = []

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            self.window.leave()  # also of a task that was cancelled before it began
            error = None if task.cancelled() else task.exception()
            if error is not None:
                broken.append(error)

        try:
            # What was there at two deaths goes alone, so that the next ones convict nobody else.
            for least in (2, 0) if deaths else (0,):
                async for page in self._pages(batch):
                    for number, text in page:
                        seen = deaths.get(number, 0)
                        if number in done or seen < least:
                            continue
                        done.add(number)
                        await self.window.enter()
                        work = self._one(batch, self._parse(number, text), seen)
                        task = asyncio.create_task(work)
                        tasks.add(task)
                        task.add_done_callback(ended)
                        if least:
                            await task
            while tasks:
                await asyncio.wait(list(tasks))
            if broken:
                raise broken[0]
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(list(tasks), timeout=_CLOSE_S)

    async def _one(self, batch: BatchJob, request: BatchRequest, deaths: int) -> None:
        """Get one request answered, and write the answer down."""
        line_id = f"batch_req_{batch.id.removeprefix('batch_')}_{request.number}"
        ok = False
        if deaths >= _DEATHS:
            text = "The engine died each time that it had this request."
            record = unanswered(line_id, request.custom_id, "engine_died", text)
        else:
            if self._dies_with:
                await self._writer.add((batch.id, request.number))
            answer = await self._answer(batch, request)
            ok = 200 <= answer.status < 300
            said = (answer.status, answer.request_id, answer.body)
            record = answered(line_id, request.custom_id, *said)
        await self._writer.add(Answered(batch.id, request.number, ok, record))
        self.counts["completed" if ok else "failed"] += 1

    async def _answer(self, batch: BatchJob, request: BatchRequest) -> LineAnswer:
        """Return the answer that stands: refusals are repeated, failures a few times."""
        request_id = f"{batch.id}-{request.number}"
        failures, lost, wait_s = 0, 0, _FIRST_WAIT_S
        while True:
            try:
                # One that brings engines down takes those with it that are there at the time.
                async with self._turns.alone() if lost >= _SUSPECT else self._turns.shared():
                    answer = await self._sender.send(batch, request, request_id)
            except OSError:
                answer = LineAnswer(502, _BROKEN, request_id)
            except Exception:
                _LOG.exception("request failed batch=%s line=%d", batch.id, request.number)
                answer = LineAnswer(500, _BROKEN, request_id)
            if answer.status in _REFUSALS:
                self.window.refused(answer.retry_after_s or wait_s)
            elif answer.status in _FAILURES and failures + 1 < _MAX_FAILURES:
                failures += 1
                lost += any(code in answer.body for code in _LOST)
            else:
                self.window.answered()
                return answer
            self.counts["repeated"] += 1
            longest = max(wait_s, self.window.paused_s(), answer.retry_after_s or 0.0)
            await asyncio.sleep(longest * random.uniform(1.0, 1.25))
            wait_s = min(2.0 * wait_s, _LONGEST_WAIT_S)

    async def _give_up(self, batch: BatchJob, code: str, message: str) -> int:
        """Write down that all other requests get no answer; return how many have been."""
        store, left = self._disk.store, 0
        done = await self._disk.do(store.answered_lines, batch.id)
        async for page in self._pages(batch):
            found = []
            for number, text in page:
                if number not in done:
                    line_id = f"batch_req_{batch.id.removeprefix('batch_')}_{number}"
                    custom_id = self._parse(number, text).custom_id
                    record = unanswered(line_id, custom_id, code, message)
                    found.append(Answered(batch.id, number, False, record))
            await self._disk.do(store.add_answers, found)
            left += len(found)
        return left

    async def _finish(self, batch: BatchJob, status: str) -> None:
        store = self._disk.store
        if status == "completed" and batch.status != "finalizing":
            batch.status = "finalizing"
            await self._disk.do(store.save, batch)
        steps = iter(store.finish(batch, status))
        while await self._disk.do(next, steps, _NO_MORE) is not _NO_MORE:
            pass
        _LOG.info("batch ended batch=%s status=%s requests=%d", batch.id, status, batch.total)


_NO_MORE: Final = object()
_BROKEN: Final = json.dumps(
    error_object("The connection broke off.", 500, code="connection_lost")
).encode()


class _Wrong:
    """What is wrong with an input: the first lines of it, and how many there are."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []
        self._more = 0

    def add(self, error: dict[str, Any]) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)
        else:
            self._more += 1

    def told(self) -> list[dict[str, Any]]:
        if not self._more:
            return self.errors
        return [*self.errors, _error("too_many_errors", f"{self._more} more lines are wrong.")]


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": None, "message": message, "param": None}


def _pages(file: BinaryIO, most: int) -> Iterator[list[tuple[int, bytes]]]:
    """Yield lines that are not empty, with their numbers, a few at once; longer ones are cut."""
    found: list[tuple[int, bytes]] = []
    size = 0
    for number, text in enumerate(_lines(file, most), 1):
        stripped = text.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else text.strip()
        if stripped:
            found.append((number, stripped))
            size += len(text)
        if size >= _PAGE_BYTES or len(found) >= _PAGE_LINES:
            yield found
            found, size = [], 0
    if found:
        yield found


def _lines(file: BinaryIO, most: int) -> Iterable[bytes]:
    while line := file.readline(most):
        if len(line) == most and not line.endswith(b"\n"):  # no request: nobody needs the rest
            while (rest := file.readline(most)) and not rest.endswith(b"\n"):
                pass
        yield line
