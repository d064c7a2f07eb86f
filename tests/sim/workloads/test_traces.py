"""Readers and writers of traces. All samples are written by hand for these tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.limits import limits, uncontended
from hexgen_vllm.sim.workloads.traces.agents import moment
from hexgen_vllm.sim.workloads.traces.formats import WRITERS, TraceSource
from hexgen_vllm.sim.workloads.traces.lines import Row
from hexgen_vllm.sim.workloads.traces.model import TraceCall, TraceWorkflow, link
from hexgen_vllm.sim.workloads.traces.played import as_recorded, drawn
from hexgen_vllm.sim.workloads.traces.specs import specs_of
from hexgen_vllm.sim.workloads.workload import WorkflowSpec, is_own

BLOCK = 512


def lines(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake(at_ms: float, blocks: list[int], prompt: int = 0, **more: object) -> dict[str, Any]:
    length = prompt or BLOCK * len(blocks) - 100
    told = {"timestamp": at_ms, "input_length": length, "output_length": 20, "hash_ids": blocks}
    return {**told, **more}


MOONCAKE = [
    mooncake(0, [1, 2, 3]),
    mooncake(1500, [1, 2, 4, 5]),
    mooncake(4000, [1, 6]),
]
AGENTIC_1 = [
    mooncake(0, [1, 2], request_id="a", session_id="main", wait_for=[]),
    mooncake(900, [7], request_id="b", session_id="sub1", wait_for=["a"], delay=400.0),
    mooncake(900, [8], request_id="c", session_id="sub2", wait_for=["a"], tool_wait_ms=250.0),
    mooncake(
        3000, [1, 2, 3], request_id="d", session_id="main",
        wait_for=["a", "b", "c"], delay=100.0, tool_wait_ms=500.0,
    ),
    mooncake(5000, [1, 9], request_id="e", session_id="other", wait_for=[]),
]  # fmt: skip
HEADER = {
    "schema": "dynamo.agentic_mooncake", "version": 2, "block_size": 64,
    "hash_id_scope": "local", "source": {"format": "x", "digest": "y"},
}  # fmt: skip


def row_2(name: str, blocks: list[int], at_ms: float, *waits: tuple[str, str, float]) -> object:
    listed = [
        {"request_id": other, "trigger": trigger, "delay_ms": ms, "relation": "sequence"}
        for other, trigger, ms in waits
    ]
    return {
        "request_id": name, "play_id": "p", "session_id": "s", "model": "m", "hash_ids": blocks,
        "input_length": 64 * len(blocks), "output_length": 9, "not_before_ms": at_ms,
        "dependencies": listed,
    }  # fmt: skip


AGENTIC_2 = [
    HEADER,
    row_2("a", [1], 0.0),
    row_2("b", [1, 2], 0.0, ("a", "completion", 700.0)),
    row_2("c", [3], 0.0, ("b", "dispatch", 50.0)),
    row_2("d", [1, 2, 4], 0.0, ("b", "completion", 900.0), ("c", "completion", 200.0)),
]


def weka_call(t: float, took: float, blocks: list[int], **more: object) -> dict[str, Any]:
    told = {"t": t, "type": "n", "in": 64 * len(blocks) + 5, "out": 30, "hash_ids": blocks}
    return {**told, "api_time": took, "stop": "tool_use", **more}


WEKA = {
    "id": "conversation-7",
    "block_size": 64,
    "hash_id_scope": "local",
    "requests": [
        weka_call(0.0, 4.0, [1, 2]),
        {
            "t": 24.0, "type": "subagent", "subagent_type": "Explore", "duration_ms": 19_000,
            "requests": [
                weka_call(0.0, 2.0, [50], think_time=0.0),
                weka_call(5.0, 3.0, [50, 51], think_time=3.0),
            ],
        },
        weka_call(30.0, 5.0, [1, 2, 3], think_time=26.0),
        weka_call(41.0, 5.0, [1, 2, 3, 4], think_time=6.0, stop="end_turn"),
        weka_call(9000.0, 5.0, [1, 2, 3, 4, 5], think_time=8954.0),
    ],
}  # fmt: skip


def dynamo(
    name: str, start: int, took: float, hashes: list[int], session: str = "", parent: str = ""
) -> dict[str, Any]:
    request = {
        "request_id": name, "request_received_ms": start, "total_time_ms": took,
        "output_tokens": 8,
        "replay": {
            "trace_block_size": 64, "input_length": 64 * len(hashes),
            "input_sequence_hashes": hashes,
        },
    }  # fmt: skip
    told: dict[str, Any] = {
        "schema": "dynamo.request.trace.v1",
        "event_type": "request_end",
        "event_time_unix_ms": start + took,
        "request": request,
    }
    if session:
        told["agent_context"] = {"session_id": session}
        if parent:
            told["agent_context"]["parent_session_id"] = parent
    return told


BIG = 2**64 - 1  # what a hash of 64 bits can be
DYNAMO = [
    dynamo("r1", 1000, 100, [BIG, 5], "root"),
    {"schema": "dynamo.request.trace.v1", "event_type": "tool_end", "event_time_unix_ms": 1150},
    dynamo("r2", 1200, 300, [7], "one", "root"),
    dynamo("r3", 1250, 600, [8], "two", "root"),
    {"event": dynamo("r4", 2000, 100, [BIG, 5, 6], "root")},
    dynamo("lone", 9000, 50, [BIG]),
]


def span(
    name: str, parent: str, start_s: float, end_s: float, told: dict[str, object]
) -> dict[str, object]:
    def typed(value: object) -> dict[str, object]:
        return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}

    return {
        "traceId": "t1", "spanId": name, "parentSpanId": parent, "name": name,
        "startTimeUnixNano": str(round(start_s * 1e9)), "endTimeUnixNano": str(round(end_s * 1e9)),
        "attributes": [{"key": key, "value": typed(value)} for key, value in told.items()],
    }  # fmt: skip


def chat(tokens_in: int, tokens_out: int, **more: object) -> dict[str, object]:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": tokens_in,
        "gen_ai.usage.output_tokens": tokens_out,
        **more,
    }


OTEL = {
    "resourceSpans": [{"scopeSpans": [{"spans": [
        span("root", "", 100.0, 130.0, {"gen_ai.operation.name": "invoke_workflow"}),
        span("plan", "root", 100.5, 102.0, chat(900, 40)),
        span("wire", "plan", 100.6, 101.9, chat(900, 40)),  # the same call, seen lower down
        span("agent1", "root", 102.0, 110.0, {
            "gen_ai.operation.name": "invoke_agent", "gen_ai.usage.input_tokens": 5000,
            "gen_ai.usage.output_tokens": 500,
        }),
        span("a1", "agent1", 102.5, 105.0, chat(700, 60)),
        span("a2", "agent1", 107.0, 110.0, chat(1500, 60)),
        span("b1", "root", 103.0, 109.0, chat(1400, 80)),
        span("tool", "root", 105.0, 107.0, {"gen_ai.operation.name": "execute_tool"}),
        span("sum", "root", 112.0, 115.0, chat(2500, 90)),
    ]}]}]
}  # fmt: skip


def tracelab(index: int, prompt: int, prefix: int, sent: str, ended: str) -> dict[str, object]:
    kind = "tool_result" if index else "user_message"
    return {
        "provider": "claude", "session_id": "claude:1", "round_index": index,
        "input_tokens_total": prompt, "prefix_tokens": prefix, "output_tokens": 12,
        "first_input_event_type": kind,
        "timing_events": [
            {"event_type": kind, "timestamp": sent},
            {"event_type": "text", "timestamp": ended},
        ],
    }  # fmt: skip


TRACELAB = [
    tracelab(0, 3000, 2000, "2026-03-01T10:00:00.000Z", "2026-03-01T10:00:04.500Z"),
    tracelab(1, 3600, 2990, "2026-03-01T10:00:06Z", "2026-03-01T10:00:09Z"),
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-02-03 04:05:06.1234567,700,12
2024-02-03 04:05:08.0000000,9,0
2024-02-03 04:05:09.5,1200,44
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total,Log Type
5,s1,2.5,GPT-4,100,50,150,Conversation log
6,,1,ChatGPT,40,0,40,API log
7,,1,ChatGPT,40,9,49,API log
30,s1,2,GPT-4,230,20,250,Conversation log
"""
BAILIAN = [
    {"chat_id": 4, "parent_chat_id": -1, "timestamp": 1.0, "input_length": 40,
     "output_length": 9, "type": "text", "turn": 1, "hash_ids": [1, 2, 3]},
    {"chat_id": 5, "parent_chat_id": -1, "timestamp": 2.0, "input_length": 16,
     "output_length": 9, "type": "image", "turn": 1, "hash_ids": [9]},
    {"chat_id": 8, "parent_chat_id": 4, "timestamp": 21.0, "input_length": 64,
     "output_length": 9, "type": "search", "turn": 2, "hash_ids": [1, 2, 11, 12]},
]  # fmt: skip
HEXGEN = [
    {
        "type": "sql", "tenant": "b", "arrived_s": 3.0 * n, "deadline_s": 30.0, "latency_s": 6.0,
        "calls": [
            {"stage": stage, "at_s": at_s, "took_s": took_s, "prompt": prompt, "cached": cached,
             "output": 9}
            for stage, at_s, took_s, prompt, cached in (
                ("plan", 0.0, 2.0, 400, 300), ("write", 3.0, 1.0, 500, 350),
                ("write", 3.5, 2.5, 500, 320),
            )
        ],
    }
    for n in range(3)
]  # fmt: skip
SAMPLES: dict[str, object] = {
    "mooncake": MOONCAKE, "agentic-mooncake": AGENTIC_1, "weka": [WEKA], "dynamo": DYNAMO,
    "otel": [OTEL], "tracelab": TRACELAB, "bailian": BAILIAN, "hexgen": HEXGEN,
    "azure": AZURE, "burstgpt": BURSTGPT,
    "text2sql": [[{"Text2SQLRequest": [
        {"step": "revise", "input_length": 700, "output_length": 30}
    ]}]],
}  # fmt: skip


