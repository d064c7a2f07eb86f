"""What a model answers, computed once: with greedy sampling a prompt has one answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.report import results as files
from hexgen_vllm.yaml_files import read

MOST_TOKENS: Final = 200


class Answer(NamedTuple):
    """A text and how many tokens it has, beside those of the prompt."""

    text: str
    prompt_tokens: int
    tokens: int


class ModelAnswers:
    """The greedy answers of a model in a folder, computed here on the CPU when first asked for.

    Args:
        model: folder with weights and tokenizer.
        kept: file that answers are kept in between runs.

    Raises:
        ConfigError: ``model`` is no folder, or ``kept`` holds something else.
    """

    def __init__(self, model: Path, kept: Path) -> None:
        if not (model / "config.json").exists():
            raise ConfigError(f"model: {model} is no folder with a model.")
        self._model = model
        self._kept = kept
        self._known: dict[str, Answer] = {}
        if kept.exists():
            found = read(kept).value
            try:
                self._known = {key: Answer(*one) for key, one in found.items()}
            except (AttributeError, TypeError):
                raise ConfigError(f"answers: {kept} does not hold answers.") from None
        self._parts: tuple[Any, Any] | None = None

    def to(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """Return the answer to a chat."""
        said = json.dumps([dict(one) for one in messages])
        key = hashlib.sha256(said.encode()).hexdigest()[:20]
        if key not in self._known:
            self._known[key] = self._computed(messages)
        return self._known[key]

    def keep(self) -> None:
        """Write what is known."""
        files.write(self._kept, self._known)

    def _computed(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._parts is None:
            torch.set_num_threads(1)
            self._parts = (
                AutoTokenizer.from_pretrained(self._model),
                AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32).eval(),
            )
        tokenizer, model = self._parts
        text = tokenizer.apply_chat_template(
            [dict(one) for one in messages], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        said: list[int] = []
        step, past = prompt, None
        with torch.inference_mode():
            while len(said) < MOST_TOKENS:
                out = model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                token = int(out.logits[0, -1].argmax())
                said.append(token)
                if token == tokenizer.eos_token_id:
                    break
                step = torch.tensor([[token]])
        answer = tokenizer.decode(said, skip_special_tokens=True)
        return Answer(answer, prompt.shape[1], len(said))
