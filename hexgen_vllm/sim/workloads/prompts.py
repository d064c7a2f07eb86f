"""What prompts have in common, named by numbers: for caches in engines and for affinity in routers.

Two prompts are equal up to a token if they consist of the same layers with the same lengths up to
it. A layer so gets a key from all that is before it; the key stands for its contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hexgen_vllm.sim.engine.prefix_cache import Link
from hexgen_vllm.sim.workloads.workload import Layer

# Within a workflow many prompts have the same layers; across workflows few do.
_REMEMBERED = 4096


class Span(NamedTuple):
    """Tokens ``[start, end)`` of a prompt, its content and all before it named by ``key``."""

    key: int
    start: int
    end: int


def spans(layers: Sequence[Layer]) -> tuple[Span, ...]:
    """Return the spans of a prompt's layers.

    The key does not depend on the layer's own length: shorter and longer layers of one stream
    share their common part.
    """
    key = end = 0
    found = []
    for stream, tokens in layers:
        key, start = hash((key, end, stream)), end
        end += tokens
        found.append(Span(key, start, end))
    return tuple(found)


@lru_cache(_REMEMBERED)
def links(layers: tuple[Layer, ...], block_size: int) -> tuple[Link, ...]:
    """Return the runs of full KV blocks that a prompt may share."""
    return tuple(
        Link(key, start // block_size, end // block_size)
        for key, start, end in spans(layers)
        if end // block_size > start // block_size
    )


@lru_cache(_REMEMBERED)
def chunk_hashes(layers: tuple[Layer, ...], chunk_tokens: int) -> tuple[int, ...]:
    """Return one number per full chunk of the shared part of a prompt, as routers hash text."""
    found: tuple[int, ...] = ()
    for key, start, end in spans(layers):
        found += _chunks(key, start // chunk_tokens, end // chunk_tokens)
    return found


@lru_cache(_REMEMBERED)
def _chunks(key: int, first: int, end: int) -> tuple[int, ...]:
    return tuple(hash((key, index)) for index in range(first, end))
