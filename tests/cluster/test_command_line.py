"""The supervisor as a process: what it prints, its exit codes, and that it leaves no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cluster.fakes import SERVER, are_gone, ask, is_alive, make_die

ENGINE = (
    f"  - {{name: %s, command: [{sys.executable}, -S, {SERVER}, '{{host}}', '{{port}}', %s]}}\n"
)


def cluster_file(tmp_path: Path, *modes: str, more: str = "") -> Path:
    engines = "".join(ENGINE % (f"e{i}", mode) for i, mode in enumerate(modes))
    path = tmp_path / "cluster.yaml"
    path.write_text(f"engines:\n{engines}router: false\nlog_dir: {tmp_path / 'logs'}\n{more}")
    return path


@asynccontextmanager
async def supervisor(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hexgen_vllm.serve", "--cluster", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready(process: asyncio.subprocess.Process) -> list[str]:
    """Return the engines' URLs of the ready line."""
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("ready: no router; engines e0 http://127.0.0.1:"), line
    return [word.strip(",;") for word in line.split() if word.startswith("http://")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    async with supervisor(cluster_file(tmp_path, "ok", "parent")) as process:
        started = [pid for url in await ready(process) for pid in ask(url)["pids"]]
        process.send_signal(number)
        assert await process.wait() == 0
    assert len(started) == 3
    assert are_gone(started)


async def test_a_death_is_the_end_of_all_and_exit_code_1(tmp_path: Path) -> None:
    async with supervisor(cluster_file(tmp_path, "ok", "ok")) as process:
        urls = await ready(process)
        started = [pid for url in urls for pid in ask(url)["pids"]]
        await asyncio.to_thread(make_die, urls[0])
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"engine e0 died with exit code 7" in errors
    assert b"  asked to die" in errors
    assert b"Traceback" not in errors
    assert are_gone(started)


async def test_a_death_while_starting_is_exit_code_1(tmp_path: Path) -> None:
    async with supervisor(cluster_file(tmp_path, "ok", "dies")) as process:
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"engine e1 ended with exit code 3 while starting" in errors
    assert b"  no luck today" in errors


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    path = cluster_file(tmp_path, "stubborn", more="stop_grace_s: 1000")
    async with supervisor(path) as process:
        urls = await ready(process)
        [pid] = ask(urls[0])["pids"]
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not is_alive(pid)


async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    async with supervisor(cluster_file(tmp_path, "ok", "ok")) as process:
        started = [pid for url in await ready(process) for pid in ask(url)["pids"]]
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        while any(map(is_alive, started)):  # the test's time limit is the only clock
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--cluster", "/no/such.yaml"),
            "/no/such.yaml cannot be read: No such file or directory.",
        ),
        (("--cluster",), "argument --cluster: expected one argument."),
        (("--cluster=x.yaml", "model"), "unrecognized arguments: model."),
    ],
)
async def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], sentence: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hexgen_vllm.serve", *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert errors.decode() == f"python -m hexgen_vllm.serve: {sentence}\n"
    assert process.returncode == 2
