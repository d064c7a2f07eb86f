"""Streams are cut after whole events and understood, however the network cuts them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm.router.endpoints import ENDPOINTS, Endpoint
from hexgen_vllm.router.engines import watch
from hexgen_vllm.router.engines.watch import (
    MAX_EVENT_BYTES,
    TAIL_BYTES,
    StreamWatch,
    Usage,
    find_usage,
)
from hexgen_vllm.testing import fake_answers

CHAT, COMPLETIONS, RESPONSES, MESSAGES, _ = ENDPOINTS
GENERATING = ENDPOINTS[:4]


def stream(endpoint: Endpoint, tokens: int = 5, with_usage: bool = True) -> list[bytes]:
    work = fake_answers.AskedAnswer(endpoint.path, "m", True, 20, 4, tokens, "length", with_usage)
    return list(fake_answers.events(work))


def fed(endpoint: Endpoint, pieces: list[bytes]) -> tuple[StreamWatch, list[bytes]]:
    watch = StreamWatch(endpoint)
    return watch, [ready for piece in pieces if (ready := watch.feed(piece))]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({p % (len(data) + 1) for p in places} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


TEXTS = st.lists(st.text(min_size=0, max_size=8), min_size=1, max_size=12)
PLACES = st.lists(st.integers(0, 10_000), max_size=40)
LINE_ENDS = st.sampled_from(["\n", "\r\n"])


@given(
    texts=TEXTS,
    places=PLACES,
    line_end=LINE_ENDS,
    unicode=st.booleans(),
    first=st.sampled_from(["id", "t"]),
)
def test_any_fragmentation_gives_the_same_bytes_and_counts(
    texts: list[str], places: list[int], line_end: str, unicode: bool, first: str
) -> None:
    """Multi-byte characters, CRLF and texts that look like events included."""
    events = [{first: text, "trap": "\n\ndata: [DONE]"} for text in texts]
    blocks = [f"data: {json.dumps(e, ensure_ascii=not unicode)}{line_end * 2}" for e in events]
    data = "".join([*blocks, f"data: [DONE]{line_end * 2}"]).encode("utf-8", "surrogatepass")
    watch, out = fed(CHAT, cut(data, places))
    assert b"".join(out) + watch.rest == data
    assert watch.rest == b""
    end = (line_end * 2).encode()
    assert all(ready.endswith(end) for ready in out)
    assert watch.events == len(texts) + 1
    assert watch.complete()
    before_last = fed(CHAT, cut(data[: -len(end) - 12], places))[0]
    assert not before_last.complete(), "text is not taken for the end"
    assert before_last.events == len(texts)


@pytest.mark.parametrize("endpoint", GENERATING, ids=lambda e: e.name)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_streams_of_every_endpoint_are_understood(endpoint: Endpoint, size: int) -> None:
    data = b"".join(stream(endpoint))
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    watch, out = fed(endpoint, pieces)
    assert b"".join(out) == data
    assert watch.complete()
    assert not watch.failed()
    assert watch.usage() == Usage(20, 4, 5)


@pytest.mark.parametrize("endpoint", GENERATING, ids=lambda e: e.name)
def test_streams_that_lack_their_end_are_incomplete(endpoint: Endpoint) -> None:
    watch, _ = fed(endpoint, stream(endpoint)[:-1])
    assert not watch.complete()


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=lambda e: e.name)
def test_without_usage_events_are_counted(endpoint: Endpoint) -> None:
    watch, _ = fed(endpoint, stream(endpoint, 300, with_usage=False))
    assert watch.usage() == Usage(None, None, 300)


def test_a_long_stream_keeps_only_its_tail() -> None:
    watch, _ = fed(CHAT, stream(CHAT, 5000))
    assert len(watch.tail()) < 20_000
    assert watch.usage().output_tokens == 5000


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    piece = b"x" * 100_000
    watch = StreamWatch(CHAT)
    out = sum(len(watch.feed(piece)) for _ in range(40))
    assert out + len(watch.rest) == 40 * len(piece)
    assert len(watch.rest) < MAX_EVENT_BYTES


@pytest.mark.parametrize(
    "last", [b'data: {"error": {"message": "x"}}\n\n', b"event: error\ndata: {}\n\n"]
)
def test_error_events_of_engines_are_seen(last: bytes) -> None:
    assert fed(CHAT, [*stream(CHAT, 3)[:-1], last])[0].failed()
    said = b'data: {"text": "data: {\\"error\\": 1}\\n\\nevent: error"}\n\n'
    assert not fed(CHAT, [said])[0].failed()


ENDS: dict[str, tuple[Endpoint, bytes, bool]] = {
    "chat": (CHAT, b"data: [DONE]\n\n", False),
    "chat without a space": (CHAT, b"data:[DONE]\n\n", False),
    "chat with CRLF": (CHAT, b"data: [DONE]\r\n\r\n", False),
    "chat error": (
        CHAT, b'data: {"error": {"message": "' + b"x" * 20_000 + b'"}}\n\ndata: [DONE]\n\n', True,
    ),
    "old chat error": (CHAT, b'data: {"object":"error","message":"x"}\n\ndata: [DONE]\n\n', True),
    "message": (MESSAGES, b'event: message_stop\ndata: {"type": "message_stop"}\n\n', False),
    "message without a name": (MESSAGES, b'data: {"type":"message_stop"}\n\n', False),
    **{
        f"{kind}, {size}{', unnamed' * (not named)}": (
            RESPONSES,
            (f"event: response.{kind}\n" if named else "").encode()
            + f'data: {{"type":"response.{kind}","text":"'.encode() + b"x" * size + b'"}\n\n',
            kind == "failed",
        )
        for kind in ("completed", "incomplete", "failed", "cancelled")
        for size in (10, 17_000)
        for named in (True, False)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 1448, 16_383, 10**6])
def test_an_end_is_seen_however_long_and_cut(name: str, size: int) -> None:
    endpoint, end, failed = ENDS[name]
    data = b'data: {"text": "a"}\n\n' + end
    watch, out = fed(endpoint, [data[i : i + size] for i in range(0, len(data), size)])
    assert b"".join(out) == data
    assert watch.complete()
    assert watch.failed() is failed
    half = fed(endpoint, [data[i : i + size] for i in range(0, len(data) - 3, size)][:-1])[0]
    assert not half.complete(), "an event that is not whole is no end"


def test_a_last_event_of_any_length_is_an_end_and_little_of_it_is_kept() -> None:
    """Longer than what is kept: passed on in parts."""
    start = b'event: response.completed\ndata: {"type":"response.completed","text":"'
    usage = b'","usage":{"input_tokens":3,"output_tokens":2}}\n\n'
    data = start + b"x" * 5 * MAX_EVENT_BYTES + usage
    for size in (65_536, 262_144):
        watch = StreamWatch(RESPONSES)
        for i in range(0, len(data), size):
            assert not watch.complete()
            watch.feed(data[i : i + size])
            assert len(watch.tail()) + len(watch.rest) <= 2 * MAX_EVENT_BYTES + size
        assert watch.complete()
        assert watch.events == 1
        assert watch.usage() == Usage(3, None, 2)


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n"])
def test_a_last_line_may_lack_the_line_after_it(end: bytes) -> None:
    watch, _ = fed(CHAT, [b'data: {"text": "a"}\n\n', end])
    assert not watch.complete()
    assert watch.ended() == end
    assert watch.complete()


@given(places=PLACES)
def test_fillers_are_no_events(places: list[int]) -> None:
    fillers = (b": keep-alive\n\n", b":\n\n", b"data:\n\n", b"data: \n\n",
               b'event: ping\ndata: {"type": "ping"}\n\n',
               b'data: {"type":"ping"}\n\n')  # fmt: skip
    data = b"".join(fillers)
    for endpoint in GENERATING:
        watch, out = fed(endpoint, cut(data, places))
        assert b"".join(out) == data
        assert (watch.events, watch.tokens()) == (0, 0)
    whole = fed(MESSAGES, [data])[0]
    assert whole.progress == 0


def usage(**fields: Any) -> bytes:
    return json.dumps({"usage": fields}).encode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (usage(prompt_tokens=5, completion_tokens=2), Usage(5, None, 2)),
        (usage(prompt_tokens=5, completion_tokens=2, prompt_tokens_details=None),
         Usage(5, None, 2)),
        (usage(prompt_tokens=5, completion_tokens=2, prompt_tokens_details={"cached_tokens": 3}),
         Usage(5, 3, 2)),
        (usage(input_tokens=5, output_tokens=2, input_tokens_details={"cached_tokens": 3}),
         Usage(5, 3, 2)),
        (usage(input_tokens=2, cache_read_input_tokens=3, output_tokens=2), Usage(5, 3, 2)),
        (usage(prompt_tokens=5), Usage(5, None, None)),
        (usage(prompt_tokens="5", completion_tokens=-2), Usage()),
        (usage(prompt_tokens=5, completion_tokens=2) + b'{"usage": null}', Usage(5, None, 2)),
        (usage(prompt_tokens=1) + usage(prompt_tokens=5), Usage(5, None, None)),
        (usage(prompt_tokens=5, note="}{", completion_tokens=2), Usage(5, None, 2)),
        (usage(prompt_tokens=5) + b'"usage": {"a": {"' + b"}" * 40, Usage(5)),
        (json.dumps({"text": '"usage": {"prompt_tokens": 9}'}).encode(), Usage()),
        (b'"usage": {"prompt_tokens": ', Usage()),
        (b"", Usage()),
    ],
)  # fmt: skip
def test_usage_is_found(data: bytes, expected: Usage) -> None:
    assert find_usage(data) == expected


OLDER = usage(prompt_tokens=1, completion_tokens=1)


@pytest.mark.parametrize(
    "more",
    [
        b'"note": "{"',
        b'"note": "}"',
        b'"tokens_per_second": NaN',
        b'"note": "\\ud800"',
        b'"by_rank": [' + b",".join([b'{"a": 1}'] * 40) + b"]",
    ],
)
def test_an_odd_usage_is_read_and_no_older_one(more: bytes) -> None:
    said = b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2, ' + more + b"}}"
    assert find_usage(OLDER + said) == Usage(5, None, 2)


@pytest.mark.parametrize("size", [TAIL_BYTES, 16 * TAIL_BYTES])
@pytest.mark.parametrize("tries", [1, 8])
def test_a_hostile_answer_is_not_read_again_and_again(
    monkeypatch: pytest.MonkeyPatch, size: int, tries: int
) -> None:
    decoder, read = watch._DECODER, 0

    class Counting:
        def decode(self, piece: bytes) -> Any:
            nonlocal read
            read += len(piece)
            return decoder.decode(piece)

    monkeypatch.setattr(watch, "_DECODER", Counting())
    nested = b'"usage":{' * tries + b'"a":[' + b"[]," * (size // 3) + b"x" + b"}" * tries
    assert find_usage(nested + b"{}" * 40) == Usage()
    assert read <= tries * TAIL_BYTES


@given(st.binary(max_size=300))
def test_garbage_has_no_usage_and_breaks_nothing(data: bytes) -> None:
    watch, out = fed(CHAT, [data, b'"usage":{' + data])
    assert b"".join(out) + watch.rest == data + b'"usage":{' + data
    watch.usage()
