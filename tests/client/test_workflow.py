"""Workflows around the real OpenAI clients, against a server that records headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from hexgen_vllm.client import DeadlineExceeded, Workflow
from hexgen_vllm.client.sampling import with_deadline
from hexgen_vllm.client.scope import current
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing import ManualClock

from .recorder import Recorder, openai

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def client(server: Recorder) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(api_key="k", base_url=server.url, max_retries=0) as opened:
        yield opened


async def test_every_call_carries_the_workflow(server: Recorder, client: Any) -> None:
    clock = ManualClock()
    async with Workflow(client, deadline_s=30, type="text2sql", tenant="gold", clock=clock) as flow:
        answer = await flow.stage("revise").chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == "yes"
        assert server.last == {
            "workflow-id": flow.id,
            "workflow-type": "text2sql",
            "workflow-deadline-ms": "30000.000",
            "stage": "revise",
            "tenant": "gold",
        }


async def test_the_deadline_sent_is_what_remains_at_each_call(
    server: Recorder, client: Any
) -> None:
    clock = ManualClock()
    async with Workflow(client, deadline_s=30, clock=clock) as flow:
        create = flow.stage("revise").chat.completions.create
        await create(**CHAT)
        clock.advance(12.5)
        await create(**CHAT)
        assert flow.remaining_s == 17.5
    sent = [h["workflow-deadline-ms"] for h in server.headers]
    assert sent == ["30000.000", "17500.000"]


async def test_hints_are_sent_with_their_stage_only(server: Recorder, client: Any) -> None:
    async with Workflow(client) as flow:
        hinted = flow.stage("a", expected_output_tokens=64, stages_left=3, final=False)
        await hinted.chat.completions.create(**CHAT)
        await flow.stage("b").chat.completions.create(**CHAT)
    first, second = server.headers
    assert first["expected-output-tokens"] == "64"
    assert first["stages-left"] == "3"
    assert first["workflow-final"] == "0"
    assert set(second) == {"workflow-id", "stage"}


async def test_all_endpoints_and_raw_and_streaming_answers(server: Recorder, client: Any) -> None:
    async with Workflow(client) as flow:
        llm = flow.stage("s")
        await llm.completions.create(model="m", prompt="p")
        await llm.embeddings.create(model="m", input="p")
        await llm.responses.create(model="m", input="p")
        raw = await llm.chat.completions.with_raw_response.create(**CHAT)
        assert raw.parse().choices[0].message.content == "yes"
        async with llm.chat.completions.with_streaming_response.create(**CHAT) as response:
            await response.read()
        stream = await llm.with_options(timeout=5).chat.completions.create(**CHAT, stream=True)
        parts = [chunk.choices[0].delta.content async for chunk in stream]
        assert parts == ["yes"]
    assert [path for path, _ in server.calls] == [
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        *["/v1/chat/completions"] * 3,
    ]
    assert all(headers["stage"] == "s" for headers in server.headers)


async def test_headers_of_the_caller_are_kept_and_win(server: Recorder, client: Any) -> None:
    async with Workflow(client) as flow:
        await flow.stage("a").chat.completions.create(
            **CHAT, extra_headers={"x-hexgen-stage": "other", "x-hexgen-tenant": "t"}
        )
    assert (server.last["stage"], server.last["tenant"]) == ("other", "t")


async def test_parallel_stages_share_the_workflow(server: Recorder, client: Any) -> None:
    async with Workflow(client) as flow:
        await asyncio.gather(
            *(flow.stage(f"s{k}").chat.completions.create(**CHAT) for k in range(8))
        )
    assert {h["workflow-id"] for h in server.headers} == {flow.id}
    assert {h["stage"] for h in server.headers} == {f"s{k}" for k in range(8)}


async def test_workflows_side_by_side_do_not_see_each_other(server: Recorder, client: Any) -> None:
    async def one(name: str) -> str:
        async with Workflow(client, type=name) as flow:
            await asyncio.sleep(0)
            await flow.stage("s").chat.completions.create(**CHAT)
            return flow.id

    ids = await asyncio.gather(*(one(f"t{k}") for k in range(6)))
    assert len(set(ids)) == 6
    assert {(h["workflow-id"], h["workflow-type"]) for h in server.headers} == {
        (i, f"t{k}") for k, i in enumerate(ids)
    }


@pytest.mark.parametrize(("inner_s", "left"), [(10, "10000.000"), (100, "30000.000")])
async def test_a_nested_workflow_is_a_part_with_the_tighter_deadline(
    server: Recorder, client: Any, inner_s: float, left: str
) -> None:
    async def helper() -> None:
        async with Workflow(client, deadline_s=inner_s) as part:
            await part.stage("inner").chat.completions.create(**CHAT)

    async with Workflow(client, deadline_s=30, type="t", tenant="x", clock=ManualClock()) as flow:
        await asyncio.gather(helper(), helper())
        await flow.stage("outer").chat.completions.create(**CHAT)
    *inner, outer = server.headers
    for headers in inner:
        assert headers == {**outer, "stage": "inner", "workflow-deadline-ms": left}
    assert outer["workflow-deadline-ms"] == "30000.000"
    assert server.finished == [flow.id]


async def test_an_id_of_its_own_makes_a_nested_workflow_separate(
    server: Recorder, client: Any
) -> None:
    async with Workflow(client, deadline_s=30, type="t", clock=ManualClock()):
        async with Workflow(client, deadline_s=60, workflow_id="other") as apart:
            await apart.stage("s").chat.completions.create(**CHAT)
        assert server.finished == ["other"]
    assert server.last == {
        "workflow-id": "other",
        "workflow-deadline-ms": "30000.000",
        "stage": "s",
    }
    assert server.finished == ["other"]


def staged(flow: Any, name: str) -> Iterator[int]:
    with flow.stage(name):
        yield 1
        yield 2


def test_generators_may_leave_their_stages_in_any_order() -> None:
    """They share the context of whoever runs them, with those that are never finished, too."""
    with Workflow() as flow:
        first, second, endless = (staged(flow, name) for name in "abc")
        next(first)
        next(second)
        list(first)
        list(second)
        assert current() == flow.open_scope
        next(endless)
    assert current() is None
    with Workflow() as other:
        assert other.id != flow.id, "it is no part of one that has ended"
        list(endless)
        assert current() == other.open_scope
    assert current() is None


async def test_what_outlives_its_workflow_is_in_none() -> None:
    go_on = asyncio.Event()

    async def work() -> bool:
        await go_on.wait()
        return current() is None

    async with Workflow():
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
    go_on.set()
    assert await task


@pytest.mark.parametrize(
    "wrong", ["soon", [5], timedelta(seconds=5), 5j, 1e10, 10**400], ids=lambda w: str(w)[:9]
)
def test_a_deadline_that_no_server_takes_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="deadline_s must be"):
        Workflow(deadline_s=wrong)
    with pytest.raises(ConfigError, match="deadline_s must be"):
        with_deadline(SimpleNamespace(extra_args=None), deadline_s=wrong)


async def test_stages_entered_as_a_context_enclose_what_is_opened_inside(
    server: Recorder, client: Any
) -> None:
    async with Workflow(client) as flow:
        async with flow.stage("answer") as llm:
            await llm.chat.completions.create(**CHAT)
            async with Workflow(client) as part, part.stage("look-up"):
                await part.stage("rank").chat.completions.create(**CHAT)
        await flow.stage("check").chat.completions.create(**CHAT)
    assert [h["stage"] for h in server.headers] == ["answer", "answer/look-up/rank", "check"]
    assert not client.is_closed()


@pytest.mark.parametrize("final", [True, False])
async def test_leaving_ends_the_workflow_unless_the_last_call_did(
    server: Recorder, client: Any, final: bool
) -> None:
    async with Workflow(client) as flow:
        await flow.stage("a").chat.completions.create(**CHAT)
        await flow.stage("b", final=final).chat.completions.create(**CHAT)
    assert server.last["workflow-final"] == str(int(final))
    assert server.finished == ([] if final else [flow.id])


async def test_a_call_after_the_final_one_opens_the_end_again(
    server: Recorder, client: Any
) -> None:
    async with Workflow(client) as flow:
        await flow.stage("a", final=True).chat.completions.create(**CHAT)
        await flow.stage("b").chat.completions.create(**CHAT)
    assert server.finished == [flow.id]


async def test_a_workflow_without_calls_ends_silently(server: Recorder, client: Any) -> None:
    async with Workflow(client):
        pass
    assert server.finished == []


async def test_a_workflow_ends_when_its_body_fails(server: Recorder, client: Any) -> None:
    flow = Workflow(client)

    async def body() -> None:
        async with flow:
            await flow.stage("a").chat.completions.create(**CHAT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert server.finished == [flow.id]


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_the_end_names_the_tenant(server: Recorder, client: Any, tenant: str | None) -> None:
    async with Workflow(client, tenant=tenant) as flow:
        await flow.stage("a").chat.completions.create(**CHAT)
    assert (server.finished, server.tenants) == ([flow.id], [tenant])


@pytest.mark.parametrize("status", [404, 500])
async def test_servers_that_cannot_end_workflows_do_no_harm(
    server: Recorder, client: Any, status: int
) -> None:
    server.finish_status = status
    async with Workflow(client) as flow:
        await flow.stage("a").chat.completions.create(**CHAT)
    assert server.finished == [flow.id]


async def test_late_calls_are_sent_with_one_millisecond(server: Recorder, client: Any) -> None:
    clock = ManualClock()
    async with Workflow(client, deadline_s=1, clock=clock) as flow:
        clock.advance(9)
        await flow.stage("a").chat.completions.create(**CHAT)
        assert flow.remaining_s == -8
    assert server.last["workflow-deadline-ms"] == "1.000"


async def test_late_calls_can_be_refused_before_they_are_sent(
    server: Recorder, client: Any
) -> None:
    clock = ManualClock()
    async with Workflow(client, deadline_s=1, late="raise", clock=clock) as flow:
        clock.advance(1)
        with pytest.raises(DeadlineExceeded, match=flow.id):
            await flow.stage("a").chat.completions.create(**CHAT)
    assert server.calls == []
    assert server.finished == []


async def test_the_synchronous_client_does_the_same(server: Recorder) -> None:
    def play() -> str:
        with (
            openai.OpenAI(api_key="k", base_url=server.url, max_retries=0) as client,
            Workflow(client, deadline_s=30, type="t", clock=ManualClock()) as flow,
        ):
            flow.stage("a").chat.completions.create(**CHAT)
            with flow.stage("b"), Workflow(client, deadline_s=5) as part:
                part.stage("c").completions.create(model="m", prompt="p")
            return flow.id

    flow_id = await asyncio.to_thread(play)
    first, second = server.headers
    assert first["workflow-deadline-ms"] == "30000.000"
    assert second == {**first, "stage": "b/c", "workflow-deadline-ms": "5000.000"}
    assert server.finished == [flow_id]


async def test_a_synchronous_client_may_be_left_asynchronously(server: Recorder) -> None:
    with openai.OpenAI(api_key="k", base_url=server.url, max_retries=0) as client:
        async with Workflow(client) as flow:
            await asyncio.to_thread(flow.stage("a").chat.completions.create, **CHAT)
    assert server.finished == [flow.id]


async def test_headers_serve_any_other_library(client: Any) -> None:
    async with Workflow(client, deadline_s=2, workflow_id="w", clock=ManualClock()) as flow:
        assert flow.headers("a", final=True) == {
            "x-hexgen-workflow-id": "w",
            "x-hexgen-workflow-deadline-ms": "2000.000",
            "x-hexgen-stage": "a",
            "x-hexgen-workflow-final": "1",
        }


def test_any_object_with_the_methods_will_do() -> None:
    seen: list[dict[str, str]] = []

    class Completions:
        def create(self, *, extra_headers: dict[str, str] | None = None) -> int:
            seen.append(extra_headers or {})
            return 7

        def count(self) -> int:
            return len(seen)

    class Double:
        completions = Completions()
        base_url = "http://127.0.0.1:1/v1"

    with Workflow(Double(), workflow_id="w") as flow:
        llm = flow.stage("a")
        assert llm.completions.create() == 7
        assert llm.completions.count() == 1
        assert llm.base_url == Double.base_url
    assert seen == [{"x-hexgen-workflow-id": "w", "x-hexgen-stage": "a"}]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"type": "has space"}, "workflow_type"),
        ({"workflow_id": "x" * 129}, "workflow_id"),
        ({"tenant": ""}, "tenant"),
        ({"late": "maybe"}, "late"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Workflow(object(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"name": "not ok"}, "stage"),
        ({"name": "x" * 65}, "stage"),
        ({"name": "s", "expected_output_tokens": 0}, "expected_output_tokens"),
        ({"name": "s", "stages_left": -1}, "stages_left"),
    ],
)
def test_bad_stages_are_refused_before_any_call(arguments: dict[str, Any], field: str) -> None:
    with Workflow(openai.OpenAI(api_key="k")) as flow, pytest.raises(ConfigError, match=field):
        flow.stage(**arguments)


def test_a_workflow_is_entered_before_use_and_once() -> None:
    flow = Workflow(openai.OpenAI(api_key="k"))
    with pytest.raises(ConfigError, match="must be entered"):
        flow.stage("a")
    with flow, pytest.raises(ConfigError, match="only once"):
        flow.__enter__()
