"""The generation endpoints: what a body of each means and how its stream ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ERROR: Final = (
    rb'data: ?\{ ?"error": ?(?!null)|data: ?\{ ?"(?:object|type)": ?"error"|event: ?error\b'
)


def _marks(end: bytes) -> re.Pattern[bytes]:
    """Return a pattern for lines that begin an event after which nothing follows."""
    return re.compile(rb"\n(?:(?P<end>" + end + rb")|(?P<error>" + _ERROR + rb"))")


_NO_END: Final = _marks(rb"(?!)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One generation endpoint.

    Attributes:
        path: its path, the same at the engine.
        name: what metrics call it.
        prompt_fields: body fields that make up the prompt, in the order the model sees them.
        limit_fields: body fields that limit the output, the first one present counts.
        default_limit: output limit of a body without them; ``None`` is the model's.
        marks: finds the beginnings of events that end a stream, as groups ``end`` and ``error``.
        extra_events: events of a stream that bring no token.
        generates: whether it produces tokens.
    """

    path: str
    name: str
    prompt_fields: tuple[str, ...]
    limit_fields: tuple[str, ...] = ()
    default_limit: int | None = None
    marks: re.Pattern[bytes] = _NO_END
    extra_events: int = 0
    generates: bool = True


_DONE: Final = rb"data: ?\[DONE\]"
_RESPONSE_ENDS: Final = rb"response\.(?:completed|incomplete|failed|cancelled)"

ENDPOINTS: Final = (
    Endpoint(
        "/v1/chat/completions",
        "chat",
        ("tools", "messages"),
        ("max_completion_tokens", "max_tokens"),
        marks=_marks(_DONE),
        extra_events=2,
    ),
    Endpoint(
        "/v1/completions",
        "completions",
        ("prompt",),
        ("max_tokens",),
        default_limit=16,
        marks=_marks(_DONE),
        extra_events=1,
    ),
    Endpoint(
        "/v1/responses",
        "responses",
        ("instructions", "tools", "input"),
        ("max_output_tokens",),
        marks=_marks(
            rb'event: ?%b\b|data: ?\{ ?"type": ?"%b"|%b' % (_RESPONSE_ENDS, _RESPONSE_ENDS, _DONE)
        ),
        extra_events=8,
    ),
    Endpoint(
        "/v1/messages",
        "messages",
        ("tools", "system", "messages"),
        ("max_tokens",),
        marks=_marks(rb'event: ?message_stop\b|data: ?\{ ?"type": ?"message_stop"'),
        extra_events=5,
    ),
    Endpoint("/v1/embeddings", "embeddings", ("input",), generates=False),
)
