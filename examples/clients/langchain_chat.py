"""LangChain: ``python -m examples.clients.langchain_chat http://127.0.0.1:30000/v1 MODEL``.

Needs ``pip install langchain-openai``.
"""

from __future__ import annotations

import sys

from langchain_openai import ChatOpenAI

from examples.clients.remaining import Headers


def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    llm = ChatOpenAI(base_url=base_url, api_key="none", model=model, max_tokens=16)
    headers = Headers("headlines", deadline_s=30)
    print(llm.invoke("Write a headline.", extra_headers=headers.of("draft")).content)
    last = headers.of("shorten", final=True)
    print(llm.invoke("Make it shorter.", extra_headers=last).content)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
