"""Workflows with a deadline around any OpenAI client.

    from openai import AsyncOpenAI
    from hexgen_vllm.client import Workflow

    async with Workflow(AsyncOpenAI(), deadline_s=30, type="text2sql") as wf:
        answer = await wf.stage("revise").chat.completions.create(...)

Frameworks that make calls themselves take an HTTP client instead: :func:`http_client`.
Nothing here imports openai or vLLM.
"""

from __future__ import annotations

from hexgen_vllm.client.http import (
    AsyncWorkflowTransport,
    WorkflowTransport,
    async_http_client,
    http_client,
)
from hexgen_vllm.client.sampling import with_deadline
from hexgen_vllm.client.scope import DeadlineExceeded
from hexgen_vllm.client.workflow import Workflow

__all__ = [
    "AsyncWorkflowTransport",
    "DeadlineExceeded",
    "Workflow",
    "WorkflowTransport",
    "async_http_client",
    "http_client",
    "with_deadline",
]