def sample(tmp_path: Path, name: str) -> Path:
    told = SAMPLES[name]
    if isinstance(told, str):
        path = tmp_path / f"{name}.csv"
        path.write_text(told)
        return path
    assert isinstance(told, list)
    return lines(tmp_path / f"{name}.jsonl", told)


def read(path: Path, **more: Any) -> list[TraceWorkflow]:
    return list(TraceSource(path, **more).workflows())


def played(path: Path, **more: Any) -> tuple[WorkflowSpec, ...]:
    return specs_of(read(path, **more), templates=TraceSource(path).known_format() == "hexgen")


def shape(workflow: TraceWorkflow) -> list[tuple[int, tuple[int, ...], float]]:
    return [(c.prompt, c.after, round(c.think_s, 6)) for c in workflow.calls]


def shared(spec: WorkflowSpec, index: int, other: WorkflowSpec, at: int) -> int:
    """Return the tokens that the prompts of two calls have in common."""
    one, two = list(spec.calls())[index].layers, list(other.calls())[at].layers
    total = 0
    for a, b in zip(one, two, strict=False):
        if a.stream != b.stream:
            break
        total += min(a.tokens, b.tokens)
        if a.tokens != b.tokens:
            break
    return total


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_is_known_by_its_first_record_packed_or_not(tmp_path: Path, name: str) -> None:
    path = sample(tmp_path, name)
    assert TraceSource(path).known_format() == name
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert TraceSource(packed).known_format() == name
    assert read(packed) == read(path)


