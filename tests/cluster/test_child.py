"""What stands between supervisor and server: passes signals on, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hexgen_vllm.cluster import child
from hexgen_vllm.ports import free_ports
from tests.cluster.fakes import SERVER, ask, is_alive

FILE = str(Path(child.__file__))
# A parent that starts a program and does nothing else; the grace is short for the test.
PARENT = f"""
import os, subprocess, sys, time
code = "import runpy; m = runpy.run_path({FILE!r}); m['run'].__globals__['GRACE_S'] = 1; "
code += "import sys; m['end_like'](m['run'](int(sys.argv[1]), sys.argv[2:]))"
subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", code, str(os.getpid()), *sys.argv[1:]],
    start_new_session=True,
)
time.sleep(60)
"""


def until(true: Callable[[], bool]) -> None:
    """Wait until ``true()`` is; the test's time limit is the only clock."""
    while not true():
        pass


def pids_of(url: str) -> list[int]:
    """Return the processes of a fake server, as soon as it answers."""
    while True:
        try:
            return [int(pid) for pid in ask(url)["pids"]]
        except OSError:
            continue


def run(*command: str, parent: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in between and return how that ended."""
    words = [sys.executable, FILE, str(parent or os.getpid()), *command]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("exit()", 0), ("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL)],
)
def test_it_ends_as_the_program_did(code: str, expected: int) -> None:
    assert run(sys.executable, "-c", code).returncode == expected


def test_a_program_that_is_not_there_is_one_sentence() -> None:
    done = run("/no/such/program")
    assert done.returncode == 1
    assert done.stderr == "/no/such/program cannot be started: No such file or directory.\n"


def test_a_parent_that_is_gone_already_starts_nothing() -> None:
    done = run(sys.executable, "-c", "print('ran')", parent=1)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_kill_of_all_children_still_ends_the_program() -> None:
    [port] = free_ports("127.0.0.1", 1)
    command = [sys.executable, FILE, str(os.getpid()), sys.executable, SERVER, "127.0.0.1"]
    process = subprocess.Popen([*command, str(port)], start_new_session=True)
    [pid] = pids_of(f"http://127.0.0.1:{port}")
    process.kill()
    process.wait()
    until(lambda: not is_alive(pid))


@pytest.mark.parametrize("mode", ["ok", "parent", "stubborn"])
def test_nothing_outlives_the_parent(mode: str) -> None:
    [port] = free_ports("127.0.0.1", 1)
    command = [sys.executable, "-c", PARENT, sys.executable, SERVER, "127.0.0.1", str(port), mode]
    parent = subprocess.Popen(command)
    pids = pids_of(f"http://127.0.0.1:{port}")
    parent.kill()
    parent.wait()
    until(lambda: not any(map(is_alive, pids)))
