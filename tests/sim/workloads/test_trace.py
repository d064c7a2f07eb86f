"""Reading the public trace format: groups, names, inferred layers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.trace import (
    parse_trace,
    read_trace,
    resample,
    stage_name,
)
from hexgen_vllm.sim.workloads.workload import WorkflowSpec

STEPS = [
    ("Information Retriever", 301, 26),
    ("extract_keywords", 660, 40),
    ("Information Retriever", 304, 5),
    ("generate_candidate_llama-agent", 11_800, 600),
    ("generate_candidate_llama-agent", 7_934, 500),
    ("revise", 5_780, 90),
    ("revise", 5_760, 80),
    ("unit_tester", 271, 4),
    ("evaluate", 900, 22),
    ("evaluate", 910, 22),
    ("evaluate", 905, 357),
    ("unit_tester", 275, 4),
    ("evaluate", 700, 22),
]


def entry(steps: list[tuple[str, int, int]]) -> dict[str, Any]:
    keys = ("step", "input_length", "output_length")
    return {"Text2SQLRequest": [dict(zip(keys, step, strict=True)) for step in steps]}


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data))
    return path


def test_candidates_and_evaluations_run_in_parallel_all_else_in_sequence(tmp_path: Path) -> None:
    (flow,) = read_trace(written(tmp_path, [entry(STEPS)]))
    assert [(group[0].stage, len(group)) for group in flow.stages] == [
        ("information_retriever", 1),
        ("extract_keywords", 1),
        ("information_retriever", 1),
        ("generate_candidate", 2),
        ("revise", 1),
        ("revise", 1),
        ("unit_tester", 1),
        ("evaluate", 3),
        ("unit_tester", 1),
        ("evaluate", 1),
    ]
    assert [(c.prompt_tokens, c.output_tokens) for c in flow.calls()] == [s[1:] for s in STEPS]


def test_layers_are_inferred_from_lengths(tmp_path: Path) -> None:
    (flow,) = read_trace(written(tmp_path, [entry(STEPS)]))
    long, short = flow.stages[3]
    assert [layer.stream for layer in long.layers[:2]] == [
        "template:generate_candidate/a",
        "schema:recorded",
    ]
    assert short.layers[0] == ("template:generate_candidate/b", 5292)
    assert long.layers[1:] == short.layers[1:]
    first, second = flow.stages[4][0], flow.stages[5][0]
    assert first.layers == second.layers
    assert first.layers[1] == long.layers[1]
    assert flow.stages[0][0].layers == (("template:information_retriever", 213),)
    evaluations = flow.stages[7]
    assert len({call.layers for call in evaluations}) == 1
    assert all(call.own_tokens >= 1 for call in flow.calls())


def test_a_long_schema_does_not_turn_the_short_candidate_into_the_long_one() -> None:
    steps = [("generate_candidate", 14_000, 600), ("generate_candidate", 10_134, 500)]
    (flow,) = parse_trace([entry(steps)], "t")
    assert [c.layers[0].stream for c in flow.calls()] == [
        "template:generate_candidate/a",
        "template:generate_candidate/b",
    ]


def test_unknown_and_short_stages_share_nothing() -> None:
    (flow,) = parse_trace([entry([("plan", 50, 5), ("revise", 100, 5)])], "t")
    assert [call.layers for call in flow.calls()] == [(), ()]


@pytest.mark.parametrize(
    ("step", "stage"),
    [
        ("Information Retriever", "information_retriever"),
        ("generate_candidate_llama-agent", "generate_candidate"),
        ("generate_candidate", "generate_candidate"),
        ("evaluate", "evaluate"),
        ("  Unit-Tester ", "unit_tester"),
        ("???", ""),
    ],
)
def test_stage_names_are_normalised(step: str, stage: str) -> None:
    assert stage_name(step) == stage


def test_a_generated_workload_survives_a_round_trip(tmp_path: Path) -> None:
    flows = text2sql(20, seed=1)
    data = [
        entry([(c.stage, c.prompt_tokens, c.output_tokens) for c in flow.calls()]) for flow in flows
    ]
    read = read_trace(written(tmp_path, data))

    def shape(flow: WorkflowSpec) -> list[list[tuple[str, int, int]]]:
        return [[(c.stage, c.prompt_tokens, c.output_tokens) for c in g] for g in flow.stages]

    assert [shape(flow) for flow in read] == [shape(flow) for flow in flows]


def test_resampling_is_seeded_and_every_copy_has_contents_of_its_own() -> None:
    flows = parse_trace([entry(STEPS), entry(STEPS[:5])], "t")
    drawn = resample(flows, 50, seed=3)
    assert drawn == resample(flows, 50, seed=3)
    assert drawn != resample(flows, 50, seed=4)
    assert len({flow.workflow_id for flow in drawn}) == 50
    assert {len(flow.stages) for flow in drawn} == {len(flow.stages) for flow in flows}
    private = [
        {ly.stream for c in flow.calls() for ly in c.layers if ly.stream.startswith("workflow:")}
        for flow in drawn
    ]
    assert private == [{f"workflow:{flow.workflow_id}"} for flow in drawn]


def without(key: str) -> dict[str, Any]:
    broken = entry(STEPS)
    del broken["Text2SQLRequest"][4][key]
    return broken


def with_value(key: str, value: object) -> dict[str, Any]:
    broken = entry(STEPS)
    broken["Text2SQLRequest"][4][key] = value
    return broken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "trace.json must hold a JSON list"),
        ([], "trace.json must hold a JSON list"),
        ([entry(STEPS), {}], 'entry 2: "Text2SQLRequest" must be a list'),
        ([{"Text2SQLRequest": []}], 'entry 1: "Text2SQLRequest"'),
        ([{"Text2SQLRequest": [7]}], "entry 1, step 1 must be a JSON object"),
        ([without("step")], 'entry 1, step 5: "step"'),
        ([with_value("step", "-")], 'entry 1, step 5: "step"'),
        ([without("input_length")], 'entry 1, step 5: "input_length".* not None'),
        ([with_value("input_length", 0)], 'entry 1, step 5: "input_length"'),
        ([with_value("output_length", 2.5)], 'entry 1, step 5: "output_length"'),
        ([with_value("output_length", True)], 'entry 1, step 5: "output_length"'),
    ],
)
def test_errors_name_file_entry_and_key(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(written(tmp_path, data))
    assert "trace.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_not_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read"):
        read_trace(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"Text2SQLRequest": ')
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        read_trace(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        read_trace(broken)
