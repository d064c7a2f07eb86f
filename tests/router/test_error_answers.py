"""Every error that a client can be given, and what it must not say: addresses and code."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from hexgen_vllm.testing import fake_answers
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import BODIES, CHAT, Stand, open_stand
from hexgen_vllm.types import EngineState

SECRET = b'Traceback (most recent call last):\n  File "/srv/engine.py" http://10.1.2.3:8000/v1'
UNSAID = re.compile(
    r"127\.0\.0\.1|10\.1\.2\.3|localhost|https?://|Traceback|File \\?\"|\.py\b|/srv/|0x[0-9a-f]{6}"
    r"|aiohttp|asyncio|Errno|Exception|object at"
)
ERROR_FIELDS = {"message", "type", "param", "code"}


class Answer(NamedTuple):
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes


def assert_says_nothing(answer: Answer, stand: Stand) -> None:
    """It is an OpenAI error object, and gives nothing away."""
    assert answer.headers["Content-Type"].startswith("application/json")
    assert set(json.loads(answer.body)["error"]) == ERROR_FIELDS
    text = answer.body.decode() + str(answer.headers)
    found = UNSAID.search(text)
    assert found is None, text
    for engine in stand.engines:
        assert str(engine.port) not in text


async def sent(
    stand: Stand, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None
) -> Answer:
    url = stand.router.url + path
    async with stand.client.request(
        method, url, data=data, headers=headers or {}, allow_redirects=False
    ) as answer:
        return Answer(answer.status, dict(answer.headers), await answer.read())


def as_json(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", **BODIES[CHAT], **fields}).encode()


REQUESTS: dict[str, tuple[int, str, str, Any, dict[str, str]]] = {
    "no such path": (404, "GET", "/../../etc/passwd", None, {}),
    "no such method": (405, "PUT", CHAT, None, {}),
    "no JSON": (400, "POST", CHAT, b"{", {}),
    "deep JSON": (400, "POST", CHAT, b"[" * 100_000, {}),
    "no object": (400, "POST", CHAT, b"[]", {}),
    "no model": (400, "POST", CHAT, as_json(model=7), {}),
    "unknown model": (404, "POST", CHAT, as_json(model="nobody"), {}),
    "long model": (404, "POST", CHAT, as_json(model="x" * 5000), {}),
    "bad deadline": (400, "POST", CHAT, as_json(), {"x-hexgen-workflow-deadline-ms": "soon"}),
    "long workflow id": (400, "POST", CHAT, as_json(), {"x-hexgen-workflow-id": "x" * 200}),
    "no engine's endpoint": (404, "POST", "/v1/nothing", as_json(), {}),
    "managing an engine": (403, "POST", "/reset_prefix_cache", None, {}),
    "bad xargs": (400, "POST", CHAT, as_json(vllm_xargs={"hexgen_stage": 7}), {}),
    "large body": (413, "POST", CHAT, b"x" * 70_000, {}),
    "tokenize without JSON": (400, "POST", "/tokenize", b"{", {}),
    "tokenize by nobody": (404, "POST", "/tokenize", as_json(model="nobody"), {}),
    "no session": (400, "POST", "/finish_session", None, {}),
    "closed admin": (403, "POST", "/workers", b"{}", {}),
    "closed list": (403, "GET", "/list_workers", None, {}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_errors_of_requests(name: str) -> None:
    status, method, path, data, headers = REQUESTS[name]
    async with open_stand(max_payload_size=60_000 if name == "large body" else 2**20) as stand:
        answer = await sent(stand, method, path, data, headers)
        assert answer.status == status
        assert_says_nothing(answer, stand)
        stand.assert_settled()


async def test_errors_of_keys() -> None:
    async with open_stand(api_key=("k",), admin_api_key=("a",)) as stand:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("POST", "/workers")):
            answer = await sent(stand, method, path)
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert_says_nothing(answer, stand)


@pytest.mark.parametrize(
    "status", [300, 302, 401, 403, 404, 418, 422, 429, 500, 501, 502, 503, 504]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/tokenize"])
async def test_errors_of_engines(status: int, path: str) -> None:
    """Pages of proxies and frameworks between us and the engine included."""
    headers = (("Content-Type", "text/html"), ("Location", "http://10.1.2.3:8000/v1"),
               ("Server", "uvicorn"))  # fmt: skip
    async with open_stand() as stand:
        stand.engines[0].fault = Fault("status", status=status, body=SECRET, headers=headers)
        body = json.dumps({"model": "tiny", **BODIES.get(path, {"prompt": "x"})}).encode()
        answer = await sent(stand, "POST", path, body)
        assert answer.status >= 400
        assert_says_nothing(answer, stand)


TRACE = SECRET.decode()
OWN_FAILURES = {
    "error object": {"error": {"message": TRACE, "type": "InternalServerError", "code": 500}},
    "nothing secret": {"error": {"message": "CUDA error at layer 7", "code": 500}},
    "text": {"error": TRACE},
    "old": {"object": "error", "message": TRACE, "code": 500},
    "error in a page": {"detail": f'<p class="error">{TRACE}</p> "error"'},
    "list": [{"error": TRACE}],
}


@pytest.mark.parametrize("status", [500, 501, 503, 505, 507, 529, 599])
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_what_engines_say_of_their_own_failures_is_not_shown(
    path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_stand() as stand:
        for name, content in OWN_FAILURES.items():
            raw = json.dumps(content).encode()
            stand.engines[0].fault = Fault("status", status=status, body=raw)
            body = json.dumps({"model": "tiny", **BODIES.get(path, {"prompt": "x"})}).encode()
            answer = await sent(stand, "POST", path, body)
            assert answer.status >= 500, name
            assert_says_nothing(answer, stand)
            assert b"CUDA" not in answer.body
        if path == CHAT:
            assert "Traceback" in caplog.text, "the engine's own log has it"
            assert "InternalServerError" in caplog.text
            for secret in (TRACE, "CUDA error"):
                assert secret not in caplog.text, "it may repeat what the client said"


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_what_engines_say_of_a_request_is_shown_as_it_is(path: str) -> None:
    said = (
        {"error": {"message": "max_tokens=9 is too large: see http://images.example:8000/a.png",
                   "type": "BadRequestError", "param": "max_tokens", "code": 400}},
        {"object": "error", "message": "no such tool", "type": "BadRequestError", "code": 400},
        {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}},
    )  # fmt: skip
    async with open_stand() as stand:
        body = json.dumps({"model": "tiny", **BODIES.get(path, {"prompt": "x"})}).encode()
        for content in said:
            raw = json.dumps(content).encode()
            stand.engines[0].fault = Fault("status", status=400, body=raw)
            answer = await sent(stand, "POST", path, body)
            assert (answer.status, answer.body) == (400, raw)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_refusals_that_say_too_much_are_told_in_other_words(path: str) -> None:
    async with open_stand() as stand:
        at = f"cannot fetch from 127.0.0.1:{stand.engines[0].port}"
        page = b'<html><b class="error">' + SECRET
        long = json.dumps({"error": {"message": "x" * 5_000_000}}).encode()
        objects = ({"error": {"message": TRACE, "code": 400}}, {"error": {"message": at}},
                   {"error": {"message": 'File "/a/b", line 7, in x'}})  # fmt: skip
        for raw in (page, long, *(json.dumps(one).encode() for one in objects)):
            stand.engines[0].fault = Fault("status", status=400, body=raw)
            body = json.dumps({"model": "tiny", **BODIES.get(path, {"prompt": "x"})}).encode()
            answer = await sent(stand, "POST", path, body)
            assert answer.status == 400
            if raw is not long or path == CHAT:
                assert_says_nothing(answer, stand)
                assert len(answer.body) < 500


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("size", [0, 20_000, 2_000_000])
async def test_error_events_show_neither(
    monkeypatch: pytest.MonkeyPatch, path: str, size: int
) -> None:
    error = {"message": TRACE + "x" * size, "type": "InternalServerError", "code": 500}
    content = {"type": "error", "error": error} if path.endswith("s") else {"error": error}
    named = b"event: error\n" if path in ("/v1/responses", "/v1/messages") else b""
    token = b'data: {"text": " tok 127.0.0.1:80 a/b/c.py Traceback (most recent call"}\n\n'
    last = named + b"data: " + json.dumps(content).encode() + b"\n\ndata: [DONE]\n\n"
    pieces = [token, *(last[i : i + 30_000] for i in range(0, len(last), 30_000))]
    monkeypatch.setattr(fake_answers, "events", lambda work: iter(pieces))
    async with open_stand() as stand:
        async with stand.post(path, stream=True) as answer:
            text = await answer.read()
        assert text.startswith(token), "text of the model is nobody's business"
        told = text[len(token) :]
        assert UNSAID.search(told.decode()) is None
        data = next(line for line in told.split(b"\n") if line.startswith(b"data:"))
        assert json.loads(data[5:])["error"]["message"] == "The engine failed."
        assert stand.context.ledger.failed() == {"engine-error": 1}
        stand.assert_settled()


async def test_a_dead_engine_process_is_not_busy() -> None:
    """What vLLM answers when only its API server is left; the other engine takes the calls."""
    raw = json.dumps({"error": {"message": "EngineDeadError: EngineCore encountered an issue."}})
    async with open_stand(*[FakeSettings()] * 2, policy="round_robin") as stand:
        stand.engines[0].fault = Fault("status", status=503, body=raw.encode())
        for _ in range(12):
            async with stand.post() as answer:
                assert answer.status == 200
        assert stand.context.ledger.retries == {"engine-error": 5}
        assert stand.state(0) is EngineState.DOWN


Breaking = Callable[[Stand], Awaitable[None]]


async def _stopped(stand: Stand) -> None:
    await stand.engines[0].stop()


async def _draining(stand: Stand) -> None:
    stand.context.draining = True


async def _reset(stand: Stand) -> None:
    stand.engines[0].fault = Fault("reset")


async def _garbage(stand: Stand) -> None:
    stand.engines[0].fault = Fault("garbage")


async def _defect(stand: Stand) -> None:
    def observe(*_: object) -> None:
        raise RuntimeError(SECRET.decode())

    stand.context.metrics.held_s.observe = observe  # type: ignore[method-assign]


async def _drained(stand: Stand) -> None:
    stand.context.fleet.drain("engine-0")


@pytest.mark.parametrize(
    ("breaking", "status"),
    [(_stopped, 502), (_draining, 503), (_reset, 502), (_garbage, 502), (_defect, 500),
     (_drained, 503)],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_service(breaking: Breaking, status: int, stream: bool) -> None:
    async with open_stand() as stand:
        await breaking(stand)
        answer = await sent(stand, "POST", CHAT, as_json(stream=stream))
        # A health check may notice that the engine has stopped before the call does.
        assert answer.status in ((502, 503) if breaking is _stopped else (status,))
        assert_says_nothing(answer, stand)
        assert stand.context.ledger.open == 0


async def test_errors_of_overload() -> None:
    async with _full() as stand:
        answer = await sent(stand, "POST", CHAT, as_json())
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        assert_says_nothing(answer, stand)


@asynccontextmanager
async def _full() -> AsyncIterator[Stand]:
    async with open_stand(
        FakeSettings(slots=1, policy="fcfs"), queue_size=1, dispatch={"hold_depth": 0}
    ) as stand:
        stand.engines[0].fault = Fault("hang", 1)
        tasks = []
        for held in (0, 1):
            tasks.append(asyncio.ensure_future(sent(stand, "POST", CHAT, as_json(stream=True))))
            await stand.until(
                lambda n=held: stand.received() and stand.context.service.coordinator.held == n
            )
        yield stand
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/embeddings"])
@pytest.mark.parametrize("kind", ["reset", "garbage", "cut"])
async def test_errors_within_streams(path: str, kind: str) -> None:
    async with open_stand() as stand:
        stand.engines[0].faults.append(Fault(kind, 3))  # type: ignore[arg-type]
        body = json.dumps({"model": "tiny", **BODIES[path], "stream": True}).encode()
        answer = await sent(stand, "POST", path, body)
        last = answer.body.split(b"\n\n")[-2].decode()
        assert set(json.loads(last.partition("data: ")[2])["error"]) == ERROR_FIELDS
        assert UNSAID.search(last) is None
        assert str(stand.engines[0].port) not in answer.body.decode() + str(answer.headers)
