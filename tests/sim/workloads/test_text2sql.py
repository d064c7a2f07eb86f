"""The generated workload has the published statistics and its prompts share what they should."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from statistics import fmean

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import (
    TEMPLATES,
    Text2SqlOptions,
    schemas,
    text2sql,
)
from hexgen_vllm.sim.workloads.workload import CallSpec, WorkflowSpec

# stage: calls per workflow, prompt p5/p50/p95, output p5/p50/p95 (ranges where traces differ)
TABLE = {
    "information_retriever": ((4, 4), (301, 308, 312), (4, (5, 5), 34)),
    "extract_keywords": ((0.6, 0.75), (635, 667, 750), (15, (47, 47), 93)),
    "revise": ((3.4, 5.2), (5700, (5900, 7900), 8900), (12, (80, 130), 312)),
    "unit_tester": ((3, 3), (271, 275, 278), (4, (4, 4), 6)),
    "generate_unit_test": ((0.9, 1), (800, 1130, 1500), (31, (100, 100), 245)),
    "evaluate": ((4, 5.2), (750, 1011, 1900), (22, (22, 22), 123)),
}


def percentile(values: list[int], percent: int) -> int:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def by_stage(flows: tuple[WorkflowSpec, ...]) -> dict[str, list[CallSpec]]:
    stages: dict[str, list[CallSpec]] = defaultdict(list)
    for flow in flows:
        for call in flow.calls():
            stages[call.stage].append(call)
    return stages


@pytest.fixture(scope="module")
def flows() -> tuple[WorkflowSpec, ...]:
    return text2sql(1500, seed=5)


@pytest.mark.parametrize("stage", TABLE)
def test_lengths_of_a_stage_match_the_table(flows: tuple[WorkflowSpec, ...], stage: str) -> None:
    (fewest, most), prompts, outputs = TABLE[stage]
    calls = by_stage(flows)[stage]
    assert fewest <= len(calls) / len(flows) <= most
    for values, (p5, p50, p95) in (
        ([c.prompt_tokens for c in calls], prompts),
        ([c.output_tokens for c in calls], outputs),
    ):
        low, high = p50 if isinstance(p50, tuple) else (p50, p50)
        assert percentile(values, 5) == pytest.approx(p5, rel=0.12, abs=1)
        assert low * 0.95 <= percentile(values, 50) <= high * 1.05
        assert percentile(values, 95) == pytest.approx(p95, rel=0.12)


def test_the_two_candidates_match_the_table(flows: tuple[WorkflowSpec, ...]) -> None:
    pairs = [g for f in flows for g in f.stages if g[0].stage == "generate_candidate"]
    assert len(pairs) == len(flows)
    assert all(len(pair) == 2 for pair in pairs)
    medians = [percentile([pair[k].prompt_tokens for pair in pairs], 50) for k in (0, 1)]
    assert medians == [pytest.approx(11_745, rel=0.05), pytest.approx(7_880, rel=0.05)]
    both = [call for pair in pairs for call in pair]
    assert percentile([c.prompt_tokens for c in both], 95) == pytest.approx(14_000, rel=0.05)
    outputs = [c.output_tokens for c in both]
    assert 550 <= percentile(outputs, 50) <= 680
    assert percentile(outputs, 5) == pytest.approx(377, rel=0.1)
    assert percentile(outputs, 95) == pytest.approx(1030, rel=0.1)


@pytest.mark.parametrize("retries", ["skewed", "uniform", "mixed"])
def test_totals_per_workflow_match_the_traces(retries: str) -> None:
    flows = text2sql(600, seed=6, options=Text2SqlOptions(retries=retries))
    calls = [len(list(f.calls())) for f in flows]
    assert 18.5 <= fmean(calls) <= 21.0
    assert percentile(calls, 1) >= 10
    assert max(calls) <= 28
    assert 50_000 <= fmean(f.prompt_tokens for f in flows) <= 70_000
    assert 2_000 <= fmean(f.output_tokens for f in flows) <= 2_500
    template = sum(c.layers[0].tokens for f in flows for c in f.calls())
    assert 0.46 <= template / sum(f.prompt_tokens for f in flows) <= 0.58


@cache
def rounds(retries: str) -> Counter[int]:
    flows = text2sql(2200, seed=7, options=Text2SqlOptions(retries=retries))
    return Counter(sum(c.stage == "revise" for c in f.calls()) for f in flows)


def test_uniform_retries_are_uniform_from_0_to_10() -> None:
    found = rounds("uniform")
    assert sorted(found) == list(range(11))
    assert all(140 <= found[k] <= 265 for k in found)


def test_skewed_retries_favour_few_rounds_and_have_a_tail() -> None:
    found = rounds("skewed")
    assert found[1] + found[2] + found[3] > 0.38 * 2200
    assert found[10] == 0
    assert found[9] > 0.05 * 2200


def test_mixed_retries_lie_between() -> None:
    means = {
        name: sum(k * n for k, n in rounds(name).items()) / 2200
        for name in ("skewed", "mixed", "uniform")
    }
    assert means["skewed"] + 0.3 < means["mixed"] < means["uniform"] - 0.3


def test_order_of_stages(flows: tuple[WorkflowSpec, ...]) -> None:
    allowed = {
        ("information_retriever", "extract_keywords"),
        ("information_retriever", "generate_candidate"),
        ("extract_keywords", "information_retriever"),
        ("generate_candidate", "revise"),
        ("generate_candidate", "unit_tester"),
        ("revise", "unit_tester"),
        ("unit_tester", "generate_unit_test"),
        ("generate_unit_test", "unit_tester"),
        ("unit_tester", "evaluate"),
        ("evaluate", "unit_tester"),
    }
    for flow in flows:
        names = [group[0].stage for group in flow.stages]
        assert names[0] == "information_retriever"
        assert names[-1] == "unit_tester"
        assert {pair for pair in pairwise(names) if pair[0] != pair[1]} <= allowed


def test_layers_are_template_schema_and_workflow(flows: tuple[WorkflowSpec, ...]) -> None:
    sizes = dict(layer for layer, _ in schemas(Text2SqlOptions()))
    for flow in flows[:200]:
        databases = set()
        for call in flow.calls():
            template, *rest = call.layers
            assert template.tokens == TEMPLATES[template.stream.removeprefix("template:")]
            assert call.own_tokens >= 1
            for layer in rest:
                if layer.stream.startswith("schema:"):
                    assert layer.tokens == sizes[layer.stream]
                    databases.add(layer.stream)
                else:
                    assert layer.stream == f"workflow:{flow.workflow_id}"
        assert len(databases) == 1


def test_rounds_of_a_workflow_share_all_but_their_own_part(
    flows: tuple[WorkflowSpec, ...],
) -> None:
    for flow in flows[:200]:
        assert len({c.layers for c in flow.calls() if c.stage == "revise"}) <= 1
        assert len({c.layers for c in flow.calls() if c.stage == "evaluate"}) <= 1


def test_popularity_of_databases_is_zipf() -> None:
    options = Text2SqlOptions(databases=4, zipf=1.0)
    shares = [share for _, share in schemas(options)]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    flows = text2sql(3000, seed=8, options=options)
    asked = Counter(
        layer.stream
        for f in flows
        for layer in next(c for c in f.calls() if c.stage == "generate_candidate").layers
        if layer.stream.startswith("schema:")
    )
    assert asked["schema:0"] / 3000 == pytest.approx(12 / 25, abs=0.03)
    assert asked["schema:3"] / 3000 == pytest.approx(3 / 25, abs=0.03)


def test_the_same_seed_gives_the_same_workflows_however_many(
    flows: tuple[WorkflowSpec, ...],
) -> None:
    assert text2sql(20, seed=5) == flows[:20]
    assert text2sql(20, seed=6) != flows[:20]


def test_no_workflow_is_repeated(flows: tuple[WorkflowSpec, ...]) -> None:
    assert len({f.workflow_id for f in flows}) == len(flows)
    assert len({tuple((c.prompt_tokens, c.output_tokens) for c in f.calls()) for f in flows}) > 1490


def test_tenants_are_drawn_equally() -> None:
    flows = text2sql(1000, seed=1, options=Text2SqlOptions(tenants=("gold", "free")))
    assert 430 < sum(f.tenant == "gold" for f in flows) < 570


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="retries must be one of"):
        Text2SqlOptions(retries="often")
    with pytest.raises(ConfigError, match="databases must be at least 1"):
        Text2SqlOptions(databases=0)