def test_requests_with_hashes_share_what_their_hashes_say(tmp_path: Path) -> None:
    specs = played(sample(tmp_path, "mooncake"))
    assert [w.arrived_s for w in read(sample(tmp_path, "mooncake"))] == [0.0, 1.5, 4.0]
    assert shared(specs[0], 0, specs[1], 0) == 2 * BLOCK
    assert shared(specs[0], 0, specs[2], 0) == BLOCK
    assert [next(s.calls()).prompt_tokens for s in specs] == [1436, 1948, 924]


def test_equal_hashes_behind_other_blocks_are_not_the_same_prefix(tmp_path: Path) -> None:
    rows = [mooncake(0, [1, 2]), mooncake(1, [3, 2]), mooncake(2, [1, 2, 9])]
    specs = played(lines(tmp_path / "t.jsonl", rows))
    assert shared(specs[0], 0, specs[1], 0) == 0
    assert shared(specs[0], 0, specs[2], 0) == 2 * BLOCK - 100


def test_the_size_of_a_block_can_be_told(tmp_path: Path) -> None:
    rows = [mooncake(0, [1, 2, 3], prompt=48), mooncake(0, [1, 2, 4], prompt=48)]
    specs = specs_of(read(lines(tmp_path / "t.jsonl", rows), block_tokens=16))
    assert shared(specs[0], 0, specs[1], 0) == 32


