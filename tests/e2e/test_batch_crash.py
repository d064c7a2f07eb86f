"""Batches on a real engine that is killed, alone and behind a router: every request once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.forkserver import Forked, ForkServer
from tests.e2e.programs import Server, Spawned, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
SMALL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # on a CPU: one process less
COUNT = 40


def requests(path: Path) -> list[str]:
    names = [f"r{i}" for i in range(COUNT)]
    body = {"model": "tiny", "prompt": "SELECT name FROM", "max_tokens": 24, "ignore_eos": True}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        for name in names
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return names


def run(port: int, source: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["batch", "run", source, "--out", out, "--base-url", f"http://127.0.0.1:{port}"]
    return subprocess.Popen([sys.executable, "-m", "hexgen_vllm", *map(str, words)])


def wait_for_some(server: Server, count: int) -> None:
    while True:
        (batch,) = server.get("/v1/batches").json["data"] or [None]
        if batch is not None and batch["request_counts"]["completed"] >= count:
            assert batch["status"] == "in_progress", "it is killed in the middle"
            return
        time.sleep(0.02)


def kill(program: Forked | Spawned) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


def check(out: Path, names: list[str]) -> None:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["custom_id"] for one in found] == names
    for one in found:
        assert one["response"]["status_code"] == 200
        assert one["response"]["body"]["usage"]["completion_tokens"] == 24


def test_an_engine_alone_goes_on_after_it_was_killed(
    forks: ForkServer, tiny_model: str, tmp_path: Path
) -> None:
    port, out = free_port(), tmp_path / "out.jsonl"
    names = requests(tmp_path / "in.jsonl")
    argv = [tiny_model, f"--hexgen-batch-dir={tmp_path / 'batches'}", *small_engine(port)]

    def start(log: str) -> Forked:
        return forks.start("hexgen_vllm.serve", argv, tmp_path / log, SMALL)

    program = start("first")
    server = Server(program, port).wait_healthy()
    command = run(port, tmp_path / "in.jsonl", out)
    try:
        wait_for_some(server, 5)
        kill(program)
        program = start("second")
        Server(program, port).wait_healthy()
        assert command.wait(120) == 0
        check(out, names)
        assert program.stop() == 0
    finally:
        command.kill()
        kill(program)


def test_a_router_and_its_engine_go_on_after_both_were_killed(
    forks: ForkServer, tiny_model: str, tmp_path: Path
) -> None:
    engine_port, port, out = free_port(), free_port(), tmp_path / "out.jsonl"
    names = requests(tmp_path / "in.jsonl")
    argv = ["--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine_port}",
            "--batch-dir", str(tmp_path / "batches")]  # fmt: skip

    def start(log: str) -> tuple[Forked, Spawned]:
        model = [tiny_model, *small_engine(engine_port)]
        engine = forks.start("hexgen_vllm.serve", model, tmp_path / f"engine-{log}", SMALL)
        return engine, Spawned("hexgen_vllm.router", argv, tmp_path / f"router-{log}")

    engine, router = start("first")
    server = Server(router, port).wait_healthy()
    command = run(port, tmp_path / "in.jsonl", out)
    try:
        wait_for_some(server, 5)
        kill(engine)
        kill(router)
        engine, router = start("second")
        assert command.wait(120) == 0
        check(out, names)
        assert router.stop() == 0
    finally:
        command.kill()
        kill(engine)
        kill(router)
