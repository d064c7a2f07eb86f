"""The other workloads: shapes, shared prefixes, seeds, and that scenarios can name them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.scenario import WorkloadOptions
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.workloads.agents import (
    SHARES,
    TEMPLATES,
    dag,
    mac_sql,
    map_reduce,
    mixed_tenants,
    react,
)
from hexgen_vllm.sim.workloads.workload import WorkflowSpec, workflow_stream

KINDS = ("text2sql", "mac_sql", "react", "map_reduce", "dag", "mixed")


def stages(flow: WorkflowSpec) -> list[str]:
    return [group[0].stage for group in flow.stages]


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_decide_and_a_longer_workload_only_adds(kind: str) -> None:
    def drawn(workflows: int, seed: int) -> tuple[WorkflowSpec, ...]:
        return WorkloadOptions(kind=kind, workflows=workflows).specs(seed)

    assert drawn(30, 4) == drawn(30, 4)
    assert drawn(30, 4) == drawn(60, 4)[:30]
    assert drawn(30, 4) != drawn(30, 5)
    ids = [flow.workflow_id for flow in drawn(200, 4)]
    assert len(set(ids)) == len(ids)


def test_mac_sql_runs_its_three_agents_in_turn() -> None:
    flows = mac_sql(400, seed=1)
    rounds = Counter(len(flow.stages) - 2 for flow in flows)
    assert set(rounds) == {1, 2, 3}
    assert 0.6 < rounds[1] / len(flows) < 0.8
    for flow in flows:
        assert stages(flow)[:3] == ["selector", "decomposer", "refiner"]
        for call in flow.calls():
            assert call.layers[0].tokens == TEMPLATES[call.stage]


def test_a_refiner_finds_the_prefix_of_the_round_before() -> None:
    flow = next(f for f in mac_sql(100, seed=1) if len(f.stages) > 3)
    first, second = flow.stages[2][0], flow.stages[3][0]
    assert first.layers == second.layers
    decomposer = flow.stages[1][0]
    assert first.layers[1].tokens == decomposer.layers[1].tokens + decomposer.output_tokens


def test_every_react_turn_contains_the_one_before() -> None:
    flows = react(300, seed=2)
    for flow in flows:
        calls = [group[0] for group in flow.stages]
        assert [c.stage for c in calls] == ["act"] * (len(calls) - 1) + ["answer"]
        for before, after in pairwise(calls):
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert after.layers[1].stream == workflow_stream(flow.workflow_id)
    turns = sorted(len(flow.stages) for flow in flows)
    assert turns[0] >= 2
    assert turns[-1] >= 2.5 * turns[len(turns) // 2], "depth is the great unknown"


def test_map_reduce_joins_what_its_parts_wrote() -> None:
    flows = map_reduce(200, seed=3)
    widths = [len(flow.stages[0]) for flow in flows]
    assert min(widths) >= 3
    assert max(widths) >= 18
    for flow in flows:
        parts, (reduce,) = flow.stages
        assert reduce.own_tokens == sum(part.output_tokens for part in parts)


def test_tenants_send_their_own_type_at_their_share() -> None:
    flows = mixed_tenants(3000, seed=1)
    types = {(flow.tenant, flow.type) for flow in flows}
    assert types == {("analyst", "text2sql"), ("agent", "react"), ("batch", "map_reduce")}
    counts = Counter(flow.tenant for flow in flows)
    for tenant, share in SHARES.items():
        assert counts[tenant] / len(flows) == pytest.approx(share, abs=0.03)


def test_a_scenario_names_its_workload(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = "fleet: reference-4\narrivals: {loads: [0.5]}\nworkload: {kind: KIND, workflows: 5}\n"
    path.write_text(text.replace("KIND", "react"))
    scenario = load(path)
    assert {flow.type for flow in scenario.workload.specs(0)} == {"react"}
    assert scenario.workload.name == "react"
    assert WorkloadOptions(retries="uniform").name == "text2sql/uniform"
    path.write_text(text.replace("KIND", "nothing"))
    with pytest.raises(ConfigError, match=r"s\.yaml.*kind must be one of"):
        load(path)


def test_graphs_have_branches_that_wait_for_each_other_and_for_tools() -> None:
    flows = dag(200, seed=3)
    assert flows == dag(200, seed=3)
    assert flows[:50] == dag(50, seed=3), "the k-th does not depend on how many there are"
    assert all(flow.is_graph for flow in flows)
    waits = [flow.waits() for flow in flows]
    assert all(found[0] == () for found in waits)
    joins = [after for found in waits for after in found[1:-1] if len(after) > 1]
    assert 0.05 < len(joins) / sum(map(len, waits)) < 0.4
    assert all(len(found[-1]) >= 2 for found in waits), "the answer waits for all branches"
    thinking = [call.think_s > 0 for flow in flows for call in flow.calls() if call.stage == "work"]
    assert 0.4 < sum(thinking) / len(thinking) < 0.6
    reached = {0}
    for index, after in enumerate(waits[0]):
        assert index == 0 or set(after) <= reached
        reached.add(index)


def test_prompts_can_share_nothing() -> None:
    plain = WorkloadOptions(workflows=20, shared_prefixes=False).specs(1)
    usual = WorkloadOptions(workflows=20).specs(1)
    assert all(call.shared_tokens == 0 for flow in plain for call in flow.calls())
    lengths = [[(c.prompt_tokens, c.output_tokens) for c in flow.calls()] for flow in plain]
    assert lengths == [[(c.prompt_tokens, c.output_tokens) for c in f.calls()] for f in usual]
    assert any(call.shared_tokens for flow in usual for call in flow.calls())