def test_rows_of_a_session_follow_each_other_after_their_delay(tmp_path: Path) -> None:
    rows = [
        mooncake(0, [1], session_id="s"),
        mooncake(100, [5], session_id="u"),
        {"session_id": "s", "input_tokens": 900, "output_tokens": 3, "hash_ids": [1, 2],
         "delay_ms": 2500},
        mooncake(9000, [1, 2, 3], session_id="s"),
    ]  # fmt: skip
    found = {w.name: w for w in read(lines(tmp_path / "t.jsonl", rows))}
    assert shape(found["s"]) == [(412, (), 0.0), (900, (0,), 2.5), (1436, (1,), 6.5)]
    assert len(found["u"].calls) == 1


def test_agents_of_version_1_wait_for_what_they_name(tmp_path: Path) -> None:
    first, second = read(sample(tmp_path, "agentic-mooncake"))
    assert [(after, think) for _, after, think in shape(first)] == [
        ((), 0.0), ((0,), 0.4), ((0,), 0.25), ((0, 1, 2), 0.6),
    ]  # fmt: skip
    assert (len(second.calls), second.arrived_s) == (1, 5.0)
    graph, lone = played(sample(tmp_path, "agentic-mooncake"))
    assert graph.waits() == [(), (0,), (0,), (0, 1, 2)]
    assert shared(graph, 0, lone, 0) == BLOCK


def test_agents_of_version_2_wait_for_dispatch_and_completion(tmp_path: Path) -> None:
    (found,) = read(lines(tmp_path / "t.jsonl", AGENTIC_2))
    assert found.block_tokens == 64
    assert [(after, think) for _, after, think in shape(found)] == [
        ((), 0.0), ((0,), 0.7), ((0,), 0.75), ((1, 2), 0.2),
    ]  # fmt: skip


def test_subagents_start_with_and_are_joined_by_the_main_agent(tmp_path: Path) -> None:
    found = read(sample(tmp_path, "weka"))
    assert [(after, think) for _, after, think in shape(found[0])] == [
        ((), 0.0),
        ((0,), 1.0),  # began 19 s before 24 s: one second after the first answer
        ((1,), 3.0),
        ((0, 2), 17.0),  # 30 s, 17 s after the subagent's last answer at 13 s
        ((3,), 6.0),
    ]
    assert [len(w.calls) for w in found] == [5, 1], "hours of silence end a workflow"
    assert len(read(sample(tmp_path, "weka"), silence_s=1e5)) == 1
    spec = specs_of(found)[0]
    assert shared(spec, 0, spec, 3) == 128
    assert all(is_own(layer.stream, spec.workflow_id) for c in spec.calls() for layer in c.layers)


