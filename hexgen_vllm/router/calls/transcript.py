"""What a client has seen of a stream, and how another engine goes on from there.

Engines are asked for the token ids of what they send (vLLM's ``return_token_ids``); the client
does not see them. When the engine is lost, another one gets prompt and answer so far as token ids
at ``/v1/completions``, whatever endpoint the call came in at, and its events are written again as
if they came from the first one.

The cut between both answers is after a token whose text the client has in full. Text that comes
after such a token is no token's alone: it may be held back until a character is whole, or as long
as it may be the beginning of a stop string. Tokens after the cut are computed again. Where the
client has seen text of theirs, it must come out the same, so that has to be decoded greedily.

    tokens   | a | b | c | d |            the engine's last event brought c and d, which begin "…"
    text     |  The  c|                   cut after b: the other engine says c again, and then d
"""

from __future__ import annotations

import json
import re
from array import array
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from hexgen_vllm.router.engines.watch import Usage
from hexgen_vllm.router.errors import EngineFailed, Outcome

_PATH: Final = "/v1/completions"  # it takes token ids

_DECODER: Final = msgspec.json.Decoder(dict[str, Any])
_ENCODER: Final = msgspec.json.Encoder()
_IDS: Final = re.compile(rb'("(?:prompt_)?token_ids": ?)\[[\d, ]*\]')
_BLANKS: Final = b" \t\r\n"
_COMPLETION_LIMIT: Final = 16  # of a completion that names none
# Fields that mean the same in both requests.
_CARRIED: Final = frozenset((
    "allowed_token_ids", "cache_salt", "ignore_eos", "include_stop_str_in_output", "logit_bias",
    "min_p", "model", "priority", "repetition_penalty", "session_id", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stop_token_ids", "stream", "stream_interval",
    "stream_options", "temperature", "top_k", "top_p", "user", "vllm_xargs",
))  # fmt: skip
_COUNTED: Final = ("max_tokens", "max_completion_tokens", "min_tokens")
# What they are for is done when the prompt is there as token ids, or is no engine's business.
_SPENT: Final = frozenset((
    "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
    "continue_final_message", "documents", "include_reasoning", "messages", "metadata",
    "parallel_tool_calls", "prompt", "prompt_cache_key", "reasoning_effort", "request_id",
    "safety_identifier", "seed", "service_tier", "store", "tool_choice", "truncate_prompt_tokens",
    "truncation_side", *_COUNTED,
))  # fmt: skip
# Fields that need what only the first engine has, unless they have this value.
_OFF: Final[Mapping[str, Any]] = {
    "bad_words": [], "best_of": 1, "echo": False, "frequency_penalty": 0, "logprobs": False, "n": 1,
    "presence_penalty": 0, "response_format": {"type": "text"}, "tools": [], "top_logprobs": 0,
    "use_beam_search": False,
}  # fmt: skip
_THOUGHT: Final = ("reasoning", "reasoning_content")


class Terms(NamedTuple):
    """What matters when an answer goes on.

    Attributes:
        held: most characters that an engine looks at for the beginning of a stop string.
        inclusive: they are sent all the same, as the stop string itself will be.
        greedy: an engine that computes a token again gets the same one.
    """

    held: int
    inclusive: bool
    greedy: bool


def terms_of(body: Mapping[str, Any]) -> Terms | None:
    """Return the terms of a request, ``None`` where its answer cannot go on elsewhere.

    It cannot where the sampler looks at the answer so far (penalties, structured output, a seed),
    where more than text comes (tools, log probabilities, several choices), or where the prompt is
    more than its token ids (pictures).

    Args:
        body: of ``/v1/chat/completions`` or ``/v1/completions``.
    """
    if body.get("stream") is not True or not (_is_text(body) and _limits_are_sound(body)):
        return None
    temperature, seed = body.get("temperature"), body.get("seed")
    greedy = type(temperature) in (int, float) and temperature == 0
    held = _held(body.get("stop"))
    if held is None or (seed is not None and not greedy):
        return None
    if not all(_goes_on(name, value, body) for name, value in body.items()):
        return None
    return Terms(held, body.get("include_stop_str_in_output") is True, greedy)


