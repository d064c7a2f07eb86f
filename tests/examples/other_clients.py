"""Run the examples of agent frameworks in an environment of their own.

    python -m tests.examples.other_clients

They ask for an older openai than vLLM does, so the environment of the tests cannot hold them.
They are installed once, into ``.cache/clients``.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import venv
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.examples.clients import ROOT, check, module
from tests.text2sql import music

HOME = ROOT / ".cache" / "clients"
PACKAGES = (
    "langchain-openai==1.7.3",
    "llama-index-llms-openai-like==0.8.1",
    "openai-agents==0.20.0",
    "anthropic==2.14.0",
    "langchain==1.5.2",
    "langchain-community==0.4.2",
    "vanna[openai]==2.0.2",
)
AGENTS = (
    ("langchain_sql", "sql_db_query", "query", "It is [(200,)]."),
    ("vanna_sql", "run_sql", "sql", "200"),
)
PROGRAMS = ("langchain_chat", "llama_index_chat", "openai_agents", "anthropic_sdk")


def prepare() -> str:
    """Return the interpreter of the environment, which is made when it is not there."""
    python, done = HOME / "bin" / "python", HOME / "installed"
    if done.exists() and done.read_text() == "\n".join(PACKAGES):
        return str(python)
    venv.create(HOME, clear=True, symlinks=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    done.write_text("\n".join(PACKAGES))
    return str(python)


async def check_agent(program: str, python: str, tool: str, key: str, shown: str) -> None:
    """Check that what an agent asks about a database is one workflow.

    Args:
        program: the agent.
        python: the interpreter.
        tool: what the agent calls the tool that runs a query.
        key: the tool's argument.
        shown: what the agent shows of the result.
    """
    calls: list[dict[str, str]] = []
    finished: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        calls.append({name.lower(): value for name, value in request.headers.items()})
        last = (await request.json())["messages"][-1]
        said: dict[str, Any] = {"role": "assistant", "content": f"It is {last['content']}."}
        if last["role"] != "tool":
            arguments = json.dumps({key: "SELECT COUNT(*) FROM Track"})
            query = {"name": tool, "arguments": arguments}
            said = {"role": "assistant", "content": None,
                    "tool_calls": [{"id": "t", "type": "function", "function": query}]}  # fmt: skip
        choice = {"index": 0, "finish_reason": "stop", "message": said}
        return web.json_response(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
        )

    async def finish(request: web.Request) -> web.Response:
        finished.append(request.query["session_id"])
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_post("/finish_session", finish)
    with tempfile.TemporaryDirectory() as folder:
        file = music.build_sqlite(Path(folder) / "music.sqlite")
        async with TestServer(app) as server:
            process = await asyncio.create_subprocess_exec(
                *module(program, python), str(server.make_url("/v1")), "m", str(file),
                "How many tracks are there?", cwd=ROOT,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert shown in said.decode(), said.decode()
    ids = {headers["x-hexgen-workflow-id"] for headers in calls}
    assert finished == list(ids)
    first, second = (headers["x-hexgen-stage"] for headers in calls)
    assert second == f"{first}-tool"
    left = [float(headers["x-hexgen-workflow-deadline-ms"]) for headers in calls]
    assert 60_000 >= left[0] > left[1] > 0


def main() -> int:
    """Check every program; returns 1 when one fails."""
    python = prepare()
    failed = 0
    checks = {name: partial(check, module(name, python)) for name in PROGRAMS}
    for name, *agent in AGENTS:
        checks[name] = partial(check_agent, name, python, *agent)
    for name, one in checks.items():
        try:
            asyncio.run(one())
            print(f"{name}: ok", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{name}: FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
