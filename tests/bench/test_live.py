"""Live runs against fake engines: library, command line, files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hexgen_vllm.bench.live import run
from hexgen_vllm.bench.load import Progress
from hexgen_vllm.bench.scenario import LiveConfig
from hexgen_vllm.cli import main
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault

SMALL: dict[str, Any] = {"workflows": 6, "rate": 200.0, "length_scale": 0.01, "deadline_s": 60.0}
ARGS = "--workflows 6 --rate 200 --length-scale 0.01 --deadline 60".split()  # noqa: SIM905


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


async def command(*words: str) -> int:
    """Run ``hexgen-vllm bench live`` beside the servers of this loop."""
    return await asyncio.to_thread(main, ["bench", "live", *words])


async def test_a_run_plays_every_call_of_every_workflow(server: FakeServer) -> None:
    config = LiveConfig(server.url, "p", **SMALL)
    reports: list[Progress] = []
    result = await run(config, lambda _, progress: reports.append(progress))
    specs = config.specs()
    assert len(server.received) == sum(1 for spec in specs for _ in spec.calls())
    assert sum(call.output_tokens for call in result.calls) == sum(s.output_tokens for s in specs)
    assert result.summary.on_time == 6
    assert (result.summary.errors, result.summary.lost) == (0, 0)
    assert (reports[-1].finished, reports[-1].open) == (6, 0)


async def test_the_warm_up_is_played_and_not_counted(server: FakeServer) -> None:
    config = LiveConfig(server.url, "p", warmup=3, **SMALL)
    result = await run(config)
    assert len(result.workflows) == 6
    played = {json.dumps(request.headers["x-hexgen-workflow-id"]) for request in server.received}
    assert len(played) == 9
    warm = {spec.workflow_id for spec in config.specs()[:3]}
    assert not warm & {record.workflow_id for record in result.workflows}
    assert not warm & {record.workflow_id for record in result.calls}


async def test_failed_workflows_count_as_errors(server: FakeServer) -> None:
    server.faults.extend([Fault("status", status=500)] * 2)
    row = (await run(LiveConfig(server.url, "p", **SMALL))).row()
    assert (row["errors"], row["on_time"], row["lost"]) == (2, 4, 0)
    assert row["error_messages"] == {"information_retriever: HTTP 500: as asked": 2}
    assert row["min_deadline_95_s"] is None


async def test_lost_workflows_are_counted(server: FakeServer) -> None:
    server.faults.append(Fault("hang"))
    row = (await run(LiveConfig(server.url, "p", drain_s=3.0, **SMALL))).row()
    assert (row["lost"], row["errors"]) == (1, 0)


async def test_the_same_run_id_repeats_every_prompt(server: FakeServer) -> None:
    for _ in range(2):
        await run(LiveConfig(server.url, "p", run_id="again", **SMALL))
    prompts = [json.dumps(json.loads(request.body)["prompt"]) for request in server.received]
    half = len(prompts) // 2
    assert sorted(prompts[:half]) == sorted(prompts[half:])
    await run(LiveConfig(server.url, "p", run_id="other", **SMALL))
    other = {json.dumps(json.loads(r.body)["prompt"]) for r in server.received[2 * half :]}
    assert not {p for p in other & set(prompts) if len(p) > 200}


async def test_calls_longer_than_the_context_are_refused_before_the_start(
    server: FakeServer,
) -> None:
    with pytest.raises(ConfigError, match=r"does not fit into the 32768.*length scale of"):
        await run(LiveConfig(server.url, "p", **{**SMALL, "length_scale": 5.0}))
    assert server.received == []


async def test_the_command_prints_a_table_and_writes_json_and_plot(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeServer(FakeSettings(step_s=0.002)) as other:
        code = await command(
            *("--url", server.url, "--policy-name", "fast"),
            *("--url", f"{other.url}/v1", "--policy-name", "slow"),
            *("--seed", "1", "2", *ARGS),
            *("--json", str(tmp_path / "new" / "out.json")),
            *("--plot", str(tmp_path / "out.png")),
        )
    assert code == 0
    rows = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("fast", 1),
        ("slow", 1),
        ("fast", 2),
        ("slow", 2),
    ]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert captured.out.count("fast") == 3  # two runs and their mean
    assert "min deadline @95%" in captured.out
    assert "fast seed 1: 6/6 started, 0 open, 6 finished, 0 late, 0 failed" in captured.err


async def test_append_keeps_earlier_results(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for name in ("one", "two"):
        words = ("--url", server.url, "--policy-name", name, *ARGS, "--json", str(out), "--append")
        assert await command(*words) == 0
    assert [row["policy"] for row in json.loads(out.read_text())] == ["one", "two"]
    assert await command("--url", server.url, *ARGS, "--json", str(out)) == 0
    assert len(json.loads(out.read_text())) == 1


async def test_a_run_without_any_success_fails(server: FakeServer) -> None:
    server.fault = Fault("status", status=503)
    assert await command("--url", server.url, *ARGS) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "http://127.0.0.1:1", *ARGS), "cannot be used"),
        (("--url", "127.0.0.1:1"), "url must start with http"),
        (("--url", "http://a", "--policy-name", "x", "--policy-name", "y"), "do not make pairs"),
        (("--url", "http://a", "--rate", "0"), "rate must be at least"),
        (("--url", "http://a", "--trace", "/no/such.json"), "/no/such.json cannot be read"),
        (("--url", "http://a", "--json", "/proc/none/out.json"), "cannot be written"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "live", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_a_file_that_is_not_a_result_is_not_appended_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    for content in ("{}", "[1]", "not JSON"):
        out.write_text(content)
        assert main(["bench", "live", "--url", "http://a", "--json", str(out), "--append"]) == 2
        assert "out.json" in capsys.readouterr().err
        assert out.read_text() == content
