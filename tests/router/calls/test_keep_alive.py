"""Comments to clients that wait: the answer may still come from anywhere."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hexgen_vllm.router.calls.answer import StreamPass
from hexgen_vllm.router.endpoints import ENDPOINTS
from hexgen_vllm.router.engines.watch import MAX_EVENT_BYTES
from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand

COMMENT = b": keep-alive\n\n"


async def waiting(stand: Stand, clock: ManualClock, path: str = CHAT) -> Any:
    """Return a streamed call that has got two comments."""
    task = asyncio.ensure_future(stand.post(path, stream=True, max_tokens=3).__aenter__())
    await stand.until(stand.received)
    for _ in range(2):
        clock.advance(15.0)
        stand.context.keep_alives.tick(clock.now())
    answer = await task
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert await answer.content.readexactly(2 * len(COMMENT)) == 2 * COMMENT
    return answer


async def test_the_answer_may_come_from_another_engine() -> None:
    clock = ManualClock()
    async with open_stand(
        *[FakeSettings()] * 2, clock=clock, policy="round_robin", sse_keep_alive_interval=15.0
    ) as stand:
        for engine in stand.engines:
            engine.faults.append(Fault("hang"))
        answer = await waiting(stand, clock)
        stuck = next(i for i, engine in enumerate(stand.engines) if engine.received)
        stand.engines[1 - stuck].faults.clear()
        stand.context.guard.engine_lost(f"engine-{stuck}")
        text = await answer.text()
        assert "keep-alive" not in text
        assert text.endswith("data: [DONE]\n\n")
        assert " t2" in text
        assert stand.context.ledger.answered() == 1
        stand.assert_settled()


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_an_error_comes_as_an_event(path: str) -> None:
    clock = ManualClock()
    async with open_stand(clock=clock, sse_keep_alive_interval=15.0, disable_retries=True) as stand:
        stand.engines[0].faults.append(Fault("hang"))
        answer = await waiting(stand, clock, path)
        stand.context.guard.engine_lost("engine-0")
        event = (await answer.text()).strip().splitlines()
        assert len(event) == (2 if path == "/v1/messages" else 1)
        said = json.loads(event[-1].removeprefix("data: "))
        assert said["error"]["code"] == "engine-lost"
        stand.assert_settled()


def tick(stand: Stand, clock: ManualClock, times: int = 1) -> None:
    for _ in range(times):
        clock.advance(15.0)
        stand.context.keep_alives.tick(clock.now())


async def begun(stand: Stand, path: str = CHAT) -> Any:
    """Return a streamed call that has got some of its answer, and that."""
    answer = await stand.post(path, stream=True, max_tokens=9).__aenter__()
    seen = await answer.content.readuntil(b" t1")
    return answer, seen + await answer.content.readuntil(b"\n\n")


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
async def test_a_stream_that_falls_silent_gets_comments_between_its_events(path: str) -> None:
    clock = ManualClock()
    async with open_stand(clock=clock, sse_keep_alive_interval=15.0) as stand:
        async with stand.post(path, stream=True, max_tokens=9) as whole:
            undisturbed = await whole.read()
        stand.engines[0].faults.append(Fault("hang", after=undisturbed.count(b"\n\n") - 4))
        answer, seen = await begun(stand, path)
        await stand.until(lambda: answer.content.total_bytes > 0)
        tick(stand, clock, 3)  # the first one only notes what was sent since
        comments = await answer.content.readuntil(2 * COMMENT)
        assert (seen + comments).count(COMMENT) == 2
        assert undisturbed.startswith((seen + comments).replace(COMMENT, b"")[:200])
        stand.context.guard.end_all()
        rest = (await answer.read()).decode()
        assert COMMENT.decode() not in rest
        assert "error" in rest
        await stand.until(lambda: not stand.context.ledger.open)
        stand.assert_settled()


async def test_a_stream_that_flows_gets_no_comments() -> None:
    clock = ManualClock()
    async with open_stand(
        FakeSettings(step_s=0.01), clock=clock, sse_keep_alive_interval=15.0
    ) as stand:
        answer, seen = await begun(stand)
        for _ in range(3):
            tick(stand, clock)
            seen += await answer.content.readuntil(b"\n\n")
        seen += await answer.read()
        tick(stand, clock, 3)
        assert COMMENT not in seen
        assert seen.endswith(b"data: [DONE]\n\n")


def test_no_comment_stands_within_an_event_or_after_the_last() -> None:
    request: Any = SimpleNamespace(begin=lambda *_: None, send=lambda _: None)
    job: Any = SimpleNamespace(
        request=request, sent=0, kept_alive=False, learn=None, rests=None, accepted=None,
        endpoint=ENDPOINTS[0], ended=lambda *_: None,
    )  # fmt: skip
    slow = False
    attempt: Any = SimpleNamespace(
        answering=False, client_is_slow=lambda: slow, client_reads=lambda: True
    )
    stream = StreamPass(job, attempt, cast(Any, None), [])
    stream._feed(b"data: 1\n\n")
    assert job.rests()
    slow = True
    assert not job.rests()
    slow = False
    stream._feed(b"data: " + b"x" * MAX_EVENT_BYTES)  # too long to be kept until it is whole
    assert not job.rests()
    stream._feed(b"\n\n")
    assert job.rests()
    stream._feed(b"data: [DONE]\n\n")
    assert not job.rests()
