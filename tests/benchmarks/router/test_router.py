"""The router benchmark: what it counts as lost, what it reports, and a short look at the router."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.router import (
    router,
    router_engine,
    router_sides,
)
from benchmarks.router.router_load import PROGRAM, Call
from benchmarks.router.router_sides import (
    OURS,
    PROGRAM_MODE,
    ROUND_ROBIN,
)
from hexgen_vllm.cli import main

RUN = {
    "cpu_ms_json": 0.3, "cpu_ms_sse": 1.5, "ttft_p50_ms_1": 0.6, "ttft_p99_ms_1": 2.0,
    "ttft_p50_ms_64": 1.0, "ttft_p99_ms_64": 4.0, "events_per_s": 30_000.0,
    "busy_at_full_speed": 0.99, "events_per_cpu_s": 30_303.0, "rss_mib_streams": 100.0,
    "lost_events": 0.0,
}  # fmt: skip
TTFT = {key: 0.1 for key in RUN if key.startswith("ttft")}


def answered(tokens: int, pieces: list[bytes], *, stream: bool = True) -> Call:
    return Call(0, tokens, stream, body=pieces, status=200)


def test_every_event_out_of_place_is_seen() -> None:
    events = list(router_engine.events(5))
    assert answered(5, events).wrong() == 0
    assert answered(5, [b"".join(events)]).wrong() == 0, "how they were cut does not matter"
    assert answered(5, [*events[:2], *events[3:]]).wrong() > 0, "one is missing"
    assert answered(5, [events[0], events[2], events[1], *events[3:]]).wrong() == 2, "two moved"
    assert answered(5, [*events[:2], *events[1:]]).wrong() > 0, "one came twice"
    assert answered(5, events[:-1]).wrong() == 1, "the end is missing"
    broken = answered(5, events)
    broken.status = 0
    assert broken.wrong() == 1
    whole = router_engine.body(5)
    assert answered(5, [whole[:9], whole[9:]], stream=False).wrong() == 0
    assert answered(5, [whole[:-1]], stream=False).wrong() == 1


def test_a_stream_that_was_cut_short_ends_where_its_engine_stopped() -> None:
    *events, done = router_engine.events(50)
    call = answered(50, [*events[:7], done])
    call.sent = 7
    assert call.wrong() == 0
    call.sent = 8
    assert call.wrong() > 0


def test_each_router_is_told_of_workflows_in_its_own_way() -> None:
    call = Call(7, 3, stream=True)
    assert b"\r\nx-hexgen-workflow-id: w1\r\n" in call.request("")
    assert b"\r\nx-hexgen-workflow-final: 1\r\n" in call.request("")
    agent = json.loads(call.request(PROGRAM).partition(b"\r\n\r\n")[2])["vllm_xargs"]
    assert agent == {
        "agentic_context": {"program_id": "w1", "task_id": "w1", "deadline_seconds": 60}
    }


def test_ratios_are_of_medians() -> None:
    runs = [{**RUN, "cpu_ms_json": value} for value in (0.2, 0.4, 9.0)]
    peer = {**RUN, "cpu_ms_json": 0.25, "cpu_ms_sse": 1.0, "events_per_s": 60_000.0}
    program = {**peer, "cpu_ms_json": 0.5}
    found = router.report(
        {"direct": [{**TTFT, "events_per_s": 1.0}], OURS: runs, ROUND_ROBIN: [peer],
         PROGRAM_MODE: [program]}, "0.1.17",
    )  # fmt: skip
    assert found["cpu_ratio_json"] == 1.6
    assert found["cpu_ratio_json_program"] == 0.8
    assert found["cpu_ratio_sse"] == 1.5
    assert found["events_per_s_ratio"] == 0.5
    assert found["added_ttft_p50_ms"] == 0.5
    assert found["added_ttft_p99_ms_64_clients"] == 3.9
    assert found["rss_mib_2000_streams"] == 100.0
    assert found["lost_events"] == 0
    assert found["environment"]["peer"] == "0.1.17"
    assert "note" not in found
    assert "cpu_ratio_json 1.6" in router.table(found)


@pytest.mark.parametrize(("compiled", "word"), [(True, "is compiled"), (False, "plain Python")])
def test_says_whether_the_router_is_compiled(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, word: str
) -> None:
    monkeypatch.setattr(router_sides, "compiled", lambda: compiled)
    found = router.report({"direct": [{**TTFT, "events_per_s": 1.0}], OURS: [RUN]})
    assert found["environment"]["compiled"] is compiled
    assert word in router.table(found)


def test_lost_events_of_every_run_count() -> None:
    runs = [{**RUN, "lost_events": float(n)} for n in (0, 0, 2)]
    found = router.report({"direct": [{**TTFT, "events_per_s": 1.0}], OURS: runs})
    assert found["lost_events"] == 2
    assert found["cpu_ratio_sse"] is None


@pytest.mark.parametrize(
    ("wrong", "word"),
    [(["--repeats", "0"], "repeats"), (["--scale", "0"], "scale"), (["--peer", "/no"], "peer")],
)
def test_refuses_what_cannot_be_measured(
    wrong: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "router", *wrong]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.e2e
def test_measures_the_router_alone_without_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cores = os.sched_getaffinity(0)
    out = tmp_path / "deep" / "router.json"
    assert main(["bench", "router", "--scale", "0.03", "--repeats", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["lost_events"] == 0
    assert found["cpu_ratio_sse"] is None
    assert found["sides"][OURS]["cpu_ms_sse"] > 0
    assert found["rss_mib_2000_streams"] > 0
    assert "vllm-router is not installed" in found["note"]
    assert found["note"] in capsys.readouterr().out
    assert os.sched_getaffinity(0) == cores
