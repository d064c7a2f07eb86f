"""Engines misbehave: what the client sees, where the call goes, and that the book balances."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from hexgen_vllm.testing import ManualClock
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand
from hexgen_vllm.types import EngineState

BREAKING = ("reset", "close", "garbage")


def assert_is_error(content: object, code: str) -> None:
    """It is an OpenAI error object, and says nothing of addresses."""
    assert isinstance(content, dict)
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["code"] == code
    assert "127.0.0.1" not in json.dumps(content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", BREAKING)
@pytest.mark.parametrize("after", [None, 0])
async def test_what_breaks_before_the_first_byte_is_answered_elsewhere(
    stand: Stand, kind: str, after: int | None, stream: bool
) -> None:
    broken = Fault(kind, after)  # type: ignore[arg-type]
    for engine in stand.engines:
        # Twice: a connection that breaks at once is tried again, it may have been idle too long.
        engine.faults.extend((broken, broken))
    first_engine = stand.engines[0]
    first_engine.faults.clear()
    for _ in range(2):
        async with stand.post(stream=stream, max_tokens=3) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert "t2" in text
    assert stand.context.ledger.answered() == 2
    stand.assert_settled()


@pytest.mark.parametrize("kind", [*BREAKING, "cut"])
async def test_a_stream_that_breaks_ends_with_an_error_event(single: Stand, kind: str) -> None:
    single.engines[0].faults.append(Fault(kind, 3))  # type: ignore[arg-type]
    async with single.post(stream=True, max_tokens=9, ignore_eos=True) as answer:
        assert answer.status == 200
        text = await answer.text()
    events = text.split("\n\n")
    assert events.pop() == ""
    assert [f" t{i}" in event for i, event in enumerate(events[1:3])] == [True, True]
    assert len(events) == 4, "a role, two tokens, the error: nothing else, nothing in part"
    assert_is_error(json.loads(events[3].removeprefix("data: ")), "engine-lost")
    assert single.context.ledger.failed() == {"engine-lost": 1}
    single.assert_settled()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_error_events_of_named_streams_have_a_name(single: Stand, path: str) -> None:
    single.engines[0].faults.append(Fault("cut", 2))
    async with single.post(path, stream=True, max_tokens=9) as answer:
        last = (await answer.text()).split("\n\n")[-2]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["type"] == "error"


@pytest.mark.parametrize("kind", BREAKING)
async def test_a_body_that_breaks_is_an_error_object_and_not_sent_again(
    stand: Stand, kind: str
) -> None:
    for engine in stand.engines:
        engine.faults.append(Fault(kind, 1))  # type: ignore[arg-type]
    async with stand.post() as answer:
        assert answer.status == 502
        assert_is_error(await answer.json(), "engine-lost")
    assert len(stand.received()) == 1
    stand.assert_settled()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_refusal_of_one_engine_is_answered_by_another(status: int) -> None:
    async with open_stand(FakeSettings(), FakeSettings(), policy="round_robin") as stand:
        for i in range(2):
            stand.engines[i].faults.append(Fault("status", status=status))
            for _ in range(2):
                async with stand.post() as answer:
                    assert answer.status == 200
        assert sum(stand.context.ledger.retries.values()) == 2
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
        stand.assert_settled()


@pytest.mark.parametrize(
    ("status", "shown", "code"), [(429, 429, "engine-busy"), (503, 503, "engine-busy"),
                                  (500, 502, "engine-error"), (504, 502, "engine-error")]
)  # fmt: skip
async def test_when_all_engines_refuse_the_client_hears_it(
    stand: Stand, status: int, shown: int, code: str
) -> None:
    secret = b"Traceback ... http://127.0.0.1:1234/v1 ..."
    for engine in stand.engines:
        engine.fault = Fault("status", status=status, body=secret, headers=(("Retry-After", "9"),))
    async with stand.post() as answer:
        assert answer.status == shown
        assert_is_error(await answer.json(), code)
        assert answer.headers.get("Retry-After") == ("9" if code == "engine-busy" else None)
    assert len(stand.received()) == 2, "each engine was asked once"
    stand.assert_settled()


async def test_a_redirect_does_not_show_where_the_engine_is(single: Stand) -> None:
    where = (("Location", single.engines[0].url + "/elsewhere"),)
    single.engines[0].fault = Fault("status", status=307, headers=where)
    async with single.client.post(
        single.router.url + CHAT, json=single.body(), allow_redirects=False
    ) as answer:
        assert answer.status == 502
        assert "Location" not in answer.headers
        assert_is_error(await answer.json(), "engine-error")


async def test_without_retries_a_call_is_sent_once() -> None:
    async with open_stand(FakeSettings(), FakeSettings(), disable_retries=True) as stand:
        for engine in stand.engines:
            engine.fault = Fault("status", status=500)
        async with stand.post() as answer:
            assert answer.status == 502
        assert len(stand.received()) == 1


async def test_a_dead_engine_is_left_out_at_once_and_comes_back() -> None:
    async with open_stand(
        FakeSettings(), FakeSettings(), policy="round_robin", health_check_interval_secs=0.02
    ) as stand:
        await stand.engines[0].stop()
        for _ in range(4):
            async with stand.post() as answer:
                assert answer.status == 200
                assert answer.headers["x-hexgen-engine"] == "engine-1"
        assert stand.state(0) is EngineState.DOWN
        await stand.engines[0].start()
        await stand.all_ready()
        seen = set()
        for _ in range(4):
            async with stand.post() as answer:
                seen.add(answer.headers["x-hexgen-engine"])
        assert seen == {"engine-0", "engine-1"}
        stand.assert_settled()


async def test_with_all_engines_dead_calls_are_refused(stand: Stand) -> None:
    for engine in stand.engines:
        await engine.stop()
    for _ in range(3):
        async with stand.post() as answer:
            assert answer.status in (502, 503)
            content = await answer.json()
            assert_is_error(content, content["error"]["code"])
    async with stand.post() as answer:
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
    async with stand.get("/readiness") as answer:
        assert answer.status == 503
    stand.assert_settled()


@pytest.mark.parametrize("kind", ["reset", "close"])
async def test_a_connection_that_was_idle_too_long_is_no_failure(single: Stand, kind: str) -> None:
    """It breaks before the first byte: the call goes out once more, to the same engine."""
    async with single.post() as answer:
        await answer.read()
    single.engines[0].faults.append(Fault(kind))  # type: ignore[arg-type]
    async with single.post() as answer:
        assert answer.status == 200
    assert len(single.received()) == 3
    assert single.state(0) is EngineState.READY
    assert not single.context.ledger.retries


async def test_an_engine_that_nobody_calls_is_missed_too() -> None:
    """One refused connection is enough, whatever the threshold for checks that fail."""
    async with open_stand(FakeSettings(), health_failure_threshold=10**6) as stand:
        await stand.engines[0].stop()
        await stand.until(lambda: stand.state(0) is EngineState.DOWN)


async def test_a_failing_health_check_takes_an_engine_down(stand: Stand) -> None:
    stand.engines[0].healthy = False
    await stand.until(lambda: stand.state(0) is EngineState.DOWN)
    for _ in range(3):
        async with stand.post() as answer:
            assert answer.headers["x-hexgen-engine"] == "engine-1"
    stand.engines[0].healthy = True
    await stand.all_ready()


async def test_calls_without_an_answer_leave_an_engine_that_goes_down(stand: Stand) -> None:
    for engine in stand.engines:
        engine.faults.append(Fault("hang"))
    answer = asyncio.ensure_future(stand.post(max_tokens=3).__aenter__())
    await stand.until(stand.received)
    stuck = next(engine for engine in stand.engines if engine.received)
    other = next(engine for engine in stand.engines if engine is not stuck)
    other.faults.clear()
    stuck.healthy = False
    assert (await answer).status == 200
    assert other.received
    answer.result().close()
    stand.assert_settled()


async def test_silence_ends_a_call() -> None:
    clock = ManualClock()
    async with open_stand(
        FakeSettings(), clock=clock, request_timeout_secs=60.0, stream_stall_timeout_secs=10.0
    ) as stand:
        stand.engines[0].faults.extend((Fault("hang"), Fault("hang", 2)))
        task = asyncio.ensure_future(stand.post().__aenter__())
        await stand.until(stand.received)  # or the next call would meet its fault
        for _ in range(7):
            stand.context.guard.tick(clock.now())
            clock.advance(9.0)
        assert not task.done()
        stand.context.guard.tick(clock.now())
        answer = await task
        assert answer.status == 504
        assert_is_error(await answer.json(), "engine-timeout")
        async with stand.post(stream=True) as streamed:
            assert (await streamed.content.readuntil(b"\n\n")).startswith(b"data: ")
            stand.context.guard.tick(clock.now())
            clock.advance(11.0)
            stand.context.guard.tick(clock.now())
            last = (await streamed.content.read()).split(b"\n\n")[-2]
            assert_is_error(json.loads(last.removeprefix(b"data: ")), "engine-timeout")
        stand.assert_settled()


async def test_a_client_that_leaves_ends_the_work_at_the_engine(single: Stand) -> None:
    engine = single.engines[0]
    engine.faults.extend((Fault("hang"), Fault("hang", 2)))
    for stream in (False, True):
        task = asyncio.ensure_future(single.post(stream=stream).__aenter__())
        await single.until(lambda: single.context.guard.attempts)
        await single.until(single.received)
        if stream:
            (await task).close()
        else:
            task.cancel()
        await single.until(lambda: not single.context.guard.attempts)
        engine.received.clear()
    await single.until(lambda: engine.aborted == 2)
    assert single.context.ledger.failed() == {"rejected-context-cancelled": 2}
    single.assert_settled()


async def test_an_engines_own_error_event_is_passed_on_and_counted(single: Stand) -> None:
    event = b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n'
    headers = (("Content-Type", "text/event-stream"),)
    single.engines[0].faults.append(Fault("status", status=200, body=event, headers=headers))
    async with single.post(stream=True) as answer:
        assert await answer.read() == event
    assert single.context.ledger.failed() == {"engine-error": 1}
    single.assert_settled()


async def test_a_slow_reader_gets_everything(single: Stand) -> None:
    """More than all buffers hold, read late: nothing is lost and nothing is reordered."""
    async with single.post(stream=True, max_tokens=15_000, ignore_eos=True) as answer:
        await asyncio.sleep(0.05)
        text = await answer.text()
    assert text.count("data: ") == 15_002
    said = [json.loads(line[6:]) for line in text.split("\n\n")[1:-2]]
    words = "".join(one["choices"][0]["delta"]["content"] for one in said)
    assert words == "".join(f" t{i}" for i in range(15_000))
    single.assert_settled()


async def test_a_client_that_never_reads_is_cut_off() -> None:
    clock = ManualClock()
    async with open_stand(FakeSettings(), clock=clock) as stand:
        answer = await stand.post(stream=True, max_tokens=10**6, ignore_eos=True).__aenter__()
        (attempt,) = stand.context.guard.attempts
        await stand.until(attempt.client_is_slow)
        progress = -1
        while progress != attempt.progress:  # until no buffer takes any more
            progress = attempt.progress
            await asyncio.sleep(0.05)
        stand.context.guard.tick(clock.now())
        clock.advance(10_000.0)
        stand.context.guard.tick(clock.now())
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 1}
