"""Length and start of prompts without a tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hexgen_vllm.router.calls.prompt import (
    CHUNK_CHARS,
    CHUNK_TOKENS,
    MAX_CHUNKS,
    Prompt,
    TokenRatios,
    chain,
    read_prompt,
)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("prompt", "chars", "ids"),
    [
        ("abc", 3, 0),
        (["ab", "c"], 4, 0),
        ([1, 2, 3], 0, 3),
        ([[1, 2], [3, 4, 5]], 0, 5),
        ([], 0, 0),
        (None, 0, 0),
        (7, 0, 0),
        ([True, False], 0, 0),
        ([1, "a"], 1, 0),
        ({"a": ["x", {"b": "yz"}]}, 4, 0),
    ],
)
def test_prompts_of_every_form_are_counted(prompt: object, chars: int, ids: int) -> None:
    found = read_prompt({"prompt": prompt}, ("prompt",))
    assert (found.chars, found.ids) == (chars, ids)


def test_pictures_are_no_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}
    content = [{"type": "text", "text": "look"}, picture]
    found = read_prompt({"messages": [{"role": "user", "content": content}]}, ("messages",))
    assert found.chars < 100


def test_deep_nesting_is_no_recursion() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    assert read_prompt({"input": deep}, ("input",)).chars == 1


def test_fields_are_read_in_the_order_the_model_sees_them() -> None:
    body = {"messages": said("m"), "tools": [{"name": "t"}]}
    start = read_prompt(body, ("tools", "messages")).start
    assert isinstance(start, str)
    assert start.index("t") < start.index("m")


@pytest.mark.parametrize("ids", [False, True])
def test_chains_share_what_prompts_share(ids: bool) -> None:
    size = CHUNK_TOKENS if ids else CHUNK_CHARS

    def prompt(*parts: int) -> Prompt:
        """Chunks that differ by number."""
        if ids:
            tokens = [n for n in parts for _ in range(size)]
            return Prompt(tokens, 0, len(tokens))
        text = "".join(chr(97 + n) * size for n in parts)
        return Prompt(text, len(text), 0)

    one, two = chain(prompt(1, 2, 3, 4), "m"), chain(prompt(1, 2, 9, 4), "m")
    assert len(one) == 4
    assert one[:2] == two[:2]
    assert not set(one[2:]) & set(two[2:]), "after a difference nothing is shared"
    assert chain(prompt(1, 2), "m") == one[:2]
    assert not set(chain(prompt(1, 2), "other model")) & set(one)
    assert len(chain(prompt(*range(20)), "m")) == 20


def test_only_full_chunks_count_and_not_too_many() -> None:
    assert chain(Prompt("x" * (CHUNK_CHARS - 1), 0, 0), "m") == ()
    assert len(chain(Prompt("x" * CHUNK_CHARS * 500, 0, 0), "m")) == MAX_CHUNKS
    assert MAX_CHUNKS * CHUNK_TOKENS >= 15_000


def test_text_with_lone_surrogates_has_a_chain() -> None:
    text = json.loads('"\\ud83d"') * CHUNK_CHARS
    assert len(chain(Prompt(text, len(text), 0), "m")) == 1


def test_ratios_follow_what_engines_report() -> None:
    ratios = TokenRatios(max_models=2)
    assert ratios.tokens("m", Prompt("x" * 400, 400, 0)) == 100
    for _ in range(50):
        ratios.learn("m", 1000, 500)
    assert ratios.tokens("m", Prompt("x" * 400, 400, 0)) == 200
    assert ratios.chunk_tokens("m", Prompt("x", 1, 0)) == CHUNK_CHARS // 2
    assert ratios.chunk_tokens("m", Prompt([1], 0, 1)) == CHUNK_TOKENS
    for _ in range(400):
        ratios.learn("m", 3000, 1000)
    assert ratios.ratio("m") == pytest.approx(3.0, rel=0.01)
    assert ratios.tokens("m", Prompt([5] * 33, 0, 33)) == 33
    for name in "ab":
        ratios.learn(name, 10, 10)
    assert ratios.ratio("m") == 4.0, "the longest unused was forgotten"


def test_nonsense_teaches_nothing() -> None:
    ratios = TokenRatios()
    for chars, tokens in ((0, 5), (5, 0), (-1, 5)):
        ratios.learn("m", chars, tokens)
    assert ratios.ratio("m") == 4.0


def test_a_count_that_cannot_be_of_the_text_does_not_bend_the_ratio() -> None:
    ratios = TokenRatios()
    for _ in range(1_000):
        ratios.learn("m", 4_000, 1_000)
    before = ratios.ratio("m")
    for tokens in (2**31 - 1, 100_000, 0, -5):  # of images, of an engine that miscounts
        ratios.learn("m", 4_000, tokens)
    ratios.learn("fresh", 50, 1_500)
    assert ratios.ratio("m") == before
    assert ratios.ratio("fresh") == 4.0
