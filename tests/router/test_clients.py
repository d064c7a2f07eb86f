"""The OpenAI client and our workflow client see what they expect through the router."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from hexgen_vllm import Workflow
from hexgen_vllm.testing.fake_server import FakeSettings, Fault
from hexgen_vllm.testing.stand import Stand, open_stand

SAID = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=stand.router.url + "/v1", api_key="any", max_retries=0
    ) as one:
        yield one


async def test_a_workflow_is_seen_as_one(stand: Stand, client: openai.AsyncOpenAI) -> None:
    coordinator = stand.context.service.coordinator
    async with Workflow(client, deadline_s=30, type="text2sql") as workflow:
        for stage in ("draft", "revise", "revise"):
            answer = await workflow.stage(stage).chat.completions.create(
                model="tiny", messages=SAID, max_tokens=4
            )
            assert answer.choices[0].message.content == " t0 t1 t2 t3"
        run = coordinator.workflows.get(workflow.id)
        assert run is not None
        assert run.stage_counts == {"draft": 1, "revise": 2}
        assert abs(run.deadline_s - run.started_s - 30) < 10, "but for the time on the way"
    assert len(coordinator.workflows) == 0, "leaving ends it"
    assert coordinator.workflows.shapes.known_stages() == {"text2sql": {"draft": 1, "revise": 2}}
    stand.assert_settled()


async def test_streams_through_the_client(stand: Stand, client: openai.AsyncOpenAI) -> None:
    events = await client.chat.completions.create(
        model="tiny", messages=SAID, max_tokens=5, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    async for event in events:
        text += (event.choices[0].delta.content or "") if event.choices else ""
        usage = event.usage or usage
    assert text == " t0 t1 t2 t3 t4"
    assert usage is not None
    assert usage.completion_tokens == 5


async def test_a_broken_stream_is_an_error_of_the_client(
    stand: Stand, client: openai.AsyncOpenAI
) -> None:
    for engine in stand.engines:
        engine.fault = Fault("reset", 3)
    events = await client.chat.completions.create(model="tiny", messages=SAID, stream=True)
    with pytest.raises(openai.APIError, match="before its answer was complete"):
        async for _ in events:
            pass


async def test_errors_have_their_class(stand: Stand, client: openai.AsyncOpenAI) -> None:
    async def ask(**more: object) -> None:
        await client.chat.completions.create(  # type: ignore[call-overload]
            **{"model": "tiny", "messages": SAID, **more}
        )

    with pytest.raises(openai.NotFoundError) as missing:
        await ask(model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(extra_headers={"x-hexgen-stage": "no spaces"})
    assert bad.value.param == "x-hexgen-stage"
    for status, error in ((429, openai.RateLimitError), (500, openai.InternalServerError)):
        for engine in stand.engines:
            engine.fault = Fault("status", status=status)
        with pytest.raises(error):
            await ask()
    stand.assert_settled()


async def test_the_models_of_the_fleet_are_listed() -> None:
    settings = FakeSettings(models=("a",)), FakeSettings(models=("b", "a"))
    async with open_stand(*settings) as stand, openai.AsyncOpenAI(
        base_url=stand.router.url + "/v1", api_key="any"
    ) as client:  # fmt: skip
        assert sorted([model.id async for model in client.models.list()]) == ["a", "b"]
