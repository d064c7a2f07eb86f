"""Prompts with given lengths and shared layers, as token ids or as text.

A layer is the head of an endless stream of tokens that its name determines, so two prompts share
a layer token for token, in this run and in any other. What belongs to one workflow or one call
also depends on a salt: runs with different salts never repeat a whole prompt, and a prefix cache
warmed by one run gives the next nothing but templates and schemas.

Token ids give exact lengths. Text has one short word for each token; how many tokens a server
makes of it depends on its tokenizer.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.workload import CallSpec, workflow_stream

DEFAULT_VOCAB_SIZE: Final = 1000  # every usual tokenizer has more
_WORDS: Final = (
    "age area art bank base bay bill bird board boat body book box boy bus car card case cat "
    "cell city class club coat code cost cup date day deal desk dish dog door duty east end "
    "eye face fact farm fire fish flag floor food form game gift girl goal gold gas hall hand "
    "hat head hill home hope hour ice idea iron item job joy key king lake land law leaf line "
    "list load loan lot man map mark meal milk mind mine moon name neck news night north note "
    "oil page pair park part path peak plan play poem pool post rain rate rest rice ring road "
    "rock role roof room root rule sale salt sand seat sea seed ship shop side sign site size "
    "skin snow soil son song soul star step sun tax tea team test text time tool top town tree "
    "trip tube type unit user view wall war way week west wind wing wood word work year zone"
)
WORDS: Final = tuple(_WORDS.split())


class PromptSource:
    """Makes the prompts of a run.

    Args:
        vocab_size: token ids are below it; the lowest tenth is left to special tokens.
        salt: sets this run's private tokens apart from other runs'.
        cached_streams: shared streams kept in memory.

    Raises:
        ConfigError: ``vocab_size`` is too small to tell prompts apart.
    """

    def __init__(
        self,
        vocab_size: int = DEFAULT_VOCAB_SIZE,
        *,
        salt: str = "",
        cached_streams: int = 256,
    ) -> None:
        if vocab_size < 32:
            raise ConfigError(f"vocab_size must be at least 32, not {vocab_size}.")
        self._ids = range(max(vocab_size // 10, 4), vocab_size)
        self._salt = salt
        self._cached_streams = cached_streams
        self._shared: OrderedDict[str, tuple[random.Random, list[int]]] = OrderedDict()

    def token_ids(self, workflow_id: str, index: int, call: CallSpec) -> list[int]:
        """Return the prompt of a workflow's ``index``-th call, exactly as long as it says."""
        private = workflow_stream(workflow_id)
        ids: list[int] = []
        for layer in call.layers:
            if layer.stream == private:
                ids.extend(self._draw(f"{self._salt}/{private}", layer.tokens))
            else:
                ids.extend(self._head(layer.stream, layer.tokens))
        ids.extend(self._draw(f"{self._salt}/{private}/{index}", call.own_tokens))
        return ids

    def text(self, workflow_id: str, index: int, call: CallSpec) -> str:
        """Return the same prompt as words."""
        ids = self.token_ids(workflow_id, index, call)
        return " ".join(WORDS[token % len(WORDS)] for token in ids)

    def _head(self, stream: str, count: int) -> list[int]:
        """Return the first ``count`` tokens of a shared stream."""
        if stream not in self._shared:
            self._shared[stream] = (random.Random(stream), [])
            if len(self._shared) > self._cached_streams:
                self._shared.popitem(last=False)
        self._shared.move_to_end(stream)
        rng, ids = self._shared[stream]
        if len(ids) < count:
            ids.extend(rng.choices(self._ids, k=count - len(ids)))
        return ids[:count]

    def _draw(self, stream: str, count: int) -> list[int]:
        """Return the first ``count`` tokens of a private stream, which is not kept."""
        return random.Random(stream).choices(self._ids, k=count)