def test_think_times_behind_calls_of_unknown_length_are_what_is_left(tmp_path: Path) -> None:
    untimed = weka_call(20.0, 0.0, [1, 2], think_time=12.0)
    del untimed["api_time"]
    last = weka_call(30.0, 5.0, [1, 2, 3], think_time=26.0)  # since the first answer, at 4 s
    told = {**WEKA, "requests": [WEKA["requests"][0], untimed, last]}
    (found,) = read(lines(tmp_path / "x.jsonl", [told]))
    assert [think for _, _, think in shape(found)] == [0.0, 12.0, 10.0]


def test_subagents_of_agentx_have_absolute_times(tmp_path: Path) -> None:
    inner = [weka_call(5.0, 2.0, [50]), weka_call(10.0, 3.0, [50, 51])]
    subagent = {"t": 5.0, "type": "subagent", "duration_ms": 19_000, "requests": inner}
    (older,) = read(sample(tmp_path, "weka"), silence_s=1e5)
    told = {**WEKA, "requests": [WEKA["requests"][0], subagent, *WEKA["requests"][2:]]}
    (found,) = read(lines(tmp_path / "x.jsonl", [told]), silence_s=1e5)
    assert shape(found) == shape(older)


def test_conversations_can_be_a_folder_of_indented_files(tmp_path: Path) -> None:
    for name in "ba":
        told = {**WEKA, "id": name}
        (tmp_path / f"{name}.json").write_text(json.dumps(told, indent=2))
    assert [w.name for w in read(tmp_path, silence_s=1e5)] == ["a", "b"]


def test_sessions_of_dynamo_are_trees(tmp_path: Path) -> None:
    path = sample(tmp_path, "dynamo")
    found = {len(w.calls): w for w in read(path)}
    assert [(after, think) for _, after, think in shape(found[4])] == [
        ((), 0.0), ((0,), 0.1), ((0,), 0.15), ((0, 1, 2), 0.15),
    ]  # fmt: skip
    tree, lone = sorted(played(path), key=lambda s: -sum(1 for _ in s.calls()))
    assert shared(tree, 0, lone, 0) == 64
    assert shared(tree, 0, tree, 3) == 128


def test_spans_are_calls_once_and_wait_by_their_times(tmp_path: Path) -> None:
    (found,) = read(sample(tmp_path, "otel"))
    assert [(c.prompt, c.after, round(c.think_s, 6)) for c in found.calls] == [
        (900, (), 0.0),
        (700, (0,), 0.5),
        (1400, (0,), 1.0),
        (1500, (1,), 2.0),
        (2500, (2, 3), 2.0),
    ]
    (spec,) = played(sample(tmp_path, "otel"))
    assert shared(spec, 0, spec, 2) == 900, "an agent's next prompt begins with the one before"


def test_rounds_share_what_the_cache_had(tmp_path: Path) -> None:
    (found,) = read(sample(tmp_path, "tracelab"))
    assert shape(found) == [(3000, (), 0.0), (3600, (0,), 1.5)]
    (spec,) = specs_of([found])
    assert shared(spec, 0, spec, 1) == 2990
    other = specs_of([found, found])[1]
    assert next(other.calls()).layers[0] == ("template:claude", 2000)


def test_lines_of_tables_are_workflows_and_failed_ones_are_left_out(tmp_path: Path) -> None:
    azure = read(sample(tmp_path, "azure"))
    assert [(w.calls[0].prompt, w.calls[0].output) for w in azure] == [(700, 12), (1200, 44)]
    assert azure[1].arrived_s is not None
    assert azure[0].arrived_s is not None
    assert azure[1].arrived_s - azure[0].arrived_s == pytest.approx(3.3765433, abs=1e-5)
    burst = {w.name: w for w in read(sample(tmp_path, "burstgpt"))}
    assert shape(burst["s1"]) == [(100, (), 0.0), (230, (0,), 22.5)]
    assert len(burst["request"].calls) == 1


