"""The generation endpoints: what a body of each means and how its stream ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One generation endpoint.

    Attributes:
        path: its path, the same at the engine.
        name: what metrics call it.
        prompt_fields: body fields that make up the prompt, in the order the model sees them.
        limit_fields: body fields that limit the output, the first one present counts.
        default_limit: output limit of a body without them; ``None`` is the model's.
        end_marks: lines of which one ends a complete stream.
        extra_events: events of a stream that bring no token.
        generates: whether it produces tokens.
    """

    path: str
    name: str
    prompt_fields: tuple[str, ...]
    limit_fields: tuple[str, ...] = ()
    default_limit: int | None = None
    end_marks: tuple[bytes, ...] = ()
    extra_events: int = 0
    generates: bool = True


_DONE: Final = (b"\ndata: [DONE]", b"\ndata:[DONE]")

ENDPOINTS: Final = (
    Endpoint(
        "/v1/chat/completions",
        "chat",
        ("tools", "messages"),
        ("max_completion_tokens", "max_tokens"),
        end_marks=_DONE,
        extra_events=2,
    ),
    Endpoint(
        "/v1/completions",
        "completions",
        ("prompt",),
        ("max_tokens",),
        default_limit=16,
        end_marks=_DONE,
        extra_events=1,
    ),
    Endpoint(
        "/v1/responses",
        "responses",
        ("instructions", "tools", "input"),
        ("max_output_tokens",),
        end_marks=(
            b"\nevent: response.completed",
            b"\nevent: response.incomplete",
            b"\nevent: response.failed",
            *_DONE,
        ),
        extra_events=8,
    ),
    Endpoint(
        "/v1/messages",
        "messages",
        ("tools", "system", "messages"),
        ("max_tokens",),
        end_marks=(b"\nevent: message_stop",),
        extra_events=5,
    ),
    Endpoint("/v1/embeddings", "embeddings", ("input",), generates=False),
)
