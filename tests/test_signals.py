"""A signal that comes when a program is done does not change its exit code."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen_vllm import signals
from tests.cluster.fakes import SERVER

# Runs a module as a program, and signals it once more when it has run and Python shuts down.
LATE = """
import atexit, os, runpy, signal, sys
for number in (signal.SIGTERM, signal.SIGINT):
    atexit.register(os.kill, os.getpid(), number)
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
ROUTER = ("hexgen_vllm.router", "--port", "0", "--worker-urls", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "words", [ROUTER, ("hexgen_vllm.serve", "--cluster")], ids=["router", "cluster"]
)
def test_a_late_signal_does_not_change_the_exit_code(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    if words[-1] == "--cluster":
        command = f"[{sys.executable}, -S, {SERVER}, '{{host}}', '{{port}}', ok]"
        file = tmp_path / "cluster.yaml"
        file.write_text(f"engines: [{{name: e, command: {command}}}]\nrouter: false\n")
        words = (*words, str(file))
    with subprocess.Popen(
        [sys.executable, "-c", LATE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as program:
        assert program.stdout is not None
        assert any(b"listening url" in line or b"ready: " in line for line in program.stdout)
        program.send_signal(signal.SIGTERM)
        said, _ = program.communicate()
    assert program.returncode == 0
    assert b"Traceback" not in said


def test_who_was_not_asked_to_end_leaves_the_callers_handlers() -> None:
    """A start that fails within another program must not leave it, and its children, deaf."""

    async def end() -> None:
        with signals.handled(lambda: None):
            pass

    before = [signal.getsignal(number) for number in signals.ENDING]
    asyncio.run(end())
    assert [signal.getsignal(number) for number in signals.ENDING] == before
