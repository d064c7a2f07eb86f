"""What the router believes an engine's prefix cache holds."""

from __future__ import annotations

import random

import pytest

from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.types import Call


def call(prefix: tuple[int, ...], tokens: int = 10_000) -> Call:
    return Call("c", "w", 0.0, tokens, prefix=prefix, prefix_chunk_tokens=10)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_of_a_prompt_is_its_head(seed: int) -> None:
    """A match looks at a few chunks only; it must find what looking at each would."""
    rng = random.Random(seed)
    index = PrefixIndex(300)
    held: list[int] = []  # least recently used first
    for _ in range(2000):
        base = rng.randrange(4)
        other = rng.randrange(6)
        head, tail = rng.randrange(1, 9), rng.randrange(8)
        prefix = tuple(
            hash((base, i)) if i < head else hash((base, head, other, i))
            for i in range(head + tail)
        )
        count = 0
        while count < len(prefix) and prefix[count] in held:
            count += 1
        assert index.match(call(prefix)) == 10 * count
        if rng.random() < 0.5:
            index.add(call(prefix))
            held = [chunk for chunk in held if chunk not in prefix] + list(reversed(prefix))
            held = held[-30:]


def test_one_token_is_always_left_to_compute() -> None:
    index = PrefixIndex(None)
    index.add(call((1, 2), 20))
    assert index.match(call((1, 2), 20)) == 19
    index.clear()
    assert index.match(call((1, 2), 20)) == 0


def test_chunks_of_no_size_are_bounded_too() -> None:
    index = PrefixIndex(1_000)
    for i in range(10_000):
        index.add(Call(f"{i}", "w", 0.0, 10, prefix=(i,), prefix_chunk_tokens=0))
    assert len(index._tokens) <= 1_000
