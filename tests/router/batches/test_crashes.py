"""A batch beside other calls while engine and router are killed: each request has one answer."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hexgen_vllm.ports import free_ports
from hexgen_vllm.testing.stand import CHAT
from tests.router.batches.test_batches import jsonl, line

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
Program = asyncio.subprocess.Process


async def start(*words: object) -> Program:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *map(str, words), stdout=asyncio.subprocess.DEVNULL
    )


class Service:
    """One engine and one router, which can be killed and come back on their ports."""

    def __init__(self, folder: Path, *router: object) -> None:
        self.engine_port, self.port = free_ports("127.0.0.1", 2)
        self.url = f"http://127.0.0.1:{self.port}"
        engine = ("hexgen_vllm.testing.fake_server", "--port", self.engine_port, "--step-s", 0.02)
        found = f"http://127.0.0.1:{self.engine_port}"
        self._programs: dict[str, tuple[object, ...]] = {
            "engine": engine,
            "router": ("hexgen_vllm.router", "--port", self.port, "--worker-urls", found,
                       "--batch-dir", folder, "--health-check-interval-secs", 0.2,
                       "--log-level", "error", *router),
        }  # fmt: skip
        self._running: dict[str, Program] = {}

    async def start(self, name: str) -> None:
        self._running[name] = await start(*self._programs[name])

    async def kill(self, *names: str, by: signal.Signals = signal.SIGKILL) -> None:
        for name in names:
            self._running[name].send_signal(by)
        for name in names:
            code = await self._running[name].wait()
            assert code == (0 if by == signal.SIGTERM else -by)
            await self.start(name)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    async def stop(self) -> None:
        for program in self._running.values():
            if program.returncode is None:
                program.kill()
                await program.wait()


@asynccontextmanager
async def running(folder: Path, *router: object) -> AsyncIterator[Service]:
    service = Service(folder, *router)
    try:
        await service.start("engine")
        await service.start("router")
        yield service
    finally:
        await service.stop()


async def interactive(service: Service, seen: Counter[int]) -> None:
    """Call again and again, as people do who see an error and try once more."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    headers = {"x-hexgen-workflow-id": "w", "x-hexgen-workflow-deadline-ms": "5000"}
    async with aiohttp.ClientSession() as client:
        while True:
            try:
                async with client.post(service.url + CHAT, json=body, headers=headers) as answer:
                    await answer.read()
                    seen[answer.status] += 1
            except aiohttp.ClientError:
                seen[0] += 1
            await asyncio.sleep(0.02)


async def answered(service: Service) -> int:
    """Return how many requests of all batches have been answered."""
    while True:
        try:
            async with (
                aiohttp.ClientSession() as client,
                client.get(service.url + "/v1/batches") as answer,
            ):
                found: list[dict[str, Any]] = (await answer.json())["data"]
                return sum(one["request_counts"]["completed"] for one in found)
        except aiohttp.ClientError:
            await asyncio.sleep(0.05)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    while not await true():
        await asyncio.sleep(0.05)


async def test_500_requests_are_answered_once_each_though_engine_and_router_are_killed(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"r{i}", max_tokens=6, ignore_eos=True) for i in range(500)]
    source.write_bytes(jsonl(*lines))
    seen: Counter[int] = Counter()
    async with running(tmp_path / "batches", "--batch-concurrency", 16) as service:
        await answered(service)
        load = asyncio.create_task(interactive(service, seen))
        words = ("hexgen_vllm", "batch", "run", source, "--out", out, "--base-url", service.url)
        command = await start(*words)
        killed = (60, ("router",)), (140, ("engine",)), (220, ("router", "engine")), (300, ())
        for count, names in killed:

            async def there(count: int = count) -> bool:
                return await answered(service) >= count

            await until(there)
            assert await answered(service) < 500, "killed while it runs"
            if names:
                await service.kill(*names)
            else:  # in order: what is in flight is not waited for, nor lost
                await service.kill("router", by=signal.SIGTERM)
        command.send_signal(signal.SIGKILL)  # and the one who waits
        await command.wait()
        command = await start(*words)
        assert await command.wait() == 0
        load.cancel()
        async with (
            aiohttp.ClientSession() as client,
            client.get(service.url + "/v1/batches") as answer,
        ):
            (batch,) = (await answer.json())["data"]
        assert batch["request_counts"] == {"total": 500, "completed": 500, "failed": 0}
    found = [json.loads(one) for one in out.read_text().splitlines()]
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in lines]
    assert {one["response"]["status_code"] for one in found} == {200}
    assert {one["response"]["body"]["usage"]["completion_tokens"] for one in found} == {6}
    assert seen[200] > 50
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == [
        "out.jsonl"
    ]


async def test_of_several_processes_one_runs_the_batches_and_another_takes_over(
    tmp_path: Path,
) -> None:
    """All of them answer questions; whichever has the lock is killed."""
    lines = [line(f"r{i}", max_tokens=6, ignore_eos=True) for i in range(120)]
    options = ("--router-workers", 2, "--batch-concurrency", 8)
    async with running(tmp_path / "batches", *options) as service:
        await answered(service)
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(jsonl(*lines))
        words = ("hexgen_vllm", "batch", "run", source, "--out", out, "--base-url", service.url)
        command = await start(*words)

        async def begun() -> bool:
            return await answered(service) >= 20

        await until(begun)
        parent = service.pid("router")
        (leader,) = holders(tmp_path / "batches" / "leader.lock", children(parent))
        await (await asyncio.create_subprocess_exec("kill", "-9", str(leader))).wait()
        assert await command.wait() == 0
        found = holders(tmp_path / "batches" / "leader.lock", children(parent))
        assert found
        assert leader not in found
    names = [json.loads(one)["custom_id"] for one in out.read_text().splitlines()]
    assert names == [one["custom_id"] for one in lines]


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def holders(path: Path, pids: list[int]) -> list[int]:
    """Return which processes keep a file open, as only the holder of the lock does."""
    found = []
    for pid in pids:
        names = {one.resolve() for one in Path(f"/proc/{pid}/fd").iterdir()}
        if path.resolve() in names:
            found.append(pid)
    return found


async def test_a_request_that_a_dead_engine_had_is_sent_to_the_next_one(tmp_path: Path) -> None:
    """Refusals last until the window ends, whatever their number."""
    async with running(tmp_path / "batches") as service, aiohttp.ClientSession() as client:
        await answered(service)
        await service.kill("engine")
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", jsonl(line("a")), filename="in.jsonl")
        async with client.post(service.url + "/v1/files", data=form) as answer:
            file = (await answer.json())["id"]
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        async with client.post(service.url + "/v1/batches", json=body) as answer:
            assert answer.status == 200

        async def done() -> bool:
            return await answered(service) == 1

        await until(done)
