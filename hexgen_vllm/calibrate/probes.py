"""Which calls measure an engine: a small design in which every coefficient moves alone.

Prompts of several lengths with one output token, one at a time, give the cost of prefill. Batches
of equal calls of several sizes, with short and with long prompts, give the cost of decoding. No
two prompts share a prefix, so that a prefix cache does not help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OUTPUT_TOKENS: Final = 24
SHORT_PROMPT: Final = 16
MAX_PROMPT: Final = 8192
MAX_BATCH: Final = 32
_REPEATS: Final = 3


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Equal calls that are sent at once.

    Attributes:
        batch: how many.
        prompt_tokens: length of each prompt.
        output_tokens: tokens that each call must write.
    """

    batch: int
    prompt_tokens: int
    output_tokens: int


def design(context_tokens: int, max_num_seqs: int) -> list[ProbeBatch]:
    """Return the probes for an engine, most informative first.

    Args:
        context_tokens: longest call that the model takes.
        max_num_seqs: sequences of a full batch; no probe queues.
    """
    longest = max(min(context_tokens - OUTPUT_TOKENS - 1, MAX_PROMPT), SHORT_PROMPT)
    lengths = sorted({max(longest * share // 8, SHORT_PROMPT) for share in (0, 1, 2, 4, 7)})
    sizes = [n for n in (1, 2, 4, 8, 16, MAX_BATCH) if n <= max_num_seqs]
    if max_num_seqs < MAX_BATCH and max_num_seqs not in sizes:
        sizes.append(max_num_seqs)
    long = max(longest // 4, SHORT_PROMPT)
    prefill = [ProbeBatch(1, n, 1) for n in lengths]
    decode = [ProbeBatch(b, n, OUTPUT_TOKENS) for n in sorted({SHORT_PROMPT, long}) for b in sizes]
    return [*prefill, *decode, *(_REPEATS - 1) * prefill]
