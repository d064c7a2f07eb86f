"""Training: the loss on answers only, batches of examples of all stages and lengths."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from examples.text2sql.train import model, schemas
from examples.text2sql.train.pairs import Pair, draw
from examples.text2sql.train.schemas import Source
from examples.text2sql.train.stages import Example, example

ASKED: Final = Path(__file__).parent.parent / "questions.yaml"
DEMO_SHARE: Final = 0.97
PART_TOKENS: Final = 768
PARTS: Final = 4
"""A batch has so many parts of so many tokens; examples of one part are of like length."""
MOST_TOKENS: Final = 384
_POOL: Final = 2048
RATE: Final = 2e-3
_WARMUP: Final = 20
_BETWEEN: Final = 50  # batches between two looks at the weights

Sample = tuple[list[int], int]  # tokens, and how many of them are the prompt


def normal(question: str) -> str:
    """Return the words of a question, without case and punctuation."""
    return " ".join(re.findall(r"\w+", question.lower()))


def withheld(*files: Path) -> frozenset[str]:
    """Return the questions that must not be trained on."""
    return frozenset(
        normal(entry["q"])
        for file in files
        for entries in yaml.safe_load(file.read_text()).values()
        for entry in entries
    )


class Examples:
    """The training set: the same for a seed, and without end.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"pairs/{seed}")
        self._withheld = withheld(ASKED)
        with tempfile.TemporaryDirectory() as folder:
            self._demo: Sequence[Source] = schemas.demo(Path(folder))

    def pairs(self) -> Iterator[Pair]:
        """Yield pairs whose questions may be trained on."""
        while True:
            known = self._rng.random() < DEMO_SHARE
            source = self._rng.choice(self._demo) if known else schemas.made_up(self._rng)
            for _ in range(1 if known else 3):
                pair = draw(source, self._rng)
                if normal(pair.question) not in self._withheld:
                    yield pair

    def __iter__(self) -> Iterator[Example]:
        for pair in self.pairs():
            yield example(pair, self._rng)


def rendered(tokenizer: Any, one: Example) -> tuple[str, str]:
    """Return prompt and answer as the model sees them."""
    messages = [
        {"role": "system", "content": one.prompt.system},
        {"role": "user", "content": one.prompt.user},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt, one.answer + model.EOS


def _samples(tokenizer: Any, examples: Iterator[Example]) -> list[Sample]:
    texts = [rendered(tokenizer, next(examples)) for _ in range(_POOL)]
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = encode([prompt for prompt, _ in texts], add_special_tokens=False)
    answers = encode([answer for _, answer in texts], add_special_tokens=False)
    return [
        (prompt.ids + answer.ids, len(prompt.ids))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(prompt.ids) + len(answer.ids) <= MOST_TOKENS
    ]


def _batches(tokenizer: Any, seed: int) -> Iterator[list[list[Sample]]]:
    rng, examples = random.Random(seed), iter(Examples(seed))
    while True:
        parts: list[list[Sample]] = []
        part: list[Sample] = []
        for sample in sorted(_samples(tokenizer, examples), key=lambda one: len(one[0])):
            if (len(part) + 1) * len(sample[0]) > PART_TOKENS:
                parts.append(part)
                part = []
            part.append(sample)
        rng.shuffle(parts)
        for at in range(0, len(parts) - PARTS + 1, PARTS):
            yield parts[at : at + PARTS]


def _loss(llama: Any, batch: list[Sample]) -> Any:
    """Return the sum of the losses of all tokens of the answers."""
    import torch
    from torch.nn.functional import cross_entropy

    width = max(len(tokens) for tokens, _ in batch)
    ids = torch.ones((len(batch), width), dtype=torch.long)
    asked = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, (tokens, start) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        asked[row, start - 1 : len(tokens) - 1] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = llama.model(ids, use_cache=False).last_hidden_state
        logits = llama.lm_head(hidden[asked])
    return cross_entropy(logits.float(), ids.roll(-1, 1)[asked], reduction="sum")


def train(
    out: Path,
    steps: int,
    seed: int,
    start: Path | None = None,
    rate: float = RATE,
    minutes: float | None = None,
    fall: float = 0.5,
) -> None:
    """Train for ``steps`` and write tokenizer and weights to ``out``, now and then in between.

    Args:
        out: folder.
        steps: batches.
        seed: of weights and pairs.
        start: folder of a model to go on with.
        rate: learning rate.
        minutes: how long to train, instead of ``steps``.
        fall: last share of the training, over which the learning rate falls to nothing.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(seed)
    if start is None:
        examples = iter(Examples(seed))
        blank = model.tokenizer([])
        texts = (text for _ in range(6000) for text in rendered(blank, next(examples)))
        tokenizer = model.tokenizer(texts)
        llama = model.llama(len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        llama = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    optimizers = _optimizers(llama, rate)
    begun, tokens, mean = time.monotonic(), 0, 0.0
    for step, batch in enumerate(_batches(tokenizer, seed), 1):
        done = step / steps if minutes is None else (time.monotonic() - begun) / (60 * minutes)
        last = done >= 1
        share = max(min(step / _WARMUP, (1 - done) / fall, 1.0), 0.0)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = rate * share
        answered = sum(len(words) - start for part in batch for words, start in part)
        total = 0.0
        for part in batch:
            loss = _loss(llama, part) / answered
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad()
        tokens += sum(len(words) for part in batch for words, _ in part)
        mean += (total - mean) / min(step, 25)
        if step % 25 == 0 or last:
            spent = time.monotonic() - begun
            print(f"step {step}/{steps} loss {mean:.4f} {tokens / spent:.0f} tokens/s "
                  f"{spent:.0f} s", flush=True)  # fmt: skip
        if step % _BETWEEN == 0 or last:
            write(out, llama, tokenizer)
        if last:
            return


def _optimizers(llama: Any, rate: float) -> list[Any]:
    """Return Muon for the matrices of the layers and AdamW for the rest."""
    import torch

    named = list(llama.named_parameters())
    matrices = [one for name, one in named if one.ndim == 2 and "layers." in name]
    rest = [one for name, one in named if one.ndim != 2 or "layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def write(out: Path, llama: Any, tokenizer: Any) -> None:
    """Write tokenizer and weights, these in bfloat16."""
    import copy

    import torch

    copy.deepcopy(llama).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
