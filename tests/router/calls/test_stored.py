"""What follows a stored response goes to the engine that has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hexgen_vllm.router.calls.stored import (
    KEPT_S,
    MAX_RESPONSES,
    Stored,
    named,
    previous,
)
from hexgen_vllm.testing import fake_answers
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import open_stand

PATH = "/v1/responses"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_goes_where_the_response_before_it_is(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    numbers = iter(range(100))
    whole, events = fake_answers.body, fake_answers.events

    def named_body(work: fake_answers.Work) -> bytes:
        return json.dumps({**json.loads(whole(work)), "id": f"resp_{next(numbers)}"}).encode()

    def named_events(work: fake_answers.Work) -> Iterator[bytes]:
        first = {"response": {"id": f"resp_{next(numbers)}"}, "type": "response.created"}
        yield f"event: response.created\ndata: {json.dumps(first)}\n\n".encode()
        yield from list(events(work))[1:]

    monkeypatch.setattr(fake_answers, "body", named_body)
    monkeypatch.setattr(fake_answers, "events", named_events)
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


def test_what_is_known_is_bounded() -> None:
    stored = Stored()
    for i in range(MAX_RESPONSES + 10):
        stored.learn(b'{"id": "resp_%d"}' % i, "a", 0.0)
    assert stored.engine_of("resp_9", 1.0) is None
    assert stored.engine_of("resp_10", 1.0) == "a"
    assert stored.engine_of("resp_10", KEPT_S) == "a", "used since"
    assert stored.engine_of("resp_11", KEPT_S + 1.0) is None


def test_names() -> None:
    assert previous(b'{"previous_response_id" : "resp_1"}') == "resp_1"
    assert previous(b'{"input": "\\"previous_response_id\\": \\"x\\""}') is None
    assert previous(b'{"previous_response_id": null}') is None
    assert named("/v1/responses/resp_1/cancel") == "resp_1"
    assert named("/v1/responses") is None
