"""What type checkers know of clients: ``make types`` reads this file, nothing runs it."""

from __future__ import annotations

from typing import assert_type

import anthropic
import openai
from openai.types.chat import ChatCompletion

from hexgen_vllm.client import Workflow, async_http_client, http_client
from hexgen_vllm.client.stage import StageClient


def sync(client: openai.OpenAI, other: anthropic.Anthropic, azure: openai.AzureOpenAI) -> None:
    with Workflow(client, deadline_s=30, type="t") as workflow:
        assert_type(workflow, Workflow[openai.OpenAI])
        assert_type(workflow.stage("plan"), openai.OpenAI)
        with workflow.stage("plan") as llm:
            answer = llm.chat.completions.create(model="m", messages=[])
        assert_type(answer, ChatCompletion)
        workflow.stage("plan").chat.completions.create(model=1, messages=[])  # type: ignore[call-overload]
    with Workflow(other) as workflow_of_other:
        assert_type(workflow_of_other.stage("plan"), anthropic.Anthropic)
    assert_type(Workflow(azure).stage("plan"), openai.AzureOpenAI)


async def asynchronous(client: openai.AsyncOpenAI, other: anthropic.AsyncAnthropic) -> None:
    async with Workflow(client, deadline_s=30) as workflow:
        assert_type(workflow, Workflow[openai.AsyncOpenAI])
        async with workflow.stage("plan") as llm:
            assert_type(await llm.chat.completions.create(model="m", messages=[]), ChatCompletion)
    assert_type(Workflow(other).stage("plan"), anthropic.AsyncAnthropic)


def without_client() -> None:
    with Workflow(deadline_s=30) as workflow:
        assert_type(workflow, Workflow[StageClient])
        with workflow.stage("plan"):
            pass
        print(workflow.stage("plan").chat.completions)  # type: ignore[attr-defined]


def http(workflow: Workflow[openai.OpenAI]) -> None:
    assert_type(http_client(), openai.DefaultHttpxClient)
    assert_type(http_client(workflow, sdk="openai", timeout=5), openai.DefaultHttpxClient)
    assert_type(http_client(sdk="anthropic"), anthropic.DefaultHttpxClient)
    assert_type(async_http_client(workflow), openai.DefaultAsyncHttpxClient)
    assert_type(async_http_client(sdk="anthropic"), anthropic.DefaultAsyncHttpxClient)
    openai.OpenAI(http_client=http_client())
    openai.AsyncOpenAI(http_client=async_http_client())
    openai.OpenAI(http_client=async_http_client())  # type: ignore[arg-type]
    anthropic.Anthropic(http_client=http_client(sdk="anthropic"))
    http_client(sdk="requests")  # type: ignore[call-overload]
    http_client("w1")  # type: ignore[call-overload]


def refused() -> None:
    """What the program refuses with a sentence, too."""
    Workflow(http_client())  # type: ignore[call-overload]
    Workflow("http://router/v1")  # type: ignore[call-overload]
    Workflow(object())  # type: ignore[call-overload]
    Workflow(openai.OpenAI(), deadline="30")  # type: ignore[call-overload]