def _goes_on(name: str, value: Any, body: Mapping[str, Any]) -> bool:
    if value is None or name in _CARRIED or name in _SPENT:
        return True
    if name == "tools" and body.get("tool_choice") == "none":
        return True
    off = _OFF.get(name)
    return off is not None and value == off and isinstance(value, bool) is isinstance(off, bool)


def _held(stop: Any) -> int | None:
    found = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return None
    return max((len(one) for one in found), default=1) - 1


def _limits_are_sound(body: Mapping[str, Any]) -> bool:
    limits = (body.get(name) for name in _COUNTED)
    return all(limit is None or (type(limit) is int and limit >= 0) for limit in limits)


def _is_text(body: Mapping[str, Any]) -> bool:
    """Whether a prompt is one, and of text or token ids only."""
    messages, prompt = body.get("messages"), body.get("prompt")
    if messages is None:
        if isinstance(prompt, list) and prompt:
            one = len(prompt) == 1 and isinstance(prompt[0], str)
            return one or all(type(token) is int for token in prompt)
        return isinstance(prompt, str)
    if prompt is not None or not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else 0
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, (str, list))):
            return False
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            return False
    return True


def asking(body: bytes) -> bytes | None:
    """Return a request that asks for token ids too, ``None`` if its bytes are no plain JSON."""
    inner = body.lstrip(_BLANKS)
    if json.detect_encoding(body) != "utf-8" or not inner.startswith(b"{"):
        return None
    return b'{"return_token_ids":true,' + inner[1:]


