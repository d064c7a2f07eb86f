"""The programs in ``examples/clients``, run as users run them, before a server that notes calls."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings

ROOT = Path(__file__).resolve().parents[2]
CURL = (str(ROOT / "examples/clients/curl.sh"),)


def module(name: str, python: str = sys.executable) -> tuple[str, ...]:
    """Return the command of the program ``name``."""
    return (python, "-m", f"examples.clients.{name}")


async def check(command: Sequence[str]) -> None:
    """Run ``command`` and check that its two calls were one workflow with one deadline."""
    async with FakeServer(FakeSettings()) as server:
        program = await asyncio.create_subprocess_exec(
            *command,
            f"{server.url}/v1",
            "tiny",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await program.communicate()
        assert program.returncode == 0, said.decode()
        assert b" t0 t1 t2" in said
        calls = [one.headers for one in server.received if one.method == "POST"]
        ended = server.finished
    assert [headers["x-hexgen-stage"] for headers in calls] == ["draft", "shorten"]
    assert len({headers["x-hexgen-workflow-id"] for headers in calls}) == 1
    first_ms, second_ms = (float(h["x-hexgen-workflow-deadline-ms"]) for h in calls)
    assert 30_000 >= first_ms >= second_ms > 0
    told = [headers.get("x-hexgen-workflow-final") for headers in calls]
    assert (told, len(ended)) in (([None, "1"], 0), ([None, None], 1)), "the end is told once"
