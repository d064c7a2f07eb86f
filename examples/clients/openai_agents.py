"""OpenAI Agents: ``python -m examples.clients.openai_agents http://127.0.0.1:30000/v1 MODEL``.

Needs ``pip install openai-agents``.
"""

from __future__ import annotations

import asyncio
import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

from hexgen_vllm.client import Workflow, async_http_client


async def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key="none", http_client=async_http_client())
    agent = Agent("writer", model=OpenAIChatCompletionsModel(model, client))
    async with Workflow(deadline_s=30, type="headlines") as workflow:
        async with workflow.stage("draft"):
            print((await Runner.run(agent, "Write a headline.")).final_output)
        async with workflow.stage("shorten"):
            print((await Runner.run(agent, "Make it shorter.")).final_output)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
