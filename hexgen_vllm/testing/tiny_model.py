"""A tiny random-weight Llama with a working tokenizer, built locally for demos and tests.

It needs no download, says nothing sensible, and costs what a model of its size costs: enough to
run the real engine on a laptop. The same spec gives the same files on every run.

    python -m hexgen_vllm.testing.tiny_model OUT_DIR [--hidden N] [--layers N]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.tiny_corpus import texts

BOS, EOS = "<s>", "</s>"
SPEC_FILE = "tiny_model.json"
FORMAT = 1
"""Raised when the same spec would give other files than before."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class TinySpec:
    """Shape of the model. Sizes are numbers of weights, ``positions`` is in tokens."""

    hidden: int = 256
    layers: int = 4
    head_dim: int = 64
    vocab: int = 2048
    positions: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden < self.head_dim or self.hidden % self.head_dim:
            raise ConfigError(f"hidden must be a multiple of {self.head_dim}, not {self.hidden}.")
        if self.layers < 1:
            raise ConfigError(f"layers must be at least 1, not {self.layers}.")

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.hidden // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of KV heads: two query heads share one where there are two."""
        return max(1, self.heads // 2)


def build(out_dir: Path, spec: TinySpec | None = None) -> Path:
    """Write model and tokenizer of ``spec`` to ``out_dir``, unless they are already there.

    Returns:
        ``out_dir``, a directory that vLLM and transformers accept as a model name.
    """
    spec = spec or TinySpec()
    marker = out_dir / SPEC_FILE
    wanted = {"format": FORMAT, **asdict(spec)}
    if marker.is_file() and json.loads(marker.read_text()) == wanted:
        return out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    train_tokenizer(spec.vocab, spec.positions).save_pretrained(out_dir)
    random_llama(spec).save_pretrained(out_dir)
    marker.write_text(json.dumps(wanted) + "\n")  # last: an interrupted build is built again
    return out_dir


def train_tokenizer(vocab: int, positions: int) -> Any:
    """Return a byte-level BPE tokenizer of ``vocab`` tokens, trained on the built-in corpus.

    Raises:
        ConfigError: ``vocab`` is more than the corpus yields.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    if bpe.get_vocab_size() != vocab:  # the model would generate tokens without text
        raise ConfigError(f"vocab must be at most {bpe.get_vocab_size()}, not {vocab}.")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=positions,
    )


def random_llama(spec: TinySpec) -> Any:
    """Return a float32 Llama with weights drawn from ``spec.seed``; leaves torch's own seed be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=4 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return LlamaForCausalLM(config).to(torch.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the model named on the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hexgen_vllm.testing.tiny_model")
    parser.add_argument("out_dir", type=Path, help="directory to write, reused when it fits")
    parser.add_argument("--hidden", type=int, default=TinySpec.hidden, help="width, n x 64")
    parser.add_argument("--layers", type=int, default=TinySpec.layers, help="number of layers")
    parser.add_argument("--seed", type=int, default=TinySpec.seed, help="seed of the weights")
    args = parser.parse_args(argv)
    try:
        spec = TinySpec(hidden=args.hidden, layers=args.layers, seed=args.seed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(build(args.out_dir, spec))
    return 0


if __name__ == "__main__":
    sys.exit(main())
