"""What engines send: streams in any pieces arrive exactly, garbage ends in an error object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.router.endpoints import ENDPOINTS, Endpoint
from hexgen_vllm.router.engines import telemetry
from hexgen_vllm.router.engines.watch import StreamWatch
from tests.router.fuzz.budget import budget
from tests.router.fuzz.engine import chunked, whole
from tests.router.fuzz.live import CHAT, Answer, Live

pytestmark = pytest.mark.slow

TEXT = st.text(max_size=12) | st.sampled_from(
    ("data: [DONE]", '"usage": {', "\n\n", '{"error"', "\\")
)
EVENTS = st.lists(
    st.builds(
        lambda text, usage: {"choices": [{"delta": {"content": text}}], **usage},
        TEXT,
        st.just({}) | st.just({"usage": {"prompt_tokens": 5, "completion_tokens": 7}}),
    ).map(lambda e: b"data: " + json.dumps(e).encode() + b"\n\n"),
    max_size=12,
)
DONE = b"data: [DONE]\n\n"
BODY = json.dumps({"model": "tiny", "stream": True, "messages": []}).encode()


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Draw a way to cut ``data`` into pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip((0, *cuts), (*cuts, len(data)), strict=True)]


def ask(live: Live, script: Sequence[bytes], *, hang_up: bool = False) -> list[Answer]:
    """Return what a client sees of an engine's ``script``."""
    live.engine.script, live.engine.hang_up = script, hang_up
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(BODY)}"
    try:
        return live.exchange(head.encode() + b"\r\n\r\n" + BODY)
    finally:
        live.heal()


@budget(200)
@given(events=EVENTS, data=st.data())
def test_streams_arrive_exactly_however_they_are_cut(
    live: Live, events: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(events) + DONE
    pieces = data.draw(cut(stream))
    wire = b"".join(chunked(pieces))
    (answer,) = ask(live, data.draw(cut(wire)))
    assert (answer.status, answer.body) == (200, stream)
    live.assert_well()


@budget(150)
@given(events=EVENTS, data=st.data())
def test_streams_that_break_off_end_with_an_error(
    live: Live, events: list[bytes], data: st.DataObject
) -> None:
    """After whole events only; and with a status when there were none."""
    wire = b"".join(chunked([*events, DONE]))
    end = data.draw(st.integers(0, len(wire) - len(b"0\r\n\r\n") - len(DONE) - 3))
    (answer,) = ask(live, data.draw(cut(wire[:end])), hang_up=True)
    if answer.status == 200:
        *sent, last = answer.body.split(b"\n\n")[:-1]
        assert b"".join(e + b"\n\n" for e in sent) in b"".join(events)
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine-lost"
    else:
        assert answer.status == 502
        assert json.loads(answer.body)["error"]["code"] == "engine-lost"
    revive(live)


OK = b"HTTP/1.1 200 OK\r\n"
BEGINNINGS = (
    b"",
    b"HTTP/1.1 ",
    b"HTTP/1.1 99 ",
    OK,
    OK + b"Content-Length: 5\r\n\r\n",
    OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    OK + b"Content-Type: application/json\r\n\r\n",
    OK + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: ",
    b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nRetry-After: ",
)


@budget(100)
@given(prefix=st.sampled_from(BEGINNINGS), garbage=st.binary(max_size=200))
def test_engines_that_send_garbage(live: Live, prefix: bytes, garbage: bytes) -> None:
    answers = ask(live, (prefix, garbage), hang_up=True)
    for answer in answers:
        assert answer.status != 500
        assert str(live.engine.port).encode() not in answer.body
    revive(live)


def revive(live: Live) -> None:
    """Wait until the router believes in the engine again: what is tested is not its doubt."""

    async def believed() -> None:
        while not live.router.context.ready:
            await asyncio.sleep(0.01)

    live.run(believed())
    live.assert_well()


@budget(300)
@given(endpoint=st.sampled_from(ENDPOINTS), data=st.data(), raw=st.binary(max_size=300))
def test_the_watch_loses_no_byte(endpoint: Endpoint, data: st.DataObject, raw: bytes) -> None:
    once, watch = StreamWatch(endpoint), StreamWatch(endpoint)
    seams = raw.replace(b"\x00", b"\n\n").replace(b"\x01", b"\ndata:")
    expected = once.feed(seams) + once.rest
    got = b"".join(watch.feed(piece) for piece in data.draw(cut(seams)) if piece)
    assert got + watch.rest == expected == seams
    assert watch.events == once.events
    assert watch.usage() == once.usage()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(("cost", "c0", "p1", "running", "kv_usage", "preemptions", "steps",
                         "vllm_config", "scheduler_config", "policy", "max_num_seqs", "ranks")),
        inner, max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@budget(300)
@given(
    stats=st.dictionaries(st.text(max_size=9), JSON, max_size=5) | JSON, text=st.text(max_size=200)
)
def test_what_engines_report_is_read_or_unknown(stats: object, text: str) -> None:
    if isinstance(stats, dict):
        for found in telemetry.from_stats(stats):
            assert found.max_num_seqs is None or found.max_num_seqs > 0
    telemetry.scheduling(stats)
    page = f'vllm:num_requests_running{{engine="{text}"}} {text}\nvllm:kv_cache_usage_perc {text}\n'
    for found in telemetry.from_metrics(page):
        assert found.report.kv_usage is None or 0 <= found.report.kv_usage <= 1


def test_the_engine_of_these_tests_is_understood(live: Live) -> None:
    (answer,) = ask(live, (whole(b'{"a": 1}'),))
    assert (answer.status, answer.body) == (200, b'{"a": 1}')
