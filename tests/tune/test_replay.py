"""Recent workflows: the file format, the ring, and what the simulator makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.recent import MAX_CALLS, RecentCall, RecentWorkflow, Ring, parse
from hexgen_vllm.sim.workloads.traces.recorded import groups
from hexgen_vllm.tune.replay import Recent, read


def call(at_s: float, took_s: float, stage: str = "revise", cached: int | None = 60) -> RecentCall:
    return RecentCall(stage, at_s, took_s, prompt=100, output=8, cached=cached)


def workflow(at: float = 0.0, *calls: RecentCall, tenant: str = "default") -> RecentWorkflow:
    return RecentWorkflow("sql", at, calls or (call(0.0, 1.0),), tenant, 30.0, 12.5)


def recent_of(folder: Path, recorded: Iterable[RecentWorkflow]) -> Recent:
    path = folder / "recent.jsonl"
    path.write_text("".join(f"{one.line()}\n" for one in recorded))
    return read(path)


def test_what_is_written_is_read_back() -> None:
    ring = Ring()
    written = [workflow(0.0), workflow(2.0, call(0.0, 1.0, cached=None), tenant="b")]
    for one in written:
        ring.add(one)
    assert parse(ring.text().splitlines(), "it") == written


def test_lines_hold_lengths_and_timings_only() -> None:
    data = json.loads(workflow().line())
    assert set(data) == {"type", "arrived_s", "calls", "tenant", "deadline_s", "latency_s"}
    assert set(data["calls"][0]) == {"stage", "at_s", "took_s", "prompt", "output", "cached"}


def test_the_ring_keeps_the_newest_and_never_grows() -> None:
    ring = Ring(size=3)
    for index in range(10):
        ring.add(workflow(float(index)))
    ring.add(workflow(99.0, *(call(0.0, 1.0) for _ in range(MAX_CALLS + 1))))
    assert [w.arrived_s for w in ring] == [7.0, 8.0, 9.0]
    assert (len(ring), ring.seen) == (3, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": 5}, 'it, line 2: "type" must be a name'),
        ({"text": "secret"}, "it, line 2: unknown key 'text'"),
        ({"calls": []}, 'it, line 2: "calls" must be a list'),
        ({"calls": [{"stage": "x"}]}, 'it, line 2, call 1: "at_s" is missing'),
        ({"arrived_s": "soon"}, 'it, line 2: "arrived_s" must be a number'),
        ({"deadline_s": -1}, 'it, line 2: "deadline_s" must be a number'),
    ],
)
def test_a_bad_line_is_named(change: dict[str, object], message: str) -> None:
    good = json.loads(workflow().line())
    with pytest.raises(ConfigError, match=message):
        parse([json.dumps(good), json.dumps({**good, **change})], "it")


@pytest.mark.parametrize("text", ["", "{nonsense"])
def test_a_file_that_holds_nothing_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recent.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"recent\.jsonl"):
        read(path)


def test_calls_that_overlap_are_parallel() -> None:
    calls = [call(0.0, 1.0), call(1.0, 2.0, "a"), call(1.1, 0.5, "b"), call(3.0, 1.0)]
    assert [[c.stage for c in group] for group in groups(calls)] == [
        ["revise"],
        ["a", "b"],
        ["revise"],
    ]


def test_the_template_is_the_usual_hit_and_the_rest_is_the_workflows(tmp_path: Path) -> None:
    hits = (60, 60, 60, 80, None)
    recorded = [workflow(float(i), call(0.0, 1.0, cached=hit)) for i, hit in enumerate(hits)]
    recent = recent_of(tmp_path, recorded)
    layers = [[layer.tokens for layer in next(spec.calls()).layers] for spec in recent.specs]
    assert layers == [[60], [60], [60], [60, 20], [60]]
    assert recent.rate_per_s == pytest.approx(1.0)
    assert recent.deadline_s == 30.0


def test_draws_are_seeded_and_have_contents_of_their_own(tmp_path: Path) -> None:
    recorded = (workflow(float(i), tenant="ab"[i % 2]) for i in range(6))
    recent = recent_of(tmp_path, recorded)
    drawn = recent.draw(50, seed=3)
    assert drawn == recent.draw(50, seed=3)
    assert drawn != recent.draw(50, seed=4)
    assert len({spec.workflow_id for spec in drawn}) == 50
    assert {spec.tenant for spec in drawn} == {"a", "b"}