@pytest.mark.parametrize(
    ("text", "at_s"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("2000-02-29 12:00:00.25", 951825600.25),
        ("2000-02-29T14:00:00.250+02:00", 951825600.25),
        ("2001-02-29T00:00:00Z", None),
        ("2001-13-01T00:00:00Z", None),
        ("2001-01-01", None),
    ],
)
def test_moments_are_read_as_they_are_written(text: str, at_s: float | None) -> None:
    row = Row({"at": text}, "it")
    if at_s is not None:
        assert moment(row, "at") == at_s
        return
    with pytest.raises(ConfigError, match='"at" must be a date and time'):
        moment(row, "at")


def test_turns_wait_for_the_turn_that_they_answer(tmp_path: Path) -> None:
    path = sample(tmp_path, "bailian")
    found = {w.name: w for w in read(path)}
    assert shape(found["4"]) == [(40, (), 0.0), (64, (0,), 20.0)]
    assert [c.stage for c in found["4"].calls] == ["text", "search"]
    assert sorted(w.name for w in read(path, silence_s=5.0)) == ["4", "5", "8"]
    spec = next(s for s in played(path) if sum(1 for _ in s.calls()) == 2)
    assert shared(spec, 0, spec, 1) == 32


def test_our_own_recording_keeps_its_think_times_and_templates(tmp_path: Path) -> None:
    path = sample(tmp_path, "hexgen")
    assert shape(read(path)[0]) == [(400, (), 0.0), (500, (0,), 1.0), (500, (0,), 1.5)]
    spec = played(path)[0]
    assert not spec.is_graph
    assert next(spec.calls()).layers[0] == ("template:sql/plan", 300)


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_converted_is_the_same_workload(
    tmp_path: Path, name: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sample(tmp_path, name), tmp_path / "out.jsonl"
    assert main(["trace", "convert", str(path), str(out), f"--to={to}"]) == 0
    told = {"agentic-mooncake-v1": "agentic-mooncake"}
    assert TraceSource(out).known_format() == told.get(to, to)

    def told_of(trace: Path) -> list[object]:
        """Return lengths and think times; OTLP's times say who waits for whom in another way."""
        calls = [
            sorted((c.prompt, c.output, *((c.after, round(c.think_s, 2)) if to != "otel" else ()))
                   for c in w.calls)
            for w in read(trace)
        ]  # fmt: skip
        return sorted(calls)

    assert told_of(out) == told_of(path)


@pytest.mark.parametrize("to", ["hexgen", "agentic-mooncake-v1"])
def test_hashes_survive_a_conversion(tmp_path: Path, to: str) -> None:
    path, out = sample(tmp_path, "mooncake"), tmp_path / "out.jsonl"
    assert main(["trace", "convert", str(path), str(out), f"--to={to}"]) == 0
    specs = specs_of(read(out, block_tokens=0 if to == "hexgen" else BLOCK))
    assert shared(specs[0], 0, specs[1], 0) == 2 * BLOCK
    assert shared(specs[0], 0, specs[2], 0) == BLOCK


def test_hashes_are_made_from_what_our_recordings_share(tmp_path: Path) -> None:
    path, out = sample(tmp_path, "hexgen"), tmp_path / "out.jsonl"
    assert main(["trace", "convert", str(path), str(out), "--to=agentic-mooncake-v1"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    plans = [row["hash_ids"] for row in rows if row["stage"] == "plan"]
    assert len(plans[0]) == 400 // 64
    assert plans[0][: 300 // 64] == plans[1][: 300 // 64]
    assert plans[0][300 // 64] != plans[1][300 // 64]


def test_a_sample_is_some_of_the_workflows_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [mooncake(10.0 * n, [n]) for n in range(200)]
    path, out = lines(tmp_path / "t.jsonl", rows), tmp_path / "out.jsonl"
    argv = ["trace", "sample", str(path), str(out), "--count=20"]
    assert main([*argv, "--seed=1"]) == 0
    first = [w.arrived_s or 0.0 for w in read(out)]
    assert len(first) == 20
    assert first == sorted(first)
    assert "20 of 200 workflows" in capsys.readouterr().out
    assert main([*argv, "--seed=2"]) == 0
    assert [w.arrived_s for w in read(out)] != first


def test_info_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "info", str(sample(tmp_path, "mooncake")), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["workflows"], told["calls"]) == ("mooncake", 3, 3)
    assert told["span_s"] == 4.0
    assert told["hashed_share"] == pytest.approx(3 * BLOCK / (1436 + 1948 + 924), abs=1e-3)
    assert main(["trace", "info", str(sample(tmp_path, "weka"))]) == 0
    assert "1 workflows have parallel calls" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("holds no workflow",)),
        ("nonsense", ("line 1", "no known format")),
        ("{nonsense", ("line 1", "is not JSON")),
        ('{"a": 1}\n', ("line 1", "no known format")),
        (json.dumps(MOONCAKE[0]) + "\n{oops\n", ("line 2", "is not JSON")),
        (json.dumps(MOONCAKE[0]) + "\n\n[1]\n", ("line 3", "must be a JSON object")),
        (
            json.dumps(MOONCAKE[0]) + '\n{"timestamp": 1, "input_length": -4, "output_length": 2}',
            ("line 2", '"input_length" must be a whole number', "-4"),
        ),
        (
            json.dumps(MOONCAKE[0]) + '\n{"timestamp": 1, "output_length": 2}',
            ("line 2", '"input_length" is missing'),
        ),
        (
            json.dumps({**MOONCAKE[0], "hash_ids": ["x"]}),
            ("line 1", '"hash_ids" must be a list of whole numbers'),
        ),
        (
            json.dumps({**AGENTIC_1[1], "wait_for": ["nobody"]}),
            ("line 1", "waits for 'nobody'"),
        ),
        (AZURE + "soon,1,2\n", ("line 5", '"TIMESTAMP" must be a date and time')),
        (AZURE + "2024-02-03 04:05:06,1\n", ("line 5", "must have 3 values, not 2")),
        (json.dumps({**WEKA, "requests": [{"t": 0}]}), ("line 1, requests 1", '"in" is missing')),
        (
            json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "t"}]}]}]}),
            ("line 1", "spans 1", '"spanId" is missing'),
        ),
        (json.dumps({**HEXGEN[0], "calls": []}), ("line 1", '"calls" must be a list')),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    for argv in (
        ["trace", "info", str(path)],
        ["trace", "convert", str(path), str(tmp_path / "out")],
        ["trace", "sample", str(path), str(tmp_path / "out")],
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert all(word in error for word in ("bad.txt", *words)), error
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"], "nothing half written is left"


def test_what_cannot_be_read_or_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sample(tmp_path, "mooncake")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(path.read_bytes())[:-9])
    latin = tmp_path / "latin.csv"
    latin.write_bytes(AZURE.encode() + b"\xff,1,2\n")
    (tmp_path / "empty").mkdir()
    for argv in (
        ["info", str(tmp_path / "absent")], ["info", str(broken)], ["info", str(latin)],
        ["info", str(tmp_path / "empty")], ["convert", str(path), str(tmp_path / "empty")],
        ["sample", str(path), str(tmp_path / "out"), "--count=0"],
    ):  # fmt: skip
        assert main(["trace", *argv]) == 2, argv
        assert capsys.readouterr().err.count("\n") == 1


