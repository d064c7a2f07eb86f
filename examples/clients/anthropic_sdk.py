"""Anthropic: ``python -m examples.clients.anthropic_sdk http://127.0.0.1:30000/v1 MODEL``.

Needs ``pip install anthropic``. A :class:`~hexgen_vllm.client.Workflow` takes its client as it is.
"""

from __future__ import annotations

import sys

from anthropic import Anthropic

from hexgen_vllm.client import Workflow


def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    client = Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none")
    with Workflow(client, deadline_s=30, type="headlines") as workflow:
        for stage, said in (("draft", "Write a headline."), ("shorten", "Make it shorter.")):
            answer = workflow.stage(stage).messages.create(
                model=model, max_tokens=16, messages=[{"role": "user", "content": said}]
            )
            print("".join(part.text for part in answer.content if part.type == "text"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
