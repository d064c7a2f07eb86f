"""The model: a tokenizer that keeps names whole for copying, and a small Llama."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

VOCABULARY: Final = 2048
POSITIONS: Final = 4096
BOS, EOS, ANSWER = "<s>", "</s>", "<answer>"
STAGES: Final = {
    "<keywords>": "prepare a question",
    "<links>": "choose the part",
    "<apart>": "taking the question apart",
    "<engine>": "thinking as the database",
    "<backwards>": "going backwards",
    "<revise>": "You correct",
    "<test>": "You test answers",
    "<judge>": "You judge",
}
"""One token for the agent's own text of each stage, and words by which that text is known."""
_DROPPED: Final = ("Schema:\n", " INTEGER", " TEXT", " REAL")
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'system' %}"
    + "".join(
        f"{{% {'elif' if at else 'if'} '{words}' in text %}}{{{{ '{stage}' }}}}"
        for at, (stage, words) in enumerate(STAGES.items())
    )
    + "{% else %}{{ text + '\n' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ANSWER + "' + text + eos_token }}"
    "{% else %}{{ text"
    + "".join(f" | replace({word!r}, '')" for word in _DROPPED)
    + " }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ANSWER + "' }}{% endif %}"
)
# Words of SQL go with the blanks around them, so that names and values stand alone in SQL, in the
# schema and in the question, and are the same tokens in all three.
_PIECES: Final = (
    r"\n?(?:SELECT DISTINCT |SELECT |FROM |WHERE |GROUP BY 1|ORDER BY |HAVING |LIMIT )"
    r"| (?:JOIN|ON|AND) | NOT IN \(| IS NOT NULL| IS NULL| LIKE '%?|%?' AND |%'"
    r"|COUNT\(\*\)|COUNT\(DISTINCT |(?:SUM|AVG|MIN|MAX)\(|julianday\(|strftime\('%m', "
    r"| (?:=|<>|<=|>=|<|>) '?| DESC|```|\n```sql|\n```|\nQuestion: |Question: |verdict: "
    r"| e\.g\. '|', '| -> |:\n  |\n  |, |: |\n| [-*+] "
    r"|[A-Za-z]+(?=s\b)|[A-Za-z]+|[0-9]| |[^\sA-Za-z0-9]|\s"
)


def tokenizer(texts: Iterable[str]) -> Any:
    """Return a tokenizer trained on ``texts``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, ANSWER, *STAGES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def llama(vocabulary: int) -> Any:
    """Return the model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, head_dim=32,
        max_position_embeddings=POSITIONS, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, dtype="float32",
    ))  # fmt: skip
