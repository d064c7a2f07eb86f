"""Vanna 2's agent: ``python -m examples.clients.vanna_sql URL MODEL FILE QUESTION``.

Needs ``pip install 'vanna[openai]'``. Its calls to the model go through our HTTP client and are
one workflow with one deadline.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

from vanna import Agent, AgentConfig, ToolRegistry, User
from vanna.core.user import RequestContext, UserResolver
from vanna.integrations.local import LocalFileSystem
from vanna.integrations.local.agent_memory import DemoAgentMemory
from vanna.integrations.openai import OpenAILlmService
from vanna.integrations.sqlite import SqliteRunner
from vanna.tools import RunSqlTool

from hexgen_vllm.client import Workflow, http_client


class Everyone(UserResolver):  # type: ignore[misc,unused-ignore]
    """Takes everyone for the same user."""

    async def resolve_user(self, request_context: RequestContext) -> User:
        """Return that user."""
        return User(id="someone", username="someone", group_memberships=[])


async def main(base_url: str, model: str, file: str, question: str) -> None:
    """Ask one question about a file of SQLite."""
    tools = ToolRegistry()
    results = LocalFileSystem(tempfile.mkdtemp())  # it keeps every result as a file
    tools.register_local_tool(RunSqlTool(SqliteRunner(file), results), access_groups=[])
    agent = Agent(
        llm_service=OpenAILlmService(model, "none", base_url=base_url, http_client=http_client()),
        tool_registry=tools,
        user_resolver=Everyone(),
        agent_memory=DemoAgentMemory(),
        config=AgentConfig(stream_responses=False),
    )
    with Workflow(deadline_s=60, type="vanna-sql"):
        async for part in agent.send_message(RequestContext(), question):
            if part.simple_component is not None and hasattr(part.simple_component, "text"):
                print(part.simple_component.text)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