def test_long_files_are_read_as_they_go(tmp_path: Path) -> None:
    """The first workflow is there before the file has been read, so it is not held as a whole."""
    path = lines(tmp_path / "t.jsonl", [MOONCAKE[0]] * 50)
    with path.open("a") as file:
        file.write("{oops")
    source = TraceSource(path).workflows()
    assert next(source).calls[0].prompt == 1436
    with pytest.raises(ConfigError, match="line 51"):
        list(source)


def test_sessions_that_fell_silent_are_not_held(tmp_path: Path) -> None:
    rows = [mooncake(1e6 * n, [n], session_id=f"s{n}") for n in range(30)]
    path = lines(tmp_path / "t.jsonl", rows)
    with path.open("a") as file:
        file.write("{oops")
    source = TraceSource(path).workflows()
    assert [next(source).name for _ in range(29)] == [f"s{n}" for n in range(29)]
    with pytest.raises(ConfigError, match="line 31"):
        next(source)


def test_drawn_workflows_have_contents_of_their_own_but_share_what_several_do(
    tmp_path: Path,
) -> None:
    source = TraceSource(sample(tmp_path, "mooncake"))
    specs = drawn(source, 30, 3)
    assert specs == drawn(source, 30, 3)
    assert specs != drawn(source, 30, 4)
    assert len({spec.workflow_id for spec in specs}) == 30
    twins = [s for s in specs if next(s.calls()).prompt_tokens == 1948][:2]
    assert shared(twins[0], 0, twins[1], 0) == 2 * BLOCK, "not the blocks that are only its own"


