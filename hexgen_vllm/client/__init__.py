"""Workflows with a deadline around any OpenAI client.

    from openai import AsyncOpenAI
    from hexgen_vllm.client import Workflow

    async with Workflow(AsyncOpenAI(), deadline_s=30, type="text2sql") as wf:
        answer = await wf.stage("revise").chat.completions.create(...)

Nothing here imports openai or vLLM.
"""

from __future__ import annotations

from hexgen_vllm.client.sampling import with_deadline
from hexgen_vllm.client.scope import DeadlineExceeded
from hexgen_vllm.client.workflow import Workflow

__all__ = ["DeadlineExceeded", "Workflow", "with_deadline"]
