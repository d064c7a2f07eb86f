"""The openai SDK: ``python -m examples.clients.openai_sdk http://127.0.0.1:30000/v1 MODEL``."""

from __future__ import annotations

import sys

from openai import OpenAI

from examples.clients.remaining import Headers


def main(base_url: str, model: str) -> None:
    """Make two calls of one workflow."""
    client = OpenAI(base_url=base_url, api_key="none")
    headers = Headers("headlines", deadline_s=30)
    draft = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Write a headline."}],
        max_tokens=16,
        extra_headers=headers.of("draft"),
    )
    print(draft.choices[0].message.content)
    shorter = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Make it shorter."}],
        max_tokens=16,
        extra_headers=headers.of("shorten", final=True),
    )
    print(shorter.choices[0].message.content)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
