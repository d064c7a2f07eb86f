"""Where an answer begins and ends: comments are no beginning, and a last event is an end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from hexgen_vllm.router.errors import Outcome
from hexgen_vllm.router.observe.ledger import ON_TIME
from hexgen_vllm.testing import ManualClock, fake_answers
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT, Stand, open_stand

PATHS = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages")
NAMED = ("/v1/responses", "/v1/messages")
FILLERS = {
    "comment": b": keep-alive\n\n",
    "bare comment": b":\n\n",
    "comment with CRLF": b": x\r\n\r\n",
    "ping": b'event: ping\ndata: {"type": "ping"}\n\n',
    "ping without a name": b'data: {"type":"ping"}\n\n',
    "empty data": b"data:\n\n",
    "empty data after a space": b"data: \n\n",
    "white space": b"\n",
}
OPENINGS = {
    "role": b'data: {"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    b'"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}\n\n',
    "role without text": b'data: {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n',
    "created": b'event: response.created\ndata: {"response":{"id":"resp_1","output":[]},'
    b'"sequence_number":0,"type":"response.created"}\n\n',
    "start": b'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n',
}


def preceded(monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]) -> None:
    """Let engines send ``pieces`` before what they send else."""
    usual = fake_answers.events

    def events(work: fake_answers.AskedAnswer) -> Iterator[bytes]:
        yield from pieces
        yield from usual(work)

    monkeypatch.setattr(fake_answers, "events", events)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("filler", FILLERS)
async def test_what_is_no_answer_yet_can_be_had_elsewhere(
    monkeypatch: pytest.MonkeyPatch, filler: str, path: str
) -> None:
    preceded(monkeypatch, [FILLERS[filler]] * 3)
    async with open_stand(*[FakeSettings()] * 2, policy="round_robin") as stand:
        stand.engines[0].faults.append(Fault("reset", 3))
        for _ in range(2):
            async with stand.post(path, stream=True, max_tokens=3) as answer:
                text = await answer.text()
            assert answer.headers["x-hexgen-engine"] == "engine-1" or not stand.engines[0].faults
            assert " t2" in text
            assert "error" not in text
        assert stand.context.ledger.retries == {"engine-lost": 1}
        assert stand.context.ledger.answered() == 2
        stand.assert_settled()


@pytest.mark.parametrize("opening", OPENINGS)
async def test_a_role_begins_an_answer_and_is_no_token(
    monkeypatch: pytest.MonkeyPatch, opening: str
) -> None:
    """The client gets it at once; the time to the first token is that of the token."""
    first, token = OPENINGS[opening], b'data: {"text": " tok"}\n\n'
    monkeypatch.setattr(fake_answers, "events", lambda work: iter([first, token]))
    path = {"created": "/v1/responses", "start": "/v1/messages"}.get(opening, CHAT)
    async with open_stand() as stand:
        stand.engines[0].faults.append(Fault("hang", 1))
        answer = await stand.post(path, stream=True).__aenter__()
        assert await answer.content.readexactly(len(first)) == first
        (attempt,) = stand.context.guard.attempts
        assert attempt.begun
        (load,) = stand.context.service.coordinator.engines.values()
        (flight,) = load.in_flight.values()
        assert not flight.started
        answer.close()
        await stand.until(lambda: stand.context.ledger.open == 0)


@pytest.mark.parametrize("filler", ["comment", "ping", "white space"])
async def test_comments_do_not_keep_a_stopped_engine_alive(
    monkeypatch: pytest.MonkeyPatch, filler: str
) -> None:
    """They come for ever; the limits of a silent call hold all the same."""
    clock = ManualClock()
    preceded(monkeypatch, [FILLERS[filler]] * 10**6)
    async with open_stand(
        FakeSettings(step_s=0.001), clock=clock, request_timeout_secs=100.0
    ) as stand:
        call = asyncio.ensure_future(stand.post(stream=True).__aenter__())
        await stand.until(lambda: stand.engines[0].steps > 5)
        for _ in range(12):
            clock.advance(10.0)
            stand.context.tick()
            steps = stand.engines[0].steps
            await stand.until(lambda n=steps: stand.engines[0].steps > n + 3 or call.done())
        answer = await call
        assert answer.status == 504
        assert (await answer.json())["error"]["code"] == "engine-timeout"
        stand.assert_settled()


END_NAMES = {
    CHAT: b"[DONE]",
    "/v1/completions": b"[DONE]",
    "/v1/responses": b"event: response.completed",
    "/v1/messages": b"event: message_stop",
}


async def ask(stand: Stand, path: str, version: str = "1.1", **more: Any) -> Any:
    """Send a call over a connection of its own; return reader and writer."""
    body = json.dumps(stand.body(path, max_tokens=5, ignore_eos=True, **more)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
    writer.write(
        f"POST {path} HTTP/{version}\r\nhost: r\r\ncontent-type: application/json\r\n"
        f"x-hexgen-workflow-id: w\r\nx-hexgen-workflow-final: 1\r\n"
        f"x-hexgen-workflow-deadline-ms: 60000\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return reader, writer


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "closes":
        writer.close()
    elif how == "resets":
        writer.transport.abort()
    else:
        writer.write_eof()


@pytest.mark.parametrize(
    ("path", "how", "version"),
    [
        *((path, "closes", "1.1") for path in PATHS),
        (CHAT, "resets", "1.1"),
        (CHAT, "half-closes", "1.1"),
        (CHAT, "closes", "1.0"),
    ],
)
async def test_a_client_that_closes_after_the_last_event_was_answered(
    path: str, how: str, version: str
) -> None:
    """As SDKs do; the engine ends its answer later."""
    async with open_stand(FakeSettings(step_s=0.05)) as stand:
        reader, writer = await ask(
            stand, path, version, stream=True, stream_options={"include_usage": True}
        )
        await reader.readuntil(END_NAMES[path])
        await reader.readuntil(b"\n\n")
        leave(writer, how)
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.ended == {(stand_name(path), Outcome.ANSWERED): 1}
        assert stand.context.metrics.outcomes.ended == {("default", ON_TIME): 1}
        used = sum(one.output for one in stand.context.metrics.usage._used.values())
        assert used == 5
        assert not stand.engines[0].faults
        stand.assert_settled()
        writer.close()


def stand_name(path: str) -> str:
    return {CHAT: "chat"}.get(path, path.rpartition("/")[2])


async def test_a_client_that_closes_before_the_last_event_was_not() -> None:
    async with open_stand(FakeSettings(step_s=0.05)) as stand:
        reader, writer = await ask(stand, CHAT, stream=True)
        await reader.readuntil(b" t1")
        writer.close()
        await stand.until(lambda: stand.context.ledger.open == 0)
        assert stand.context.ledger.failed() == {"rejected-context-cancelled": 1}
        assert stand.context.metrics.outcomes.ended == {("default", "failed"): 1}


@pytest.mark.parametrize(
    ("path", "kind"),
    [*((path, "close") for path in PATHS), *((CHAT, k) for k in ("reset", "garbage", "half"))],
)
async def test_an_engine_may_break_after_the_last_event(
    monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    """It closes without the end of its chunks, or sends something else."""
    usual = fake_answers.events
    monkeypatch.setattr(
        fake_answers, "events", lambda work: iter([*usual(work), b": never sent\n\n"])
    )
    async with open_stand() as stand:
        work = fake_answers.AskedAnswer(path, "tiny", True, 20, 4, 5, "length", False)
        fault = Fault(kind, len(list(usual(work))))  # type: ignore[arg-type]
        stand.engines[0].faults.append(fault)
        async with stand.post(path, stream=True, max_tokens=5, ignore_eos=True) as answer:
            text = await answer.read()
        assert END_NAMES[path] in text
        assert text.endswith(b"\n\n")
        assert b'"error"' not in text
        assert stand.context.ledger.answered() == 1
        stand.assert_settled()


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_an_engine_that_never_closes_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    clock, usual = ManualClock(), fake_answers.events
    monkeypatch.setattr(fake_answers, "events", lambda work: iter([*usual(work), b": more\n\n"]))
    async with open_stand(clock=clock) as stand:
        work = fake_answers.AskedAnswer(path, "tiny", True, 20, 4, 5, "length", False)
        stand.engines[0].faults.append(Fault("hang", len(list(usual(work)))))
        task = asyncio.ensure_future(
            stand.post(path, stream=True, max_tokens=5, ignore_eos=True).__aenter__()
        )
        answer = await task
        await stand.until(lambda: stand.context.ledger.answered() or _booked(stand))
        for _ in range(3):
            clock.advance(1.0)
            stand.context.tick()
        text = await answer.read()
        assert END_NAMES[path] in text
        assert text.endswith(b"\n\n")
        assert stand.context.ledger.answered() == 1
        stand.assert_settled()


def _booked(stand: Stand) -> bool:
    return any(a.watch and a.watch.complete() for a in stand.context.guard.attempts)


@pytest.mark.parametrize("size", [17_000, 900_000])
@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed", "cancelled"])
async def test_a_long_last_event_is_an_end(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    name = f"response.{kind}"
    content = {
        "response": {"id": "resp_1", "output": "x" * size,
                     "usage": {"input_tokens": 7, "output_tokens": 3}},
        "type": name,
    }  # fmt: skip
    event = f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()
    pieces = [event[i : i + 1448] for i in range(0, len(event), 1448)]
    first = b'event: response.output_text.delta\ndata: {"delta": "a"}\n\n'
    monkeypatch.setattr(fake_answers, "events", lambda work: iter([first, *pieces]))
    async with open_stand() as stand:
        async with stand.post("/v1/responses", stream=True) as answer:
            assert await answer.read() == first + event
        expected = {"failed": "engine-error", "cancelled": "rejected-context-cancelled"}
        assert stand.context.ledger.ended == {
            ("responses", expected.get(kind, Outcome.ANSWERED)): 1
        }
        stand.assert_settled()
