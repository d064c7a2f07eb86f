"""What a fake engine says: bodies and events in the forms vLLM's OpenAI server uses.

The text is ``" t0 t1 t2 …"``, one word a token, so that any lost, doubled or moved event shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"
_CHARS_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class AskedAnswer:
    """What one request asks for.

    Attributes:
        path: endpoint.
        model: model name of the request.
        stream: events instead of one body.
        prompt_tokens: length of the prompt.
        cached_tokens: of which the prefix cache holds.
        output_tokens: tokens the answer has.
        finish_reason: ``length`` or ``stop``.
        with_usage: whether a stream ends with a usage chunk.
    """

    path: str
    model: str
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    with_usage: bool

    def words(self) -> Iterator[str]:
        """Yield the text of each token."""
        return (f" t{i}" for i in range(self.output_tokens))


def read_work(path: str, body: dict[str, Any], *, cached: int, default_tokens: int) -> AskedAnswer:
    """Read a request as vLLM would; forced lengths are honoured.

    Args:
        path: endpoint.
        body: decoded request.
        cached: most prompt tokens that count as cached.
        default_tokens: length of an answer that is neither forced nor cut.
    """
    limits = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    most = next((body[name] for name in limits if isinstance(body.get(name), int)), None)
    least = body.get("min_tokens") or 0
    wanted = most if body.get("ignore_eos") and most else max(default_tokens, least)
    tokens = wanted if most is None else min(wanted, most)
    prompt = _prompt_tokens(body)
    return AskedAnswer(
        path=path,
        model=str(body.get("model", "")),
        stream=bool(body.get("stream")),
        prompt_tokens=prompt,
        cached_tokens=min(cached, max(prompt - 1, 0)),
        output_tokens=tokens,
        finish_reason="length" if tokens == most else "stop",
        with_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body.get("prompt", body.get("messages", body.get("input", "")))
    if isinstance(prompt, list) and prompt and all(isinstance(t, int) for t in prompt):
        return len(prompt)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return max(len(text) // _CHARS_PER_TOKEN, 1)


def _usage(work: AskedAnswer) -> dict[str, Any]:
    return {
        "prompt_tokens": work.prompt_tokens,
        "total_tokens": work.prompt_tokens + work.output_tokens,
        "completion_tokens": work.output_tokens,
        "prompt_tokens_details": {"cached_tokens": work.cached_tokens},
    }


def _chat(work: AskedAnswer) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(work.words())}
    choice = {"index": 0, "message": message, "finish_reason": work.finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": work.model,
            "choices": [choice], "usage": _usage(work)}  # fmt: skip


def _completion(work: AskedAnswer) -> dict[str, Any]:
    choice = {"index": 0, "text": "".join(work.words()), "finish_reason": work.finish_reason}
    return {"id": "cmpl-1", "object": "text_completion", "model": work.model,
            "choices": [choice], "usage": _usage(work)}  # fmt: skip


def _response(work: AskedAnswer) -> dict[str, Any]:
    part = {"type": "output_text", "text": "".join(work.words())}
    usage = {"input_tokens": work.prompt_tokens, "output_tokens": work.output_tokens,
             "input_tokens_details": {"cached_tokens": work.cached_tokens}}  # fmt: skip
    return {"id": "resp-1", "object": "response", "status": "completed", "model": work.model,
            "output": [{"type": "message", "content": [part]}], "usage": usage}  # fmt: skip


def _message(work: AskedAnswer) -> dict[str, Any]:
    part = {"type": "text", "text": "".join(work.words())}
    return {"id": "msg-1", "type": "message", "role": "assistant", "model": work.model,
            "content": [part], "stop_reason": "max_tokens",
            "usage": _anthropic_usage(work)}  # fmt: skip


def _anthropic_usage(work: AskedAnswer) -> dict[str, Any]:
    fresh = work.prompt_tokens - work.cached_tokens
    return {"input_tokens": fresh, "cache_read_input_tokens": work.cached_tokens,
            "output_tokens": work.output_tokens}  # fmt: skip


def _embedding(work: AskedAnswer) -> dict[str, Any]:
    row = {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
    usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
    return {"object": "list", "model": work.model, "data": [row], "usage": usage}


_BODIES: Final[dict[str, Callable[[AskedAnswer], dict[str, Any]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _message,
    "/v1/embeddings": _embedding,
}
PATHS: Final = frozenset(_BODIES)


def body(work: AskedAnswer) -> bytes:
    """Return the whole answer as JSON."""
    return json.dumps(_BODIES[work.path](work)).encode()


def _event(content: dict[str, Any], name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def _chunk(work: AskedAnswer, choice: dict[str, Any] | None) -> bytes:
    chat = work.path == "/v1/chat/completions"
    chunk: dict[str, Any] = {
        "id": "chatcmpl-1" if chat else "cmpl-1",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "model": work.model,
        "choices": [] if choice is None else [{"index": 0, **choice}],
    }
    if choice is None:
        chunk["usage"] = _usage(work)
    return _event(chunk)


def _openai_events(work: AskedAnswer) -> Iterator[bytes]:
    chat = work.path == "/v1/chat/completions"
    if chat:
        yield _chunk(work, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    for i, word in enumerate(work.words(), start=1):
        reason = work.finish_reason if i == work.output_tokens else None
        said: dict[str, Any] = {"delta": {"content": word}} if chat else {"text": word}
        yield _chunk(work, {**said, "finish_reason": reason})
    if work.with_usage:
        yield _chunk(work, None)
    yield DONE


def _response_events(work: AskedAnswer) -> Iterator[bytes]:
    yield _event({"type": "response.created"}, "response.created")
    for word in work.words():
        name = "response.output_text.delta"
        yield _event({"type": name, "delta": word}, name)
    name = "response.completed"
    yield _event({"type": name, "response": _response(work)}, name)


def _message_events(work: AskedAnswer) -> Iterator[bytes]:
    start = {**_message(work), "content": [], "usage": {"input_tokens": 0, "output_tokens": 0}}
    yield _event({"type": "message_start", "message": start}, "message_start")
    for word in work.words():
        delta = {"type": "text_delta", "text": word}
        yield _event({"type": "content_block_delta", "delta": delta}, "content_block_delta")
    usage = _anthropic_usage(work)
    yield _event({"type": "message_delta", "delta": {}, "usage": usage}, "message_delta")
    yield _event({"type": "message_stop"}, "message_stop")


def events(work: AskedAnswer) -> Iterator[bytes]:
    """Yield the answer as server-sent events."""
    if work.path == "/v1/responses":
        return _response_events(work)
    if work.path == "/v1/messages":
        return _message_events(work)
    return _openai_events(work)
