"""Headers and bodies of calls: answered, or refused with a reason; what is passed on is exact."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen_vllm import wire
from hexgen_vllm.router import words
from hexgen_vllm.router.endpoints import ENDPOINTS
from tests.router.fuzz.budget import budget
from tests.router.fuzz.live import CHAT, Answer, Live

pytestmark = pytest.mark.slow

NAMES = sorted({
    *(wire.header_name(field) for field in wire.FIELDS), "baggage",
    *(word.name for word in words.WORDS if word.place is words.WordPlace.HEADER),
    "x-hexgen-unknown", "x-acme-session-id", "x-request-id", "traceparent",
    "tracestate", "x-correlation-id", "x-data-parallel-rank", "authorization", "content-type",
    "accept", "accept-encoding", "cookie", "forwarded", "x-forwarded-for", "te", "connection",
    "host",
})  # fmt: skip
WORDS = st.sampled_from((
    "", "0", "1", "-1", "1e308", "1e999", "nan", "inf", "0x10", "1_000", "٣", "true", "null", "w",
    "w" * 128, "w" * 129, "w" * 4000, "a b", "é", "00-ab-cd-01", "bulk", "../..", "%00", '"', "{}",
    "9" * 400,
))  # fmt: skip
# What a header value may hold: printable ASCII, tabs, and bytes above.
VALUES = WORDS.map(lambda w: w.encode()) | st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30
).map(lambda text: text.encode("latin-1"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
AGENT = [word.name.rpartition(".")[2] for word in words.WORDS if "agentic" in word.name]
FIELDS = st.sampled_from((
    "model", "messages", "prompt", "input", "system", "instructions", "tools", "max_tokens",
    "max_completion_tokens", "max_output_tokens", "stream", "stream_options", "n", "priority",
    "session_id", "user", "service_tier", "agent_hint", "nvext", "vllm_xargs", "metadata",
))  # fmt: skip
XARGS = st.dictionaries(
    st.sampled_from([*(wire.XARGS_PREFIX + f for f in wire.FIELDS), "hexgen_x", "agentic_context"]),
    JSON | st.dictionaries(st.sampled_from(AGENT), JSON, max_size=4),
    max_size=4,
)
BODIES = st.builds(
    lambda known, fields, xargs: {**known, **fields, **xargs},
    st.sampled_from(({"model": "tiny"}, {"model": "tiny", "messages": []}, {})),
    st.dictionaries(FIELDS, JSON, max_size=5),
    XARGS.map(lambda x: {"vllm_xargs": x}) | st.just({}),
)
PATHS = st.sampled_from([endpoint.path for endpoint in ENDPOINTS] + ["/tokenize"])


def call(live: Live, path: str, body: bytes, headers: list[tuple[str, bytes]]) -> Answer:
    """Send a call that is good HTTP, and return its answer."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: a", b"Connection: close"]
    lines += [name.encode() + b": " + value for name, value in headers]
    lines += [b"Content-Length: %d" % len(body)]
    (answer,) = live.exchange(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    answer.assert_fit_for_clients()
    return answer


@budget(300)
@given(headers=st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6), path=PATHS)
def test_headers(live: Live, headers: list[tuple[str, bytes]], path: str) -> None:
    live.engine.bodies.clear()
    framing = {"connection", "te", "content-type", "host"}
    sent = [(name, value) for name, value in headers if name not in framing]
    answer = call(live, path, b'{"model":"tiny"}', sent)
    assert answer.status in (200, 400)
    assert live.engine.bodies == ([b'{"model":"tiny"}'] if answer.status == 200 else [])
    live.assert_well()


@budget(200)
@given(body=BODIES, path=PATHS, spaces=st.booleans())
def test_bodies(live: Live, body: dict[str, Any], path: str, spaces: bool) -> None:
    """The engine gets the client's bytes, but for what would make it refuse them."""
    live.engine.bodies.clear()
    raw = json.dumps(body, indent=1 if spaces else None).encode()
    answer = call(live, path, raw, [])
    assert answer.status in (200, 400, 404)
    if answer.status == 200:
        (got,) = live.engine.bodies
        xargs = body.get("vllm_xargs")
        if path != "/tokenize" and isinstance(xargs, dict) and "agentic_context" in xargs:
            assert "agentic_context" not in json.loads(got).get("vllm_xargs", {})
        else:
            assert got == raw
    live.assert_well()


NO_CALLS = (
    st.binary(max_size=200)
    | st.text(max_size=100).map(lambda text: json.dumps(text).encode())
    | st.integers(1, 60_000).map(lambda n: b"[" * n)
    | JSON.map(lambda value: json.dumps(value).encode())
)


@budget(200)
@given(raw=NO_CALLS)
def test_bodies_that_are_no_call(live: Live, raw: bytes) -> None:
    answer = call(live, CHAT, raw, [])
    assert answer.status in (400, 404) or b'"model"' in raw or raw.lstrip()[:1] == b"{"
    live.assert_well()
