"""LangChain: ``python -m examples.clients.langchain_chat http://127.0.0.1:30000/v1 MODEL``.

Needs ``pip install langchain-openai``. Agents and chains of LangChain take the same object.
"""

from __future__ import annotations

import sys

from langchain_openai import ChatOpenAI

from hexgen_vllm.client import Workflow, async_http_client, http_client


def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    llm = ChatOpenAI(
        base_url=base_url,
        api_key="none",
        model=model,
        max_tokens=16,
        http_client=http_client(),
        http_async_client=async_http_client(),
    )
    with Workflow(deadline_s=30, type="headlines") as workflow:
        with workflow.stage("draft"):
            print(llm.invoke("Write a headline.").content)
        with workflow.stage("shorten"):
            print(llm.invoke("Make it shorter.").content)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
