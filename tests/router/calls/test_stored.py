"""What follows a stored response goes to the engine that has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientTimeout, web
from yarl import URL

from hexgen_vllm.router.calls.stored import (
    KEPT_S,
    MAX_RESPONSES,
    RESPONSE_ID,
    Stored,
    stored_id,
    told,
)
from hexgen_vllm.testing import fake_answers
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.fake_settings import Fault
from hexgen_vllm.testing.stand import open_stand

PATH = "/v1/responses"


def as_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines name their responses ``resp_0``, ``resp_1``, ..."""
    numbers = iter(range(100))
    whole, events = fake_answers.body, fake_answers.events

    def named_body(work: fake_answers.AskedAnswer) -> bytes:
        return json.dumps({**json.loads(whole(work)), "id": f"resp_{next(numbers)}"}).encode()

    def named_events(work: fake_answers.AskedAnswer) -> Iterator[bytes]:
        first = {"response": {"id": f"resp_{next(numbers)}"}, "type": "response.created"}
        yield f"event: response.created\ndata: {json.dumps(first)}\n\n".encode()
        yield from list(events(work))[1:]

    monkeypatch.setattr(fake_answers, "body", named_body)
    monkeypatch.setattr(fake_answers, "events", named_events)


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_goes_where_the_response_before_it_is(stream: bool) -> None:
    async with open_stand(*[FakeSettings()] * 3, policy="round_robin") as stand:
        homes: dict[str, str] = {}

        async def ask(**more: Any) -> str:
            async with stand.post(PATH, stream=stream, max_tokens=2, **more) as answer:
                assert answer.status == 200
                text = await answer.text()
            homes[f"resp_{len(homes)}"] = str(answer.headers["x-hexgen-engine"])
            assert f"resp_{len(homes) - 1}" in text
            return homes[f"resp_{len(homes) - 1}"]

        for _ in range(3):
            await ask()
        assert len(set(homes.values())) == 3
        for response in ("resp_1", "resp_1", "resp_0", "resp_2", "resp_3"):
            assert await ask(previous_response_id=response) == homes[response]
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"),
                             ("GET", "/input_items")):  # fmt: skip
            url = f"{stand.router.url}{PATH}/resp_1{path}"
            for _ in range(2):
                async with stand.client.request(method, url) as answer:
                    assert answer.headers["x-hexgen-engine"] == homes["resp_1"]
        stand.context.fleet.remove(homes["resp_1"])
        async with stand.post(PATH, previous_response_id="resp_1") as answer:
            assert answer.status == 404
            assert "resp_1" in (await answer.json())["error"]["message"]
        async with stand.post(PATH, previous_response_id="resp_unknown") as answer:
            assert answer.status == 200, "for an engine to say"
        stand.assert_settled()