def test_a_stretch_keeps_order_and_times_and_each_seed_has_another(tmp_path: Path) -> None:
    rows = [mooncake(1000.0 * n * n, [n], prompt=100 + n) for n in range(10)]
    source = TraceSource(lines(tmp_path / "t.jsonl", rows))
    first, second, third = (as_recorded(source, 4, seed) for seed in range(3))
    assert [s.arrival_s for s in first] == [0.0, 1.0, 4.0, 9.0]
    assert [next(s.calls()).prompt_tokens for s in second] == [104, 105, 106, 107]
    assert second[0].arrival_s == 0.0
    assert len(third) == 4
    with pytest.raises(ConfigError, match="has 10 workflows, fewer than 11"):
        as_recorded(source, 11, 0)
    with pytest.raises(ConfigError, match="no arrival times"):
        as_recorded(TraceSource(sample(tmp_path, "weka"), silence_s=1.0), 2, 0)


def test_links_skip_what_goes_without_saying_and_have_no_circles() -> None:
    times = [(0.0, 1.0), (0.2, 0.8), (2.0, 3.0), (2.0, 2.0), (2.0, 2.0), (3.0, 4.0)]
    calls = [TraceCall("s", 10, 1, *pair) for pair in times]
    found = link(TraceWorkflow("w", "t", calls, 0.0))
    assert [c.after for c in found.calls][:2] == [(), ()]
    assert found.calls[-1].after
    assert all(before < index for index, c in enumerate(found.calls) for before in c.after)


def test_capacity_counts_what_one_workflow_alone_has(tmp_path: Path) -> None:
    """A conversation's transcript is computed once for each conversation, not for all of them."""
    told = {**WEKA, "requests": [weka_call(10.0 * n, 1.0, list(range(4 + n))) for n in range(4)]}
    (spec,) = played(lines(tmp_path / "t.jsonl", [told]))
    engines = fleet("reference-4")
    bound = limits(engines, [spec])
    assert uncontended(engines, spec).total_s == pytest.approx(
        uncontended(engines, spec).work_s + sum(c.think_s for c in spec.calls())
    )
    lone = limits(engines, specs_of(read(lines(tmp_path / "u.jsonl", [
        {**told, "requests": told["requests"][:1]},
    ]))))  # fmt: skip
    assert bound.rate_per_s < lone.rate_per_s


def test_capacity_counts_what_several_workflows_share_once(tmp_path: Path) -> None:
    engines = fleet("reference-4")
    rows = [mooncake(1000.0 * n, [1, 2, 3, n + 9]) for n in range(6)]
    same = limits(engines, played(lines(tmp_path / "t.jsonl", rows)))
    rows = [mooncake(1000.0 * n, [10 * n, 10 * n + 1, 10 * n + 2, 5]) for n in range(6)]
    other = limits(engines, played(lines(tmp_path / "u.jsonl", rows)))
    assert same.rate_per_s > 1.5 * other.rate_per_s
    assert other.rate_per_s == pytest.approx(other.cold_rate_per_s)
    assert (
        same.rate_per_s
        < limits(
            engines,
            played(
                lines(tmp_path / "v.jsonl", [mooncake(0, [n + 9], prompt=412) for n in range(6)])
            ),
        ).rate_per_s
    ), "someone has to compute it"
