"""Everything but generation: models, health, workers, diagnostics, metrics, keys, bad HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from hexgen_vllm import __version__
from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import BODIES, CHAT, Stand, open_stand

PATHS = {
    "GET": ("/v1/models", "/version", "/workers", "/load", "/metrics", "/scheduling/diagnostics",
            "/health", "/readiness", "/liveness", "/ping", "/health/readiness"),
    "HEAD": ("/health", "/v1/models"),
    "POST": ("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path"), [(m, p) for m, ps in PATHS.items() for p in ps])
async def test_every_page_answers(stand: Stand, method: str, path: str) -> None:
    body = {"model": "tiny", "prompt": "x"} if method == "POST" else None
    async with stand.client.request(method, stand.router.url + path, json=body) as answer:
        text = await answer.text()
        assert answer.status == 200
    for engine in stand.engines:
        assert str(engine.port) not in text, "no page shows an engine's address"


async def test_workers_and_version(stand: Stand) -> None:
    async with stand.get("/version") as answer:
        assert (await answer.json())["version"] == __version__
    async with stand.get("/workers") as answer:
        workers = (await answer.json())["workers"]
    assert [(w["name"], w["state"], w["kind"], w["models"]) for w in workers] == [
        (f"engine-{i}", "ready", "fcfs", ["tiny"]) for i in range(2)
    ]


async def test_diagnostics_say_why(stand: Stand) -> None:
    said = {"x-hexgen-workflow-id": "w", "x-hexgen-stage": "s", "x-hexgen-workflow-type": "t"}
    async with stand.post(headers=said) as answer:
        engine = answer.headers["x-hexgen-engine"]
        await answer.read()
    async with stand.get("/scheduling/diagnostics") as answer:
        shown = await answer.json()
    assert shown["policy"] == "slack"
    assert shown["open_workflows"] == 1
    assert shown["stages"] == {"t": {"s": 1}}
    assert shown["decisions"][0]["engine"] == engine
    assert shown["decisions"][0]["reason"] == "marginal_cost"
    assert {e["name"] for e in shown["engines"]} == {"engine-0", "engine-1"}


async def test_tokenize_goes_to_an_engine_that_has_the_model() -> None:
    async with open_stand(FakeSettings(models=("a",)), FakeSettings(models=("b",))) as stand:
        for body, engine in (({"model": "b"}, 1), ({"model": "a"}, 0), ({}, 0)):
            sent = {**body, "prompt": "x"}
            headers = {"x-request-id": "r", "x-hexgen-stage": "s"}
            url = stand.router.url + "/tokenize"
            async with stand.client.post(url, json=sent, headers=headers) as answer:
                assert (await answer.json())["tokens"] == [1, 2, 3]
                assert answer.headers["x-hexgen-engine"] == f"engine-{engine}"
            got = stand.engines[engine].received[-1]
            assert json.loads(got.body) == sent
            assert got.headers["x-request-id"] == "r"
            assert "x-hexgen-stage" not in got.headers
        async with stand.client.post(stand.router.url + "/tokenize", json={"model": "c"}) as answer:
            assert answer.status == 404
        await stand.engines[1].stop()
        async with stand.client.post(stand.router.url + "/tokenize", json={"model": "b"}) as answer:
            assert answer.status in (502, 503)
            assert "error" in await answer.json()


async def test_finish_session_ends_a_workflow(stand: Stand) -> None:
    async with stand.post(headers={"x-hexgen-workflow-id": "w/1"}) as answer:
        await answer.read()
    for expected in (True, False):
        url = stand.router.url + "/finish_session?session_id=w%2F1"
        async with stand.client.post(url) as answer:
            assert (await answer.json())["finished"] is expected
    async with stand.client.post(stand.router.url + "/finish_session") as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == "session_id"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("PUT", "/x", 404)],
)
async def test_no_such_route(stand: Stand, method: str, path: str, status: int) -> None:
    async with stand.client.request(method, stand.router.url + path) as answer:
        assert answer.status == status
        assert "message" in (await answer.json())["error"]
        assert (answer.headers.get("Allow") is not None) == (status == 405)


@pytest.mark.parametrize(
    ("data", "headers", "status", "param"),
    [
        (b"{", {}, 400, None),
        (b"[1]", {}, 400, None),
        (b'{"model": 1}', {}, 400, "model"),
        (b'{"model": "tiny"}', {"x-hexgen-workflow-deadline-ms": "soon"}, 400,
         "x-hexgen-workflow-deadline-ms"),
        (b'{"model": "tiny"}', {"x-hexgen-workflow-id": "x" * 129}, 400, "x-hexgen-workflow-id"),
        (b'{"model": "tiny", "vllm_xargs": {"hexgen_stage": 7}}', {}, 400, "hexgen_stage"),
        (b'{"model": "other"}', {}, 404, "model"),
    ],
)  # fmt: skip
async def test_bad_requests_are_named(
    stand: Stand, data: bytes, headers: dict[str, str], status: int, param: str | None
) -> None:
    url = stand.router.url + CHAT
    async with stand.client.post(url, data=data, headers=headers) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
    assert stand.received() == []
    assert stand.context.ledger.failed() == {"bad-request": 1}
    stand.assert_settled()


async def test_bodies_have_a_limit() -> None:
    async with open_stand(max_payload_size=1000) as stand:
        for extra, status in (("x" * 500, 200), ("x" * 2000, 413)):
            async with stand.post(user=extra) as answer:
                assert answer.status == status
                assert ("error" in await answer.json()) == (status == 413)
        stand.assert_settled()


async def test_what_is_not_http_gets_an_error_object(stand: Stand) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                    b"POST /x HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                    b"GET / HTTP/1.1\r\nX-A: " + b"x" * 20_000 + b"\r\n\r\n"):  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
        writer.write(garbage)
        answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        expected = b" 431 " if len(garbage) > 10_000 else b" 400 "
        assert expected in head.split(b"\r\n")[0]
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        writer.close()


async def test_a_client_that_waits_to_be_asked_is_asked(stand: Stand) -> None:
    """As curl does with long bodies."""
    body = json.dumps(stand.body()).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"chat.completion" in answer
    writer.close()
    assert "Expect" not in stand.received()[0].headers


async def test_a_body_that_breaks_off_is_no_call(stand: Stand) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.router.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n"
    writer.write(head.encode() + b"{")
    await stand.until(lambda: stand.context.ledger.open)
    writer.close()
    await stand.until(lambda: not stand.context.ledger.open)
    assert stand.received() == []
    assert await reader.read() == b""
    stand.assert_settled()


async def test_a_key_is_asked_for() -> None:
    async with open_stand(api_key=("k1", "k2"), engine_api_key="inner") as stand:
        wrong = (None, "Bearer k", "Bearer k1x", "k1", "Bearer é")
        for shown, status in (
            *((key, 401) for key in wrong),
            ("Bearer k1", 200),
            ("Bearer k2", 200),
        ):
            headers = {} if shown is None else {"Authorization": shown}
            async with stand.post(headers=headers) as answer:
                assert answer.status == status
        for headers in ({"authorization": "bearer   k2  "}, {"Authorization": "BEARER k1"},
                        {"x-api-key": " k1 "}, {"Authorization": "Basic x", "X-API-Key": "k2"},
                        {"Authorization": "Bearer none", "x-api-key": "k1"}):  # fmt: skip
            async with stand.post(headers=headers) as answer:
                assert answer.status == 200, headers
        for headers in ({"x-api-key": ""}, {"x-api-key": "k"}, {"x-api-key": "Bearer k1"},
                        {"Authorization": "Bearer"}, {"Authorization": "Bearerk1"},
                        {"Authorization": "Token k1"}):  # fmt: skip
            async with stand.post(headers=headers) as answer:
                assert answer.status == 401, headers
        assert {r.headers["Authorization"] for r in stand.received()} == {"Bearer inner"}
        assert {r.headers.get("x-api-key") for r in stand.received()} == {None, "inner"}
        for path, status in (("/health", 200), ("/metrics", 200), ("/version", 200),
                             ("/v1/models", 401), ("/workers", 401),
                             ("/scheduling/diagnostics", 401)):  # fmt: skip
            async with stand.get(path) as answer:
                assert answer.status == status


async def test_engines_are_shown_the_clients_key_in_the_way_they_know(single: Stand) -> None:
    for headers in ({"x-api-key": "k"}, {"Authorization": "Bearer k"}):
        async with single.post(headers=headers) as answer:
            assert answer.status == 200
    assert [r.headers["Authorization"] for r in single.received()] == ["Bearer k"] * 2


@pytest.mark.parametrize("path", ["/v1/models", "/nope", "/health", "/metrics", "/workers/x/drain"])
async def test_every_answer_says_the_request_id(stand: Stand, path: str) -> None:
    async with stand.client.get(stand.router.url + path, headers={"X-Request-ID": "r 1"}) as answer:
        assert answer.headers.getall("x-request-id") == ["r1"]


NO_MODEL: tuple[dict[str, Any], ...] = ({}, {"model": None}, {"model": ""})


@pytest.mark.parametrize("model", NO_MODEL)
@pytest.mark.parametrize("path", BODIES)
async def test_without_a_model_the_first_one_is_meant(path: str, model: dict[str, Any]) -> None:
    """As in vLLM, also where the engine has adapters and aliases."""
    settings = FakeSettings(models=("base", "alias"), adapters=("sql",))
    async with open_stand(settings, settings) as stand:
        body = {**BODIES[path], **model}
        async with stand.client.post(stand.router.url + path, json=body) as answer:
            assert answer.status == 200
        (got,) = stand.received()
        assert json.loads(got.body) == body
        assert set(stand.context.metrics.usage._used) == {("default", "base")}


@pytest.mark.parametrize("model", NO_MODEL)
async def test_without_a_model_several_are_too_many(model: dict[str, Any]) -> None:
    body = {**BODIES[CHAT], **model}
    async with (
        open_stand(FakeSettings(models=("a",)), FakeSettings(models=("b",))) as stand,
        stand.client.post(stand.router.url + CHAT, json=body) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == "model"


async def test_without_a_model_before_any_engine_is_up() -> None:
    async with (
        open_stand(wait=False, worker_urls=("http://127.0.0.1:9",)) as stand,
        stand.client.post(stand.router.url + CHAT, json=BODIES[CHAT]) as answer,
    ):
        assert answer.status == 503
        assert answer.headers["Retry-After"]


async def test_too_many_open_calls_are_refused() -> None:
    async with open_stand(FakeSettings(slots=1, step_s=0.002), max_concurrent_requests=2) as stand:

        async def one() -> int:
            async with stand.post(max_tokens=20, ignore_eos=True) as answer:
                if answer.status == 429:
                    assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
                    assert answer.headers["Retry-After"] == "1"
                return int(answer.status)

        statuses = await asyncio.gather(*(one() for _ in range(5)))
        assert sorted(statuses) == [200, 200, 429, 429, 429]
        stand.assert_settled()


async def test_keep_alive_connections_are_reused(stand: Stand) -> None:
    async with aiohttp.ClientSession() as one:
        for _ in range(3):
            async with one.post(stand.router.url + CHAT, json=stand.body()) as answer:
                await answer.read()
        assert one.connector is not None
        assert sum(len(v) for v in one.connector._conns.values()) == 1
