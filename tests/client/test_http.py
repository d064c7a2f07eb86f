"""HTTP clients that know their workflow, under the SDKs and alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import httpx2
import pytest

from hexgen_vllm.client import (
    AsyncWorkflowTransport,
    Workflow,
    WorkflowTransport,
    async_http_client,
    http_client,
)
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing import ManualClock

from .recorder import Recorder, anthropic, openai

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
MESSAGE = {**CHAT, "max_tokens": 8}


def by_openai(server: Recorder, http: Any) -> Any:
    return openai.OpenAI(
        api_key="k", base_url=server.url, http_client=http
    ).chat.completions.create(**CHAT)


def by_responses(server: Recorder, http: Any) -> Any:
    client = openai.OpenAI(api_key="k", base_url=server.url, http_client=http)
    return client.responses.create(model="m", input="hello")


def by_stream(server: Recorder, http: Any) -> Any:
    client = openai.OpenAI(api_key="k", base_url=server.url, http_client=http)
    return list(client.chat.completions.create(**CHAT, stream=True))


def by_anthropic(server: Recorder, http: Any) -> Any:
    base = server.url.removesuffix("/v1")
    return anthropic.Anthropic(api_key="k", base_url=base, http_client=http).messages.create(
        **MESSAGE
    )


def by_hand(server: Recorder, http: Any) -> Any:
    return http.post(f"{server.url}/chat/completions", json=CHAT)


SYNC = [by_openai, by_responses, by_stream, by_anthropic, by_hand]


@pytest.mark.parametrize("call", SYNC)
async def test_a_client_carries_the_workflow_it_is_used_in(
    call: Callable[[Recorder, Any], Any], server: Recorder
) -> None:
    clock = ManualClock()

    def work() -> str:
        with http_client() as http:
            call(server, http)
            with Workflow(deadline_s=30, type="report", tenant="gold", clock=clock) as flow:
                clock.advance(5.0)
                with flow.stage("plan"):
                    call(server, http)
                return flow.id

    flow_id = await asyncio.to_thread(work)
    outside, inside = server.headers
    assert outside == {}
    assert inside == {
        "workflow-id": flow_id, "workflow-type": "report", "workflow-deadline-ms": "25000.000",
        "stage": "plan", "tenant": "gold",
    }  # fmt: skip
    assert (server.finished, server.tenants) == ([flow_id], ["gold"])


async def test_asynchronous_clients_do_the_same(server: Recorder) -> None:
    async with async_http_client() as http:
        client = openai.AsyncOpenAI(api_key="k", base_url=server.url, http_client=http)
        base = server.url.removesuffix("/v1")
        other = anthropic.AsyncAnthropic(api_key="k", base_url=base, http_client=http)
        async with Workflow(deadline_s=30) as flow:

            async def ask(stage: str) -> None:
                async with flow.stage(stage):
                    await client.chat.completions.create(**CHAT)
                    await client.responses.create(model="m", input="hello")
                    await other.messages.create(**MESSAGE)

            await asyncio.gather(ask("a"), ask("b"))
    assert {one["workflow-id"] for one in server.headers} == {flow.id}
    assert sorted(one["stage"] for one in server.headers) == ["a"] * 3 + ["b"] * 3
    assert server.finished == [flow.id]


async def test_a_retry_says_what_is_left_then(server: Recorder) -> None:
    class Ticking(ManualClock):
        def now(self) -> float:
            return self.advance(1.0)

    server.failing = 1
    async with async_http_client() as http:
        client = openai.AsyncOpenAI(api_key="k", base_url=server.url, http_client=http)
        async with Workflow(deadline_s=100, clock=Ticking()):
            await client.chat.completions.create(**CHAT)
    first, second = (float(one["workflow-deadline-ms"]) for one in server.headers)
    assert second < first


async def test_a_retry_of_a_stage_of_an_sdk_client_does_so_too(server: Recorder) -> None:
    clock = ManualClock()
    server.failing = 2
    client = openai.AsyncOpenAI(api_key="k", base_url=server.url)
    request = client._client.event_hooks["request"]

    async def wait(_: object) -> None:
        clock.advance(7.0)

    client._client.event_hooks = {"request": [*request, wait]}
    async with client, Workflow(client, deadline_s=100, clock=clock) as flow:
        await flow.stage("a").chat.completions.create(**CHAT)
    assert [one["workflow-deadline-ms"] for one in server.headers] == [
        "93000.000", "86000.000", "79000.000",
    ]  # fmt: skip


async def test_a_deadline_that_the_caller_gives_is_kept(server: Recorder) -> None:
    own = {"X-Hexgen-Workflow-Deadline-Ms": "77"}
    client = openai.AsyncOpenAI(api_key="k", base_url=server.url)
    async with client, Workflow(client, deadline_s=100) as flow:
        await flow.stage("a").chat.completions.create(**CHAT, extra_headers=own)
    assert server.last["workflow-deadline-ms"] == "77"


async def test_one_workflow_may_be_given_and_its_calls_need_no_context(server: Recorder) -> None:
    flow = Workflow(deadline_s=30, type="t")
    async with async_http_client(flow) as http:
        client = openai.AsyncOpenAI(api_key="k", base_url=server.url, http_client=http)
        await client.chat.completions.create(**CHAT)
        async with flow:
            await asyncio.to_thread(lambda: None)
            await client.chat.completions.create(**CHAT)
        await client.chat.completions.create(**CHAT)
    before, within, after = server.headers
    assert (before, after) == ({}, {}), "only as long as it is open"
    assert within["workflow-id"] == flow.id


async def test_headers_of_the_caller_win_but_for_a_stale_deadline(server: Recorder) -> None:
    clock = ManualClock()
    async with async_http_client() as http, Workflow(deadline_s=30, clock=clock) as flow:
        stale = flow.headers("mine", final=True)
        clock.advance(10.0)
        await http.post(f"{server.url}/completions", json={}, headers=stale)
        other = {"x-hexgen-workflow-id": "other"}
        await http.post(f"{server.url}/completions", json={}, headers=other)
        await http.get(f"{server.url}/models")
    mine, others = server.headers[:2]
    assert (mine["stage"], mine["workflow-deadline-ms"]) == ("mine", "20000.000")
    assert others == {"workflow-id": "other"}
    assert server.finished == [], "the last call of the workflow said that it is the last"


@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_transports_serve_clients_made_elsewhere(library: Any, server: Recorder) -> None:
    transport = AsyncWorkflowTransport(library.AsyncHTTPTransport())
    async with library.AsyncClient(transport=transport) as http, Workflow(deadline_s=9) as flow:
        async with flow.stage("s"):
            assert (await http.post(f"{server.url}/chat/completions", json=CHAT)).status_code == 200
        server.slack_ms = "-1500"
        await http.post(f"{server.url}/chat/completions", json=CHAT)
        assert flow.slack_s == -1.5
        await asyncio.to_thread(by_transport, library, server, flow)
    assert [one["workflow-id"] for one in server.headers] == [flow.id] * 3


def by_transport(library: Any, server: Recorder, flow: Workflow[Any]) -> None:
    with library.Client(transport=WorkflowTransport(library.HTTPTransport(), flow)) as http:
        http.post(f"{server.url}/chat/completions", json=CHAT)


@pytest.mark.parametrize("library", [httpx, httpx2])
async def test_transports_announce_the_end(library: Any, server: Recorder) -> None:
    def work() -> str:
        transport = WorkflowTransport(library.HTTPTransport())
        with library.Client(transport=transport) as http, Workflow(deadline_s=9) as flow:
            http.post(f"{server.url}/chat/completions", json=CHAT)
            return flow.id

    assert server.finished == [await asyncio.to_thread(work)]
    transport = AsyncWorkflowTransport(library.AsyncHTTPTransport())
    async with library.AsyncClient(transport=transport) as http, Workflow(deadline_s=9) as flow:
        await http.post(f"{server.url}/chat/completions", json=CHAT)
    assert server.finished[1:] == [flow.id]


async def test_how_a_workflow_stands_is_known_after_an_answer(server: Recorder) -> None:
    async with async_http_client() as http, Workflow() as flow:
        assert flow.slack_s is None
        for said, known in (("2500.5", 2.5005), ("-10", -0.01), ("odd", -0.01)):
            server.slack_ms = said
            await http.post(f"{server.url}/chat/completions", json=CHAT)
            assert flow.slack_s == pytest.approx(known)


def chat(*messages: dict[str, Any], tools: tuple[str, ...] = ()) -> dict[str, Any]:
    listed = [{"type": "function", "function": {"name": name}} for name in tools]
    return {"model": "m", "messages": list(messages), **({"tools": listed} if tools else {})}


PLAN = {"role": "system", "content": "You plan. Today is 2024-01-01."}
LATER = {"role": "system", "content": "You plan. Today is 2025-12-31."}
JUDGE = {"role": "system", "content": [{"type": "text", "text": "You judge."}]}
USER = {"role": "user", "content": "How many?"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "3"}


async def test_stages_are_inferred_where_none_is_named(server: Recorder) -> None:
    async def stage(path: str, body: dict[str, Any]) -> str | None:
        await http.post(f"{server.url}{path}", json=body)
        return server.last.get("stage")

    async with async_http_client() as http, Workflow():
        path = "/chat/completions"
        assert await stage(path, chat(USER)) == "chat"
        plan = await stage(path, chat(PLAN, USER))
        assert plan == await stage(path, chat(LATER, {"role": "user", "content": "Other"}))
        judge = await stage(path, chat(JUDGE, USER))
        with_tools = await stage(path, chat(PLAN, USER, tools=("sql", "search")))
        assert with_tools == await stage(path, chat(PLAN, USER, tools=("search", "sql")))
        result = await stage(path, chat(PLAN, USER, RESULT, tools=("sql", "search")))
        assert result == f"{with_tools}-tool"
        assert len({"chat", plan, judge, with_tools, result}) == 5
        said = {"model": "m", "instructions": "You plan.", "input": "x"}
        assert (await stage("/responses", said) or "").startswith("response-")
        claude = {
            "system": "You plan.",
            "messages": [
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}
            ],
        }
        assert (await stage("/messages", claude) or "").endswith("-tool")
        assert await stage("/embeddings", {"input": "x"}) == "embedding"


async def test_nothing_is_sent_to_servers_where_no_call_was_made(server: Recorder) -> None:
    async with async_http_client() as http:
        async with Workflow(deadline_s=9):
            pass
        async with Workflow(deadline_s=9):
            await http.post(server.url.removesuffix("/v1") + "/elsewhere", json={})
    assert server.finished == []


class Unknown:
    """An object of another library, as ``ChatOpenAI``."""

    def chat(self) -> None:
        """LlamaIndex has a method of this name."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Workflow(Unknown()), "and Unknown has not; for other libraries leave it out"),
        (lambda: Workflow("http://127.0.0.1:1/v1"), "and str has not; for other libraries"),
        (lambda: http_client(Unknown()), "must be a Workflow of hexgen_vllm.client, not Unknown."),
        (lambda: async_http_client(sdk="cohere"), "sdk must be one of openai, anthropic, not"),
    ],
)
def test_what_is_unknown_is_refused_with_a_sentence(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make()
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_clients_of_other_sdks_with_such_methods_are_known() -> None:
    for client in (openai.OpenAI(api_key="k"), anthropic.Anthropic(api_key="k")):
        with Workflow(client) as flow:
            flow.stage("a")
