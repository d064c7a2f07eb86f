"""Bytes pass through: every endpoint, both ways, streamed and not, small and large."""

from __future__ import annotations

import json

import aiohttp
import pytest
from yarl import URL

from hexgen_vllm.testing.fake_server import Fault
from hexgen_vllm.testing.stand import Stand

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
)


@pytest.mark.parametrize("path", PATHS)
async def test_answers_are_the_engines_bytes(stand: Stand, path: str) -> None:
    body = stand.body(path, max_tokens=4)
    async with stand.client.post(stand.engines[0].url + path, json=body) as direct:
        expected = await direct.read()
    async with stand.client.post(stand.router.url + path, json=body) as answer:
        assert answer.status == 200
        assert await answer.read() == expected
        assert answer.headers["Content-Type"] == direct.headers["Content-Type"]
    stand.assert_settled()


@pytest.mark.parametrize("path", PATHS[:4])
@pytest.mark.parametrize("fault", [None, Fault("drip")])
async def test_streams_are_the_engines_bytes(stand: Stand, path: str, fault: Fault | None) -> None:
    for engine in stand.engines:
        engine.fault = fault
    body = stand.body(path, max_tokens=40, ignore_eos=True, stream=True)
    async with stand.client.post(stand.engines[0].url + path, json=body) as direct:
        expected = await direct.read()
    async with stand.client.post(stand.router.url + path, json=body) as answer:
        assert await answer.read() == expected
        assert answer.headers["Content-Type"] == direct.headers["Content-Type"]
    stand.assert_settled()


async def test_the_request_body_is_the_clients_bytes(stand: Stand) -> None:
    raw = (
        b'{ "model" : "tiny",\r\n "messages":[{"role":"user","content":"\xc3\xbc\\u00fc\\ud83d"}]'
        b', "max_tokens": 2, "temperature": 1e-3, "max_tokens": 2, "x": {} }'
    )
    url = stand.router.url + PATHS[0]
    async with stand.client.post(url, data=raw) as answer:
        assert answer.status == 200
    assert stand.received()[0].body == raw


async def test_a_compressed_request_arrives_in_the_clear(stand: Stand) -> None:
    async with stand.client.post(
        stand.router.url + PATHS[0], json=stand.body(), compress="deflate"
    ) as answer:
        assert answer.status == 200
    one = stand.received()[0]
    assert "Content-Encoding" not in one.headers
    assert json.loads(one.body) == stand.body()


async def test_headers_of_the_answer(stand: Stand) -> None:
    async with stand.post(headers={"X-Request-ID": "mine-1"}) as answer:
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-hexgen-engine"] in ("engine-0", "engine-1")
        assert answer.headers["Server"] == "hexgen-vllm"
    assert stand.received()[0].headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_tell_how_their_workflow_stands(stand: Stand, stream: bool) -> None:
    async def slack_ms(deadline_ms: str | None, status: int = 200) -> float | None:
        batch = {"x-hexgen-class": "batch"}
        given = {"x-hexgen-workflow-deadline-ms": deadline_ms} if deadline_ms else batch
        async with stand.post(stream=stream, headers=given) as answer:
            assert answer.status == status
            await answer.read()
            said = answer.headers.getall("x-hexgen-slack-ms", [])
        assert len(said) <= 1
        return float(said[0]) if said else None

    assert await slack_ms(None) is None, "nobody is late without a deadline"
    early, late = await slack_ms("600000"), await slack_ms("1")
    assert early is not None
    assert 0 < early <= 600_000
    assert late is not None
    assert late <= 1
    stand.engines[0].faults.append(Fault("status", status=400))
    stand.engines[1].faults.append(Fault("status", status=400))
    assert await slack_ms("600000", 400) is not None, "errors of an engine, too"


async def test_a_request_id_is_made_up_and_sent_on(stand: Stand) -> None:
    async with stand.post() as answer:
        made = answer.headers.getall("x-request-id")
    assert stand.received()[0].headers.getall("x-request-id") == made
    assert len(made) == 1


