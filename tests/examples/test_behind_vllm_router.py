"""What vllm-router passes on to an engine, as docs/other-stacks.md says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from hexgen_vllm.bench.peer import vllm_router
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import BODIES

PROGRAM = Path(sys.executable).with_name("vllm-router")
HEADERS = {
    "x-hexgen-workflow-deadline-ms": "5000",
    "X-Session-ID": "s",
    "X-Vllm-Priority": "-5",
    "X-Request-ID": "r",
}
SAID = {
    "priority": 3,
    "vllm_xargs": {
        "hexgen_workflow_deadline_ms": 4000,
        "agentic_context": {"program_id": "p", "deadline_seconds": 9},
    },
}
WITH_HEADERS = {"/v1/chat/completions", "/v1/completions"}
PATHS = sorted(WITH_HEADERS | {"/v1/responses", "/v1/messages"})


@pytest.fixture
async def engine() -> AsyncIterator[FakeServer]:
    async with FakeServer(FakeSettings()) as server:
        yield server


@pytest.mark.parametrize("mode", ["vllm_router", "vllm_router_program"])
async def test_what_reaches_the_engine(engine: FakeServer, mode: str, tmp_path: Path) -> None:
    router = vllm_router(str(PROGRAM), mode, [engine.url], tmp_path / "log")
    async with router as url, aiohttp.ClientSession() as client:
        for path in PATHS:
            body = {"model": "tiny", **BODIES[path], **SAID}
            async with client.post(url + path, json=body, headers=HEADERS) as answer:
                assert answer.status == 200
        calls = {one.path: one for one in engine.received if one.path in PATHS}
        await asyncio.sleep(0)
    assert set(calls) == set(PATHS)
    for path, call in calls.items():
        body = json.loads(call.body)
        assert {name: body[name] for name in SAID} == SAID, "the body says it on every path"
        passed = {name for name in HEADERS if name in call.headers}
        assert passed == (set(HEADERS) if path in WITH_HEADERS else set()), path
