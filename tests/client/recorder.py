"""What a test server was sent and what it answers, and the clients that send it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


class Sdk:
    """A library of thousands of modules: imported when it is used, not when tests are collected."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if not attribute[0].isupper():  # pytest asks every object for marks of its own
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)


openai, anthropic = Sdk("openai"), Sdk("anthropic")


@dataclass
class Recorder:
    """Requests in order of arrival, and where to send them.

    Attributes:
        url: base URL for a client, with ``/v1``.
        calls: path and ``x-hexgen-*`` headers, without the prefix, of every call.
        finished: ids of the workflows whose end was announced.
        finish_status: how announcements are answered.
        failing: how many of the next calls are answered with 503.
        slack_ms: how workflows stand, as told with every answer.
        tenants: whose workflows those were, as announced.
    """

    url: str = ""
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    finish_status: int = 200
    failing: int = 0
    slack_ms: str | None = None
    tenants: list[str | None] = field(default_factory=list)

    @property
    def headers(self) -> list[dict[str, str]]:
        return [headers for _, headers in self.calls]

    @property
    def last(self) -> dict[str, str]:
        return self.calls[-1][1]


ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "yes"},
            }
        ],
    },
    "/v1/completions": {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "text": "yes"}],
    },
    "/v1/embeddings": {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    "/v1/messages": {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "yes"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "/v1/responses": {"id": "r", "object": "response", "output": [], "model": "m"},
}
CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"yes"},"finish_reason":null}]}\n\ndata: [DONE]\n\n'
)