async def test_other_request_id_headers_are_read(stand: Stand) -> None:
    async with stand.post(headers={"X-Correlation-ID": "c-7", "traceparent": "00-ab-cd-01"}) as a:
        assert a.headers["x-request-id"] == "c-7"
    assert stand.received()[0].headers["traceparent"] == "00-ab-cd-01"


async def test_queries_are_passed_on(stand: Stand) -> None:
    url = URL(stand.router.url + PATHS[0] + "?a=b%2Fc&d", encoded=True)
    async with stand.client.post(url, json=stand.body()) as answer:
        assert answer.status == 200
    assert stand.received()[0].path == PATHS[0] + "?a=b%2Fc&d"


async def test_large_bodies_pass_both_ways(single: Stand) -> None:
    prompt = "x" * (3 * 2**20)
    tokens = 600_000  # about 5 MB of answer
    async with single.post(
        "/v1/completions", prompt=prompt, max_tokens=tokens, ignore_eos=True
    ) as a:
        answer = await a.json(content_type=None)
        assert int(a.headers["Content-Length"]) > 4 * 2**20
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["text"].endswith(f" t{tokens - 1}")
    assert len(single.received()[0].body) > len(prompt)
    single.assert_settled()


async def test_a_large_answer_that_breaks_off_closes_the_connection(single: Stand) -> None:
    # A body of 9.5 MB: its first half is more than what the router reads ahead.
    single.engines[0].fault = Fault("reset", 1)
    async with single.post("/v1/completions", max_tokens=1_200_000, ignore_eos=True) as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    await single.until(lambda: single.router.context.ledger.open == 0)
    assert single.router.context.ledger.failed() == {"engine-lost": 1}
    single.assert_settled()


async def test_answers_of_4xx_are_the_engines(stand: Stand) -> None:
    for engine in stand.engines:
        engine.fault = Fault("status", status=422, body=b'{"error": {"message": "no"}}')
    async with stand.post() as answer:
        assert (answer.status, await answer.read()) == (422, b'{"error": {"message": "no"}}')
    assert stand.router.context.ledger.failed() == {"bad-request": 1}
    stand.assert_settled()


async def test_refusals_that_are_no_error_objects_become_one(single: Stand) -> None:
    single.engines[0].fault = Fault("status", status=404, body=b'{"detail":"Not Found"}')
    async with single.post("/v1/embeddings") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_usage_teaches_lengths_and_the_prompts_ratio(single: Stand) -> None:
    said = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-type": "t", "x-hexgen-stage": "s"}
    options = {"max_tokens": 40, "ignore_eos": True}
    for stream in (False, True):
        async with single.post(headers=said, stream=stream, **options) as answer:
            await answer.read()
    shapes = single.router.context.service.coordinator.workflows.shapes
    assert shapes.output_tokens("t", "s", 0.0) == 40, "also where a stream does not say"
    assert shapes.output_tokens("t", "s", 1.0) == 40
    text = "ab" * 400
    async with single.post("/v1/completions", prompt=text, max_tokens=2) as answer:
        prompt_tokens = (await answer.json())["usage"]["prompt_tokens"]
    ratios = single.router.context.ratios
    assert ratios.ratio("tiny") == pytest.approx(len(text) / prompt_tokens, rel=0.1)


async def test_progress_reaches_the_coordinator(single: Stand) -> None:
    single.engines[0].fault = Fault("hang", 150)
    load = single.router.context.service.coordinator.engines["engine-0"]
    async with single.post(stream=True, max_tokens=200, ignore_eos=True) as answer:
        await answer.content.readany()
        await single.until(lambda: len(load.in_flight) == 1)
        (flight,) = load.in_flight.values()
        await single.until(lambda: flight.output_tokens > 64)
        assert flight.started
    await single.until(lambda: not load.in_flight)
    single.assert_settled()
