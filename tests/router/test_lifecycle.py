"""The router as a process: SIGTERM, draining, the grace period, exit codes."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Fault
from hexgen_vllm.testing.stand import CHAT

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}


@dataclass
class Process:
    """A router process."""

    url: str
    process: asyncio.subprocess.Process
    client: aiohttp.ClientSession

    async def status(self, path: str) -> int:
        async with self.client.get(self.url + path) as answer:
            return int(answer.status)

    def stream(self, tokens: int) -> Any:
        return self.client.post(
            self.url + CHAT, json={**BODY, "max_tokens": tokens, "stream": True}
        )

    async def log(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@asynccontextmanager
async def started(*urls: str, **flags: object) -> AsyncIterator[Process]:
    flags = {"port": 0, **flags}
    options = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hexgen_vllm.router", *options,
        "--worker-urls", *urls, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = (await process.stderr.readline()).decode()
        found = re.search(r"listening url=(\S+)", line)
        assert found, line
        async with aiohttp.ClientSession() as client:
            one = Process(found[1], process, client)
            while await one.status("/readiness") != 200:
                await asyncio.sleep(0.01)
            yield one
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_finishes_what_was_accepted() -> None:
    async with FakeServer(FakeSettings(step_s=0.01)) as engine, started(engine.url) as router:
        async with router.stream(60) as answer:
            await answer.content.readline()
            router.process.send_signal(signal.SIGTERM)
            while await router.status("/readiness") == 200:
                await asyncio.sleep(0.005)
            assert await router.status("/liveness") == 200
            async with router.stream(1) as refused:
                assert refused.status == 503
                reason = refused.headers["x-llm-d-request-dropped-reason"]
                assert reason == "rejected-shutting-down"
                assert refused.headers["Retry-After"] == "5"
            text = (await answer.read()).decode()
        assert text.count("data: ") >= 60
        assert text.endswith("data: [DONE]\n\n")
        assert await router.process.wait() == 0
        assert "Traceback" not in await router.log()


async def test_after_the_grace_period_clients_are_told() -> None:
    async with FakeServer() as engine:
        engine.fault = Fault("hang", 2)
        async with started(engine.url, shutdown_timeout=0.05) as router:
            whole = asyncio.ensure_future(router.client.post(router.url + CHAT, json=BODY))
            async with router.stream(9) as answer:
                await answer.content.readline()
                router.process.send_signal(signal.SIGTERM)
                last = (await answer.read()).decode().split("\n\n")[-2]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == "rejected-shutting-down"
            assert (await whole).status in (200, 503)
            assert await router.process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_without_calls_it_stops_at_once(number: signal.Signals) -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        router.process.send_signal(number)
        assert await router.process.wait() == 0


async def test_a_second_signal_ends_the_waiting() -> None:
    async with FakeServer() as engine:
        engine.fault = Fault("hang", 2)
        async with (
            started(engine.url, shutdown_timeout=3600) as router,
            router.stream(9) as answer,
        ):
            await answer.content.readline()
            router.process.send_signal(signal.SIGTERM)
            while await router.status("/readiness") == 200:
                await asyncio.sleep(0.005)
            router.process.send_signal(signal.SIGTERM)
            assert b"shutting-down" in await answer.read()
            assert await router.process.wait() == 0


async def test_nothing_of_a_call_is_logged() -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        body = {**BODY, "messages": [{"role": "user", "content": "the secret"}]}
        engine.faults.extend((Fault("status", status=500), Fault("garbage", 1)))
        for _ in range(3):
            async with router.client.post(router.url + CHAT, json=body) as answer:
                await answer.read()
        router.process.send_signal(signal.SIGTERM)
        assert await router.process.wait() == 0
        assert "secret" not in await router.log()


async def test_a_restart_loses_nothing_that_was_not_accepted() -> None:
    """Clients that send again what was refused are all answered, by the old router or the new."""
    async with FakeServer(FakeSettings(step_s=0.002)) as engine:
        async with started(engine.url) as old:
            port, calls = int(old.url.rpartition(":")[2]), 40
            clients = [asyncio.ensure_future(_patient(old.url, i)) for i in range(calls)]
            while len(engine.received) < calls // 4:
                await asyncio.sleep(0.002)
            old.process.send_signal(signal.SIGTERM)
            assert await old.process.wait() == 0
        async with started(engine.url, port=port):
            answers = await asyncio.gather(*clients)
    assert answers == [f"answered {i}" for i in range(calls)]
    marks = Counter(one.headers["x-mark"] for one in engine.received)
    assert set(marks.values()) == {1}, "and none of them twice"
    assert len(marks) == calls


async def _patient(url: str, i: int) -> str:
    await asyncio.sleep(i * 0.01)
    body = {**BODY, "max_tokens": 20}
    async with aiohttp.ClientSession() as client:
        while True:
            try:
                async with client.post(url + CHAT, json=body, headers={"x-mark": str(i)}) as answer:
                    content = await answer.json()
                    if answer.status == 200:
                        assert "t19" in content["choices"][0]["message"]["content"]
                        return f"answered {i}"
                    assert content["error"]["code"] in (
                        "rejected-shutting-down", "rejected-no-endpoints",
                    )  # fmt: skip
            # A connection that the kernel took and nobody read. Had the router accepted the
            # call all the same, the engine would now see its mark twice.
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                pass
            await asyncio.sleep(0.05)