class Transcript:
    """A stream as its client sees it, whichever engines it comes from.

    Args:
        terms: of the call.
        chat: its events are those of ``/v1/chat/completions``, not of ``/v1/completions``.

    Attributes:
        broken: the engine said in an event that it failed; the client has not been told.
        ended: the last token has come, though perhaps not the last event.
    """

    __slots__ = (
        "_again", "_chat", "_cuts", "_from", "_head", "_ids", "_moved", "_odd", "_prompt", "_said",
        "_seen", "_terms", "_text", "_usage", "broken", "ended",
    )  # fmt: skip

    def __init__(self, terms: Terms, *, chat: bool) -> None:
        self._terms, self._chat = terms, chat
        self._head: dict[str, Any] = {}
        self._prompt: list[int] = []
        self._ids = array("I")
        # Tokens before a cut, and characters of text before it; of the cuts whose text the client
        # has seen only the last is kept, and those after it.
        self._cuts = deque(((0, 0),))
        self._seen = 0  # characters that the client has
        self._said = 0  # characters that the present engine has sent, and what it went on from
        self._text, self._from = "", 0  # what the client has seen from there on
        self._odd = self._moved = self._again = self._usage = False
        self.broken = self.ended = False

    @property
    def goes_on(self) -> bool:
        """Whether another engine can go on."""
        if self._odd or self.ended or not self._cuts:
            return False
        if self._starts_anew():
            return True
        if not self._prompt:
            return False
        position = self._cuts[0][1]
        return position <= self._released() and (position == self._seen or self._terms.greedy)

    @property
    def tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self._ids)

    def usage(self, said: Usage) -> Usage:
        """Return the counts of the whole answer, of which ``said`` is known without token ids."""
        if self._odd or not self._prompt:
            return said
        return Usage(len(self._prompt), said.cached_tokens, len(self._ids))

    def _starts_anew(self) -> bool:
        """Whether the client has a role at most: what an engine makes of a prompt is its own."""
        return self._chat and not self._seen

    def _released(self) -> int:
        """Return the characters of which none can be part of a stop string that is to come."""
        return max(self._seen - (self._terms.held if self._terms.inclusive else 0), 0)

    def take(self, ready: bytes) -> bytes:
        """Take in whole events of the present engine; return those that the client gets.

        Raises:
            EngineFailed: they do not go on as the client has seen it.
        """
        told, rest = [], ready
        while rest and not self.broken:
            event, end, rest = rest.partition(b"\n\n")
            told.append(self._told(event) + end if event else end)
        return b"".join(one for one in told if one != b"\n\n") if self._moved else b"".join(told)

    def _told(self, event: bytes) -> bytes:
        """Return an event as the client gets it, empty if it gets none."""
        if not event.startswith((b"data: {", b"data:{")):
            self._odd = self._odd or b"\r" in event
            return event
        try:
            chunk = _DECODER.decode(event[5:])
        except (ValueError, RecursionError):
            chunk = {}
        if chunk.get("error") and not self._is_ours_to_mend(chunk["error"]):
            return event
        if self.broken:
            return b""
        head = self._head
        said = self._noted(chunk)
        if not self._moved:
            return _IDS.sub(rb"\1null", event)
        if self._odd and not self._again:
            raise EngineFailed(Outcome.ERROR)
        told = self._anew(chunk) if self._again else self._rewritten(chunk, said)
        return b"" if told is None else b"data: " + _ENCODER.encode({**told, **head})

    def _is_ours_to_mend(self, error: Any) -> bool:
        code = error.get("code") if isinstance(error, dict) else None
        self.broken = self.goes_on and (type(code) is not int or code >= 500)
        return self.broken

    def _noted(self, chunk: dict[str, Any]) -> str:
        """Take in an event; return the text in it that is new to the client."""
        choices = chunk.get("choices")
        if not self._head:
            self._head = {n: chunk[n] for n in ("id", "object", "created", "model") if n in chunk}
        self._usage = self._usage or (choices == [] and bool(chunk.get("usage")))
        if choices == []:
            return ""
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            self._odd = True
            return ""
        prompt = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if isinstance(prompt, list) and not self._prompt:
            self._prompt = prompt
        text, ids = self._text_of(choice), choice.get("token_ids") or []
        self.ended = self.ended or choice.get("finish_reason") is not None
        if (text and not ids and not self.ended) or not isinstance(ids, list):
            self._odd = True  # this engine does not tell
            return text
        self._ids.extend(ids)
        return self._see(text, len(ids))

    def _is_chat(self) -> bool:
        return self._chat and (self._again or not self._moved)

    def _text_of(self, choice: dict[str, Any]) -> str:
        """Return the text of an event."""
        delta = choice.get("delta") if self._is_chat() else choice
        name = "text" if delta is choice else "content"
        if not isinstance(delta, dict):
            self._odd = True
            return ""
        text = delta.get(name) or ""
        if name == "content":
            more = {n for n, value in delta.items() if value and n not in ("role", "content")}
            if more and not text and more.issubset(_THOUGHT) and not self._seen:
                self._cuts.clear()  # thoughts are no text of the answer: it goes on after them
            elif more:
                self._odd = True
        if not isinstance(text, str):
            self._odd = True
            return ""
        return text

    def _see(self, text: str, tokens: int) -> str:
        """Take in text that came with so many tokens; return what of it is new."""
        again = min(self._seen - self._said, len(text))
        if again:
            begin = self._said - self._from
            if text[:again] != self._text[begin : begin + again]:
                self._odd = True
                raise EngineFailed(Outcome.LOST)
        self._said += len(text)
        if self.ended and self._said < self._seen:
            raise EngineFailed(Outcome.LOST)
        fresh = text[again:]
        self._seen += len(fresh)
        self._text += fresh
        if tokens == 1 and text:  # all that is known of it has been decoded
            held = 0 if self._terms.inclusive else self._terms.held
            self._cuts.append((len(self._ids), self._said + held))
        released = self._released()
        while len(self._cuts) > 1 and self._cuts[1][1] <= released:
            self._cuts.popleft()
        needed = min(self._cuts[0][1], self._said) if self._cuts else self._said
        drop = min(needed - self._from, len(self._text))
        if drop > 0:
            self._text, self._from = self._text[drop:], self._from + drop
        return fresh

    def _anew(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """Return an event of an answer that began anew, ``None`` for one that the client has."""
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            delta = choice.get("delta") or {}
            if "role" in delta and not any(delta[n] for n in delta if n != "role"):
                return None
            choice.update({n: None for n in choice if n.endswith("token_ids")})
        return {n: None if n.endswith("token_ids") else value for n, value in chunk.items()}

    def _rewritten(self, chunk: dict[str, Any], text: str) -> dict[str, Any] | None:
        """Return an event of a rest as one of the whole, ``None`` if it says nothing."""
        choices = []
        for choice in chunk.get("choices", ()):
            if not text and choice.get("finish_reason") is None:
                return None
            choices.append(self._choice(choice, text))
        told = {**chunk, "choices": choices}
        if isinstance(chunk.get("usage"), dict):
            told["usage"] = self._whole_usage(chunk["usage"])
        return told

    def _choice(self, choice: dict[str, Any], text: str) -> dict[str, Any]:
        bare = {n: None if n.endswith("token_ids") else value for n, value in choice.items()}
        if not self._chat:
            return {**bare, "text": text}
        told = {"index": 0, "delta": {"content": text}, **bare}
        del told["text"]
        told.pop("prompt_token_ids", None)
        if told.get("finish_reason") is None:
            told.pop("stop_reason", None)
        return told

    def _whole_usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the counts of the whole answer, from those of its last part."""
        prompt = len(self._prompt)
        total = usage.get("total_tokens")
        told = {**usage, "prompt_tokens": prompt}
        if type(total) is int:
            told["completion_tokens"] = total - prompt
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and type(cached := details.get("cached_tokens")) is int:
            told["prompt_tokens_details"] = {**details, "cached_tokens": min(cached, prompt)}
        return told

    def rest(self, body: bytes, path: str) -> tuple[str, bytes] | None:
        """Return the request for the rest of the answer; what comes next answers it.

        Args:
            body: the client's request.
            path: of that.

        Returns:
            Path and body, ``None`` where nothing is left to ask for or that cannot be written.
        """
        if self._starts_anew():
            anew = asking(body)
            self._prompt, self._moved, self._again, self.broken = [], True, True, False
            del self._ids[:]
            self._cuts = deque(((0, 0),))
            return None if anew is None else (path, anew)
        tokens, position = self._cuts[0]
        try:
            asked = _DECODER.decode(body)
        except (ValueError, RecursionError):  # odd, though it could be read when it came
            return None
        most = asked.get("max_completion_tokens") if self._chat else None
        if most is None:
            usual = None if self._chat else _COMPLETION_LIMIT
            most = asked.get("max_tokens", usual)
        if most is not None and most <= tokens:
            return None
        sent = {name: value for name, value in asked.items() if name in _CARRIED}
        sent["prompt"] = self._prompt + self._ids[:tokens].tolist()
        sent["max_tokens"] = None if most is None else most - tokens
        if asked.get("min_tokens"):
            sent["min_tokens"] = max(asked["min_tokens"] - tokens, 0)
        sent["return_token_ids"] = True
        del self._ids[tokens:]
        self._cuts = deque(((tokens, position),))
        self._said, self._moved, self._again, self.broken = position, True, False, False
        return _PATH, _ENCODER.encode(sent)

    def closing(self, body: bytes) -> bytes | None:
        """Return the events that are missing where the engine went after its last token.

        Args:
            body: the client's request.

        Returns:
            ``None`` if they should hold counts that are not known.
        """
        done = b"data: [DONE]\n\n"
        try:
            options = _DECODER.decode(body).get("stream_options")
        except (ValueError, RecursionError):
            return None
        if self._usage or not (isinstance(options, dict) and options.get("include_usage")):
            return done
        if self._odd or not self._prompt:
            return None
        prompt, tokens = len(self._prompt), len(self._ids)
        usage = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + tokens,
            "completion_tokens": tokens,
        }
        event = _ENCODER.encode({**self._head, "choices": [], "usage": usage})
        return b"data: " + event + b"\n\n" + done
