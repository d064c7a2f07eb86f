"""Whatever comes in on a connection: the router answers or hangs up, and goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.fuzz.budget import budget
from tests.router.fuzz.live import CHAT, Live

pytestmark = pytest.mark.slow

GOOD = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()
PATHS = (
    CHAT, "/v1/completions", "/health", "/metrics", "/workers", "/ui/data", "/tokenize",
    "/finish_session?session_id=a", "*", "//", "/..", "/%", "http://a/health", "/\x7f", "",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "OPTIONS", "DELETE", "PATCH", "TRACE", "get", "", "P OST", "\x00")
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.", "http/1.1", "", "X" * 40)
FRAMINGS = ("right", "none", "short", "long", "twice", "negative", "huge", "plus", "text",
            "chunked", "chunked and length", "bad chunk", "chunk extension", "no last chunk",
            "gzip", "bad gzip", "deflate", "expect")  # fmt: skip
HEADERS = ("x-a: b", "x-a:", ": b", "x a: b", "x-a", " folded", "x-a: \x00", "x-a: \xff", "Host: a",
           "Connection: close", "Connection: keep-alive, x-a", "Connection: upgrade",
           "Upgrade: websocket", "Upgrade: h2c", "Accept-Encoding: gzip", "Cookie: " + "c" * 9000,
           "x-hexgen-workflow-id: w", "x-hexgen-stage: \xe9", "TE: trailers",
           "Content-Type: application/json; charset=\xff", "Authorization: Bearer")  # fmt: skip


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def framed(framing: str, body: bytes) -> tuple[list[str], bytes]:
    """Return headers that announce ``body``, truly or not, and what is sent for it."""
    length, chunks = f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"
    known: dict[str, tuple[list[str], bytes]] = {
        "right": ([length], body),
        "none": ([], body),
        "short": ([f"Content-Length: {len(body) // 2}"], body),
        "long": ([f"Content-Length: {len(body) + 7}"], body),
        "twice": ([length, f"Content-Length: {len(body) + 1}"], body),
        "negative": (["Content-Length: -5"], body),
        "huge": ([f"Content-Length: {10**30}"], body),
        "plus": ([f"Content-Length: +{len(body)}"], body),
        "text": (["Content-Length: many"], body),
        "chunked": ([chunks], chunk(body[:5]) + chunk(body[5:] or b"x") + b"0\r\n\r\n"),
        "chunked and length": ([chunks, length], chunk(body or b"x") + b"0\r\n\r\n"),
        "bad chunk": ([chunks], b"zz\r\n" + body + b"\r\n0\r\n\r\n"),
        "chunk extension": ([chunks], chunk(body or b"x", b";a=" + b"b" * 50) + b"0\r\n\r\n"),
        "no last chunk": ([chunks], chunk(body or b"x")),
        "gzip": ([length, "Content-Encoding: gzip"], body),
        "bad gzip": (
            [f"Content-Length: {len(body) + 2}", "Content-Encoding: gzip"],
            b"\x1f\x8b" + body,
        ),
        "deflate": ([length, "Content-Encoding: deflate"], body),
        "expect": ([length, "Expect: 100-continue"], body),
    }
    return known[framing]


@dataclass
class Sent:
    """A request as it is written."""

    start: str
    headers: list[str]
    body: bytes

    def __bytes__(self) -> bytes:
        head = "\r\n".join((self.start, *self.headers))
        return head.encode("latin-1") + b"\r\n\r\n" + self.body


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """Draw a request that is wrong in few places at once, or in none."""
    method = draw(st.sampled_from(("POST", "POST", "GET", *METHODS)))
    path = draw(st.sampled_from((CHAT, CHAT, *PATHS)))
    version = draw(st.sampled_from(("HTTP/1.1",) * 5 + VERSIONS))
    body = draw(
        st.sampled_from((GOOD, GOOD, b"", b"{", b"null", b'{"model": "tiny"'))
        | st.binary(max_size=60)
    )
    headers, sent = framed(draw(st.sampled_from(("right",) * 5 + FRAMINGS)), body)
    more = draw(st.lists(st.sampled_from(HEADERS), max_size=3))
    return Sent(f"{method} {path} {version}", ["Host: a", *more, *headers], sent)


LAST = b"GET /liveness HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@budget(250)
@given(sent=st.lists(requests(), min_size=1, max_size=3), data=st.data())
def test_requests_of_every_kind(live: Live, sent: list[Sent], data: st.DataObject) -> None:
    """Pipelined, cut anywhere; the router answers each in turn or says what it does not like."""
    raw = b"".join(map(bytes, sent)) + LAST
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=4).map(sorted))
    answers = live.exchange(raw, tuple(cuts), complete=False)
    assert len(answers) <= len(sent) + 1 + sum(b"\r\n\r\n" in one.body for one in sent)
    for answer in answers:
        answer.assert_fit_for_clients()
    live.assert_well()


@budget(60)
@given(raw=st.binary(min_size=1, max_size=300))
def test_bytes_that_are_no_request(live: Live, raw: bytes) -> None:
    for answer in live.exchange(raw, complete=False):
        answer.assert_fit_for_clients()
    live.assert_well()


@budget(60)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), insert=st.booleans())
def test_one_byte_of_a_good_call_is_another(live: Live, at: int, byte: int, insert: bool) -> None:
    good = bytes(Sent(f"POST {CHAT} HTTP/1.1", ["Host: a", f"Content-Length: {len(GOOD)}"], GOOD))
    at %= len(good)
    raw = good[:at] + bytes([byte]) + good[at + (not insert) :]
    for answer in live.exchange(raw + LAST, complete=False):
        answer.assert_fit_for_clients()
    live.assert_well()


@pytest.mark.parametrize(
    "framing", ["twice", "negative", "huge", "plus", "text", "chunked and length", "bad chunk"]
)
def test_where_a_body_ends_is_never_guessed(live: Live, framing: str) -> None:
    """What comes after it could else be read as a request by one and as a body by another."""
    live.engine.bodies.clear()
    headers, body = framed(framing, GOOD)
    sent = Sent(f"POST {CHAT} HTTP/1.1", ["Host: a", *headers], body)
    (answer,) = live.exchange(bytes(sent) + LAST, complete=False)
    assert answer.status in (400, 413)
    answer.assert_fit_for_clients()
    assert live.engine.bodies == []


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        ("TRACE /ab HTTP/1.1", (), 405),
        ("get /ab HTTP/1.1", (), 400),
        ("BREW /v1/models HTTP/1.1", (), 400),
        ("OPTIONS * HTTP/1.1", (), 404),
        ("GET * HTTP/1.1", (), 404),
        ("GET /ab HTTP/1.1", ("Connection: upgrade", "Upgrade: websocket"), 501),
    ],
)
def test_what_cannot_be_passed_on_is_the_clients_matter(
    live: Live, start: str, more: tuple[str, ...], status: int
) -> None:
    sent = Sent(start, ["Host: a", *more], b"")
    first, *_ = live.exchange(bytes(sent) + LAST, complete=False)
    assert first.status == status
    first.assert_fit_for_clients()
    live.assert_well()
