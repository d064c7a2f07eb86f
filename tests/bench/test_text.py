"""Prompts: exact lengths, layers shared token for token, nothing else shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hexgen_vllm.bench.text import PromptSource
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import CallSpec, Layer

TEMPLATE, SCHEMA = Layer("template:revise", 200), Layer("schema:3", 80)


def call(workflow: str, own: int = 40, private: int = 30) -> CallSpec:
    layers = (TEMPLATE, SCHEMA, Layer(f"workflow:{workflow}", private))
    return CallSpec("revise", 280 + private + own, 10, layers)


def common(left: list[int], right: list[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(left, right, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@pytest.fixture
def source() -> PromptSource:
    return PromptSource(salt="run-1")


def test_prompts_have_exactly_the_length_asked_for() -> None:
    source = PromptSource(500)
    for flow in text2sql(3, seed=1):
        for index, one in enumerate(flow.calls()):
            ids = source.token_ids(flow.workflow_id, index, one)
            assert len(ids) == one.prompt_tokens
            assert min(ids) >= 50
            assert max(ids) < 500


def test_calls_of_a_workflow_share_all_three_layers(source: PromptSource) -> None:
    first = source.token_ids("w", 0, call("w"))
    second = source.token_ids("w", 1, call("w", own=90))
    assert 310 <= common(first, second) < 318  # chance may add a token or two


def test_a_private_layer_that_grows_keeps_its_head(source: PromptSource) -> None:
    short = source.token_ids("w", 0, call("w", private=30))
    longer = source.token_ids("w", 1, call("w", private=70))
    assert longer[:310] == short[:310]


def test_workflows_share_template_and_schema_only(source: PromptSource) -> None:
    ours = source.token_ids("w", 0, call("w"))
    theirs = source.token_ids("v", 0, call("v"))
    assert 280 <= common(ours, theirs) < 288


def test_other_runs_share_template_and_schema_only(source: PromptSource) -> None:
    ours = source.token_ids("w", 0, call("w"))
    theirs = PromptSource(salt="run-2").token_ids("w", 0, call("w"))
    assert 280 <= common(ours, theirs) < 288
    assert PromptSource(salt="run-1").token_ids("w", 0, call("w")) == ours


def test_a_layer_is_the_same_however_much_of_it_was_asked_before() -> None:
    grown, fresh = PromptSource(), PromptSource()
    piece = replace(call("w"), layers=(TEMPLATE._replace(tokens=7),), prompt_tokens=7)
    grown.token_ids("w", 0, piece)
    assert grown.token_ids("w", 1, call("w")) == fresh.token_ids("w", 1, call("w"))


def test_streams_that_are_forgotten_come_back_the_same() -> None:
    source = PromptSource(cached_streams=1)
    first = source.token_ids("w", 0, call("w"))
    assert source.token_ids("w", 0, call("w")) == first


def test_text_has_a_word_for_each_token_and_shares_the_same_layers(source: PromptSource) -> None:
    ours = source.text("w", 0, call("w")).split(" ")
    theirs = source.text("v", 0, call("v")).split(" ")
    assert len(ours) == 350
    assert ours[:280] == theirs[:280]
    assert ours != theirs


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        PromptSource(31)
