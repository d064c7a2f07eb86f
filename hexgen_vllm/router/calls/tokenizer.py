"""Has engines tokenize prompts, so that their KV events can be told whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from yarl import URL

from hexgen_vllm.router.calls.intake import Accepted
from hexgen_vllm.router.calls.prompt import CHUNK_CHARS, CHUNK_TOKENS
from hexgen_vllm.router.engines.blocks import text_ends
from hexgen_vllm.router.engines.fleet import Engine
from hexgen_vllm.router.http.client import Pool, in_time
from hexgen_vllm.router.http.messages import aside

_PATH: Final = "/tokenize"
_WITHIN_S: Final = 10.0
_MOST_BYTES: Final = 2**24
_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(dict[str, Any])
# What of a request shapes its prompt.
_SHAPES: Final = ("model", "prompt", "messages", "tools", "add_special_tokens", "chat_template",
                  "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
                  "mm_processor_kwargs")  # fmt: skip
Tokens = tuple[Sequence[int], Sequence[float]]
"""Token ids, and where in them the chunks of the prompt end."""


class Tokenizer:
    """Asks engines for tokens.

    Args:
        pool: connections to engines.
        key: shown to them.
    """

    def __init__(self, pool: Pool, key: str | None) -> None:
        self._pool = pool
        self._key = "" if key is None else f"authorization: Bearer {key}\r\n"

    async def tokens(self, accepted: Accepted, engine: Engine) -> Tokens | None:
        """Return the tokens of a prompt, ``None`` if they cannot be had or do not tell blocks.

        Blocks of adapters and of salted prompts hold more than tokens tell.
        """
        call, prompt = accepted.call, accepted.prompt
        if any(card.get("id") == call.model and card.get("parent") for card in engine.cards):
            return None
        if b'"cache_salt"' in accepted.body:
            return None
        if not isinstance(prompt.start, str):
            return prompt.start, [CHUNK_TOKENS * (i + 1.0) for i in range(len(call.prefix))]
        try:
            return await in_time(self._asked(accepted, engine), _WITHIN_S)
        except (OSError, ValueError, TimeoutError, RecursionError):
            return None  # it stays a guess

    async def _asked(self, accepted: Accepted, engine: Engine) -> Tokens | None:
        body = await aside(_request, accepted.body)
        url = URL(engine.worker.url + _PATH, encoded=True)
        head = (
            f"POST {url.raw_path_qs} HTTP/1.1\r\nhost: {url.host_port_subcomponent}\r\n{self._key}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        answer = await self._pool.send(url, head.encode("utf-8", "surrogateescape"), body)
        try:
            said = await answer.body(_MOST_BYTES)
        finally:
            answer.close()
        if answer.status != 200 or not said:
            return None
        tokens = (await aside(_DECODER.decode, said)).get("tokens")
        if not isinstance(tokens, list) or not tokens:
            return None
        chunks, chars = len(accepted.call.prefix), accepted.prompt.chars
        return tokens, text_ends(chunks, CHUNK_CHARS, chars, len(tokens))


def _request(body: bytes) -> bytes:
    asked = _DECODER.decode(body)
    return _ENCODER.encode({name: asked[name] for name in _SHAPES if name in asked})
