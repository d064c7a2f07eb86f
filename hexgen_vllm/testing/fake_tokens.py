"""Answers of a fake engine that depend on every token before, as those of a model do.

Tokens are bytes, decoding is greedy, and an answer that is cut anywhere goes on in one way only.
Events are those of vLLM: text is held back until a character is whole and while it may begin a
stop string, one event may bring several tokens, and token ids come where they are asked for.
"""

from __future__ import annotations

import codecs
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

PATHS: Final = ("/v1/chat/completions", "/v1/completions")
END: Final = 256
"""The token that ends an answer."""
_MEAN_CHARS: Final = 40
_CHARS: Final = [c.encode() for c in 'abc defé ghïj ß漢字 \n"\\🙂👍klmn,. 0123']
_DONE: Final = b"data: [DONE]\n\n"


def prompt_ids(path: str, body: dict[str, Any]) -> list[int]:
    """Return the tokens of the prompt of a request."""
    prompt = json.dumps(body["messages"]) + "\nassistant:" if path == PATHS[0] else body["prompt"]
    return list(prompt.encode()) if isinstance(prompt, str) else list(prompt)


def tokens(prompt: Sequence[int]) -> Iterator[int]:
    """Yield what follows a prompt, up to :data:`END`; it may break off within a character."""
    data = bytes(prompt)
    begun = max((n for n in (1, 2, 3) if n <= len(data) and _is_begun(data[-n:])), default=0)
    state, part = zlib.crc32(data[: len(data) - begun]), data[len(data) - begun :]
    while part or state % _MEAN_CHARS:
        char = _CHARS[zlib.crc32(b"next", state) % len(_CHARS)]
        yield from char[len(part) :]
        state, part = zlib.crc32(char, state), b""
    yield END


def _is_begun(data: bytes) -> bool:
    sizes = (0xF0, 4), (0xE0, 3), (0xC0, 2)
    return len(data) < next((size for first, size in sizes if data[0] >= first), 0)


def events(path: str, body: dict[str, Any], name: str, sizes: Sequence[int]) -> Iterator[bytes]:
    """Yield an answer as server-sent events.

    Args:
        path: of the request, one of :data:`PATHS`.
        body: of the request.
        name: of the answer.
        sizes: tokens of each event, over and over.
    """
    chat, asked = path == PATHS[0], bool(body.get("return_token_ids"))
    prompt = prompt_ids(path, body)
    options = body.get("stream_options") or {}
    head = {
        "id": name,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 1_700_000_000 + zlib.crc32(name.encode()) % 10**6,
        "model": body.get("model"),
    }

    def event(choice: dict[str, Any] | None, count: int, **more: Any) -> bytes:
        chunk = {**head, "choices": [] if choice is None else [{"index": 0, **choice}], **more}
        if options.get("continuous_usage_stats") or choice is None:
            chunk["usage"] = {
                "prompt_tokens": len(prompt),
                "total_tokens": len(prompt) + count,
                "completion_tokens": count,
            }
        said = json.dumps(chunk, separators=(",", ":"), ensure_ascii=False)
        return f"data: {said}\n\n".encode()

    known = prompt if asked else None
    if chat:
        delta = {"role": "assistant", "content": ""}
        first = {"delta": delta, "logprobs": None, "finish_reason": None}
        yield event(first, 0, prompt_token_ids=known)
    count = 0
    for ids, text, reason in _steps(body, prompt, sizes, None if chat else 16):
        count += len(ids)
        choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        choice.update({"logprobs": None, "finish_reason": reason})
        if reason or not chat:
            choice["stop_reason"] = None
        if not chat:
            choice["prompt_token_ids"] = known if count == len(ids) else None
        yield event({**choice, "token_ids": ids if asked else None}, count)
    if options.get("include_usage"):
        yield event(None, count)
    yield _DONE


def _steps(
    body: dict[str, Any], prompt: list[int], sizes: Sequence[int], usual: int | None
) -> Iterator[tuple[list[int], str, str | None]]:
    """Yield the tokens of each event, its text, and why the answer ends with it."""
    most = body.get("max_completion_tokens") or body.get("max_tokens", usual)
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    kept = bool(body.get("include_stop_str_in_output"))
    held = 0 if kept else max(map(len, stops), default=1) - 1
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    coming, size = tokens(prompt), itertools.cycle(sizes)
    text, sent, count, reason = "", 0, 0, None
    while reason is None:
        ids: list[int] = []
        for token in itertools.islice(coming, next(size)):
            ids.append(token)
            if token == END:
                reason = "stop"
                break
            text += decoder.decode(bytes((token,)))
            found = [(text.find(s) + len(s), s) for s in stops if s in text]
            if found:
                end, which = min(found)
                text, reason = text[: end if kept else end - len(which)], "stop"
                break
            if count + len(ids) == most:
                reason = "length"
                break
        count += len(ids)
        upto = max(len(text) - (0 if reason else held), sent)
        yield ids, text[sent:upto], reason
        sent = upto
