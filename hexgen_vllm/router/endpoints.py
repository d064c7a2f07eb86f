"""The endpoints of calls: what a body of each means and how its stream ends."""

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
    """One endpoint of engines.

    Attributes:
        path: its path, the same at the engine.
        name: what metrics call it.
        prompt_fields: body fields that make up the prompt, in the order the model sees them.
        limit_fields: body fields that limit the output, the first one present counts; a dot leads
            into an object.
        default_limit: output limit of a body without them; ``None`` is the model's.
        marks: finds the beginnings of events that end a stream, as groups ``end`` and ``error``;
            where none ends it, the connection tells.
        extra_events: events of a stream that bring no token.
        generates: whether it produces tokens.
        placed: whether it costs an engine so much that the policy places it.
        known: whether its bodies are JSON objects and can be sent again after a failure; those of
            an endpoint that only engines know may be anything and do anything.
        carries_fields: whether its bodies have ``vllm_xargs``.
        goes_on: whether another engine can go on with a stream of it.
    """

    path: str
    name: str
    prompt_fields: tuple[str, ...]
    limit_fields: tuple[str, ...] = ()
    default_limit: int | None = None
    marks: re.Pattern[bytes] = _NO_END
    extra_events: int = 0
    generates: bool = True
    placed: bool = True
    known: bool = True
    carries_fields: bool = False
    goes_on: bool = False

    @property
    def ends(self) -> bool:
        """Whether an event ends its streams."""
        return self.marks is not _NO_END


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
        carries_fields=True,
        goes_on=True,
    ),
    Endpoint(
        "/v1/completions",
        "completions",
        ("prompt",),
        ("max_tokens",),
        default_limit=16,
        marks=_marks(_DONE),
        extra_events=1,
        carries_fields=True,
        goes_on=True,
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
        carries_fields=True,
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

_PROMPTS: Final = ("tools", "system", "instructions", "messages", "prompt", "input", "query",
                   "documents", "text", "texts", "inputs", "token_ids")  # fmt: skip


def _pooling(path: str, name: str, *prompt_fields: str) -> Endpoint:
    return Endpoint(path, name, prompt_fields, generates=False)


_SCORED: Final = ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2")
MORE_ENDPOINTS: Final = (
    *(_pooling(p, "rerank", "query", "documents") for p in ("/rerank", "/v1/rerank", "/v2/rerank")),
    *(_pooling(path, "score", *_SCORED) for path in ("/score", "/v1/score")),
    _pooling("/pooling", "pooling", "messages", "input", "data"),
    _pooling("/classify", "classify", "messages", "input"),
    Endpoint(
        "/inference/v1/generate",
        "generate",
        ("token_ids",),
        ("sampling_params.max_tokens",),
        default_limit=16,
    ),
    Endpoint(
        "/invocations",
        "invocations",
        _PROMPTS,
        ("max_completion_tokens", "max_tokens"),
    ),
    *(
        Endpoint(path, "tokenize", (), generates=False, placed=False)
        for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
    ),
)
"""Other endpoints of vLLM whose bodies are known."""

OTHER: Final = Endpoint("", "other", _PROMPTS, generates=False, known=False)
"""Any endpoint that engines have and the router does not know."""

ENDPOINT_NAMES: Final = tuple(
    dict.fromkeys(endpoint.name for endpoint in (*ENDPOINTS, *MORE_ENDPOINTS, OTHER))
)
"""What metrics call them."""