async def test_what_another_process_saw_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart of the router, and with several processes of it."""
    page = FakeServer._page
    async with open_stand(*[FakeSettings()] * 3, policy="round_robin") as stand:

        def with_response(server: FakeServer, path: str) -> Any:
            if path == "/v1/responses/resp_far" and server is stand.engines[1]:
                return {"id": "resp_far", "object": "response"}
            return page(server, path)

        monkeypatch.setattr(FakeServer, "_page", with_response)
        for _ in range(4):
            async with stand.post(PATH, previous_response_id="resp_far") as answer:
                assert answer.headers["x-hexgen-engine"] == "engine-1"
        async with stand.post(PATH, previous_response_id="resp_none") as answer:
            assert answer.status == 200, "for an engine to say"


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text(
        "keys:\n  - {key: sk-a, tenant: a}\n  - {key: sk-b, tenant: b}\n"
        "  - {key: sk-gate, tenant: gate, tenants: [a]}\n"
    )
    return str(path)


ESCAPED = ("resp_0", "resp\\u005f0", "\\u0072esp_0")


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engines", [1, 3])
async def test_a_response_is_its_tenants(
    monkeypatch: pytest.MonkeyPatch, keys: str, engines: int, stream: bool
) -> None:
    page = FakeServer._page

    def to_anybody(server: FakeServer, path: str) -> Any:
        return {"id": "resp_0"} if path.startswith(f"{PATH}/") else page(server, path)

    monkeypatch.setattr(FakeServer, "_page", to_anybody)
    async with open_stand(*[FakeSettings()] * engines, api_keys=keys) as stand:
        mine, others = as_key("sk-a"), as_key("sk-b")
        for said in (mine, others):
            async with stand.post(PATH, headers=said, stream=stream, max_tokens=2) as answer:
                assert answer.status == 200
                await answer.read()
        asked = len(stand.received())

        async def status(said: dict[str, str], method: str, path: str, body: str = "{}") -> int:
            url = URL(f"{stand.router.url}{path}", encoded=True)
            sent = {**said, "Content-Type": "application/json"}
            async with stand.client.request(method, url, headers=sent, data=body) as answer:
                if answer.status == 404:
                    assert "error" in await answer.json()
                return answer.status

        paths = (f"{PATH}/resp_0", f"{PATH}/resp%5F0", f"{PATH}/resp_0/cancel",
                 f"{PATH}/resp_0/input_items", f"/x{PATH}/resp_0", f"{PATH}//resp_0")  # fmt: skip
        for path in paths:
            for method in ("GET", "POST", "DELETE"):
                assert await status(others, method, path) == 404, (method, path)
        for text in ESCAPED:
            for name in ("previous_response_id", "previous\\u005fresponse_id"):
                body = f'{{"model": "tiny", "input": "x", "{name}": "{text}"}}'
                assert await status(others, "POST", PATH, body) == 404
                assert await status({**others, "x-hexgen-tenant": "a"}, "POST", PATH, body) == 404
        assert len(stand.received()) == asked, "no engine was asked"
        body = '{"model": "tiny", "input": "x", "request_id": "resp_0"}'
        assert await status(others, "POST", PATH, body) == 400, "nobody takes the id of another"
        for said in (mine, {**as_key("sk-gate"), "x-hexgen-tenant": "a"}):
            assert await status(said, "GET", f"{PATH}/resp_0") == 200
            body = '{"model": "tiny", "input": "x", "previous_response_id": "resp_0"}'
            assert await status(said, "POST", PATH, body) == 200
        stand.assert_settled()


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("status", [429, 503])
async def test_an_engine_that_cannot_say_now_is_not_replaced_by_one_that_never_could(
    status: int,
) -> None:
    settings = FakeSettings(echoes=(f"{PATH}/resp_0", f"{PATH}/resp_0/cancel"))
    async with open_stand(*[settings] * 2, policy="round_robin") as stand:
        async with stand.post(PATH, max_tokens=2) as answer:
            home = answer.headers["x-hexgen-engine"]
        engine = stand.engines[int(home.rpartition("-")[2])]
        engine.fault = Fault("status", status=status)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            url = f"{stand.router.url}{PATH}/resp_0{path}"
            request = stand.client.request(method, url, timeout=ClientTimeout(60.0))
            async with request as answer:
                assert (method, answer.status) == (method, status)
        assert stand.context.service.waiting == 0
        stand.assert_settled()


def test_what_is_known_is_bounded() -> None:
    stored = Stored()
    for i in range(MAX_RESPONSES + 10):
        stored.note(f"resp_{i}", "a", 0.0)
    assert stored.engine_of("resp_9", 1.0) is None
    assert stored.engine_of("resp_10", 1.0) == "a"
    assert stored.engine_of("resp_10", KEPT_S) == "a", "used since"
    assert stored.engine_of("resp_11", KEPT_S + 1.0) is None


def test_names() -> None:
    assert told(b'{"object": "response", "id" : "resp_1"}', RESPONSE_ID) == "resp_1"
    assert told(b'{"id": "chatcmpl-1"}', RESPONSE_ID) is None
    assert stored_id("/v1/responses/resp_1/cancel") == "resp_1"
    assert stored_id("/v1/responses%2Fresp_1") == "resp_1"
    assert stored_id("/v1/responses/./resp_1") == "resp_1"
    assert stored_id("/v1/conversations/conv_1/items/msg_2") == "conv_1"
    assert stored_id("/v1/%63onversations/conv_1") == "conv_1"
    assert stored_id("/v1/conversations") is None
    assert stored_id("/v1/responses") is None
    assert stored_id("/v1/files/x") is None


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("said", ["conv_7", {"id": "conv_7"}])
async def test_a_conversation_stays_where_it_began(said: Any) -> None:
    async with open_stand(*[FakeSettings()] * 3, policy="round_robin") as stand:

        async def engine(**more: Any) -> str:
            async with stand.post(PATH, max_tokens=2, **more) as answer:
                assert answer.status == 200
                return str(answer.headers["x-hexgen-engine"])

        home = await engine(conversation=said)
        assert {await engine() for _ in range(6)} != {home}
        assert {await engine(conversation=said) for _ in range(5)} == {home}
        async with stand.get("/v1/conversations/conv_7/items") as answer:
            assert answer.headers["x-hexgen-engine"] == home
        stand.context.fleet.remove(home)
        moved = await engine(conversation=said)  # whether that will do is for an engine to say
        assert moved != home
        assert {await engine(conversation=said) for _ in range(4)} == {moved}
        stand.assert_settled()


async def test_a_conversation_belongs_to_the_engine_that_made_it_and_to_its_tenant(
    monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    created = json.dumps({"id": "conv_made", "object": "conversation"}).encode()

    async def makes(server: FakeServer, request: Any) -> Any:
        await server._note(request)
        return web.Response(body=created, content_type="application/json")

    monkeypatch.setattr(FakeServer, "_echo", makes)
    settings = FakeSettings(echoes=("/v1/conversations", "/v1/conversations/conv_made"))
    async with open_stand(*[settings] * 3, api_keys=keys, policy="round_robin") as stand:
        mine, others = as_key("sk-a"), as_key("sk-b")
        where = f"{stand.router.url}/v1/conversations"
        async with stand.client.post(where, headers=mine, json={}) as answer:
            assert answer.status == 200
            home = answer.headers["x-hexgen-engine"]
        for said, status in ((mine, 200), (others, 404), (mine, 200)):
            async with stand.post(PATH, headers=said, conversation="conv_made") as answer:
                assert answer.status == status
                assert status == 404 or answer.headers["x-hexgen-engine"] == home
            async with stand.client.get(f"{where}/conv_made", headers=said) as answer:
                assert answer.status == status
                assert status == 404 or answer.headers["x-hexgen-engine"] == home


@pytest.mark.parametrize("said", [None, 5, "", [], {"id": 5}, {}, {"id": ""}])
async def test_what_names_no_conversation_is_for_engines_to_judge(said: Any) -> None:
    async with open_stand() as stand, stand.post(PATH, conversation=said) as answer:
        assert answer.status == 200
