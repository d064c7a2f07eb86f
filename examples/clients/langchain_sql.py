"""LangChain's SQL agent: ``python -m examples.clients.langchain_sql URL MODEL FILE QUESTION``.

Needs ``pip install langchain langchain-openai langchain-community``. The agent makes as many calls
as it likes and names no stages: they are one workflow all the same, with stages by their structure.
"""

from __future__ import annotations

import sys

from langchain.agents import create_agent
from langchain_community.agent_toolkits import SQLDatabaseToolkit
from langchain_community.utilities import SQLDatabase
from langchain_openai import ChatOpenAI

from hexgen_vllm.client import Workflow, async_http_client, http_client

RULES = "You answer questions about a database. Look at its tables, write a query, run it, answer."


def main(base_url: str, model: str, file: str, question: str) -> None:
    """Ask one question about a file of SQLite."""
    llm = ChatOpenAI(
        base_url=base_url,
        api_key="none",
        model=model,
        http_client=http_client(),
        http_async_client=async_http_client(),
    )
    database = SQLDatabase.from_uri(f"sqlite:///file:{file}?mode=ro&uri=true")
    tools = SQLDatabaseToolkit(db=database, llm=llm).get_tools()
    agent = create_agent(llm, tools, system_prompt=RULES)
    with Workflow(deadline_s=60, type="langchain-sql"):
        answer = agent.invoke({"messages": [{"role": "user", "content": question}]})
    print(answer["messages"][-1].content)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
