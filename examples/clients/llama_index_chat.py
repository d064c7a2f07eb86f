"""LlamaIndex: ``python -m examples.clients.llama_index_chat http://127.0.0.1:30000/v1 MODEL``.

Needs ``pip install llama-index-llms-openai-like``.
"""

from __future__ import annotations

import sys

from llama_index.llms.openai_like import OpenAILike

from hexgen_vllm.client import Workflow, async_http_client, http_client


def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    llm = OpenAILike(
        api_base=base_url,
        api_key="none",
        model=model,
        is_chat_model=True,
        max_tokens=16,
        http_client=http_client(),
        async_http_client=async_http_client(),
    )
    with Workflow(deadline_s=30, type="headlines") as workflow:
        with workflow.stage("draft"):
            print(llm.complete("Write a headline.").text)
        with workflow.stage("shorten"):
            print(llm.complete("Make it shorter.").text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
