"""Two router processes on one port: each workflow in one place, one picture, one end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hexgen_vllm.router.processes.router_process import RouterProcess
from hexgen_vllm.router.processes.shard import merged_exposition
from hexgen_vllm.testing import fake_answers
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import CHAT

pytestmark = pytest.mark.e2e
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}


@dataclass
class Processes:
    """A router of several processes; each request comes over a connection of its own."""

    url: str
    parent: asyncio.subprocess.Process
    client: aiohttp.ClientSession

    def post(self, workflow: str | None = None, path: str = CHAT, **more: Any) -> Any:
        headers = {} if workflow is None else {"x-hexgen-workflow-id": workflow}
        return self.client.post(self.url + path, json={**BODY, **more}, headers=headers)

    async def get(self, path: str) -> str:
        async with self.client.get(self.url + path) as answer:
            return await answer.text()

    async def metric(self, name: str) -> float:
        found = re.findall(
            rf"^hexgen_router_{name}(?:{{.*}})? (\S+)$", await self.get("/metrics"), re.M
        )
        return sum(map(float, found))

    async def until(self, name: str, value: float) -> None:
        while await self.metric(name) != value:
            await asyncio.sleep(0.05)

    def children(self) -> list[int]:
        of = Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children").read_text().split()
        lines = {int(p): Path(f"/proc/{p}/cmdline").read_text() for p in of}
        return [pid for pid, line in lines.items() if "spawn_main" in line]

    async def ready(self) -> None:
        """Wait until both processes send calls to every engine."""
        while True:
            try:
                if await self.metric("engine_up") and len(await self.places()) == 2:
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)

    async def places(self) -> set[str]:
        """Return in which processes single readiness checks end up well."""
        found = set()
        for _ in range(8):
            async with self.client.get(self.url + "/scheduling/diagnostics") as answer:
                body = await answer.json()
                if all(one["state"] == "ready" for one in body["engines"]):
                    found.add(answer.headers["x-hexgen-process"])
        return found


@asynccontextmanager
async def started(*urls: str, **flags: object) -> AsyncIterator[Processes]:
    options = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hexgen_vllm.router", "--port", "0", "--router-workers", "2",
        *options, "--worker-urls", *urls, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = (await process.stderr.readline()).decode()
        found = re.search(r"listening url=(\S+)", line)
        assert found, line
        connector = aiohttp.TCPConnector(force_close=True)
        key = flags.get("admin_api_key") or flags.get("api_key")
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as client:
            one = Processes(found[1], process, client)
            await one.ready()
            yield one
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await process.stderr.read()  # ends when the last process has


async def test_a_workflow_is_in_one_place_wherever_its_calls_come_in() -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        for i in range(6):
            for _ in range(4):
                async with router.post(f"w{i}", max_tokens=3) as answer:
                    assert answer.status == 200
                    assert (await answer.json())["usage"]["completion_tokens"] == 3
                    process = answer.headers["x-hexgen-process"]
                    assert process == str(RouterProcess(0, 2, "").owner(f"w{i}"))
        assert await router.metric("open_workflows") == 6
        assert await router.metric("calls_received_total") == 24
        assert len({RouterProcess(0, 2, "").owner(f"w{i}") for i in range(6)}) == 2, (
            "both have some"
        )
        for i in range(6):
            async with router.client.post(f"{router.url}/finish_session?session_id=w{i}") as done:
                assert (await done.json())["finished"]
        assert await router.metric("open_workflows") == 0


async def test_a_workflow_is_its_tenants_in_whatever_process(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{key: sk-a, tenant: a}, {key: sk-b, tenant: b}]\n")

    async def finish(key: str) -> set[bool]:
        """Ask four times, each time over a connection to some process."""
        url = f"{router.url}/finish_session?session_id=w0"
        said = {"Authorization": f"Bearer {key}"}
        found = set()
        for _ in range(4):
            async with router.client.post(url, headers=said) as answer:
                found.add((await answer.json())["finished"])
        return found

    async with (
        FakeServer() as engine,
        started(engine.url, api_keys=path, admin_api_key="adm") as router,
    ):
        for _ in range(4):
            said = {"Authorization": "Bearer sk-a", "x-hexgen-workflow-id": "w0"}
            async with router.client.post(router.url + CHAT, json=BODY, headers=said) as answer:
                assert answer.status == 200
        assert await router.metric("open_workflows") == 1
        assert await finish("sk-b") == {False}
        assert await router.metric("open_workflows") == 1
        assert await finish("sk-a") == {True, False}
        assert await router.metric("open_workflows") == 0
        assert 'tenant="a"' in await router.get("/metrics")
        headers = {"Authorization": ""}
        async with router.client.get(f"{router.url}/metrics", headers=headers) as answer:
            assert 'tenant="a"' not in await answer.text()


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_response_is_found_from_whatever_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keyed: bool
) -> None:
    """Engines do not tell of responses here: only who saw the answer knows."""
    numbers, whole = iter(range(1000)), fake_answers.body

    def named_body(work: fake_answers.AskedAnswer) -> bytes:
        return json.dumps({**json.loads(whole(work)), "id": f"resp_{next(numbers)}"}).encode()

    monkeypatch.setattr(fake_answers, "body", named_body)
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{key: sk-a, tenant: a}, {key: sk-b, tenant: b}]\n")
    flags = {"api_keys": path, "admin_api_key": "adm"} if keyed else {}

    async def ask(key: str, **more: Any) -> tuple[int, str, str, str]:
        """Return status, id of the response, engine and process."""
        said = {"Authorization": f"Bearer {key}"}
        body = {"model": "tiny", "input": "x", "max_output_tokens": 1, **more}
        url = f"{router.url}/v1/responses"
        async with router.client.post(url, json=body, headers=said) as answer:
            found = await answer.json()
            engine = answer.headers.get("x-hexgen-engine", "")
            return answer.status, found.get("id", ""), engine, answer.headers["x-hexgen-process"]

    async with (
        FakeServer() as one,
        FakeServer() as other,
        started(one.url, other.url, policy="round_robin", **flags) as router,
    ):
        first = [await ask("sk-a") for _ in range(6)]
        assert len({engine for _, _, engine, _ in first}) == 2
        for _, response, home, _ in first:
            seen = set()
            while len(seen) < 2:  # each process gets some of the connections
                status, _, engine, process = await ask("sk-a", previous_response_id=response)
                assert (status, engine) == (200, home)
                seen.add(process)
            if keyed:
                refused = await ask("sk-b", previous_response_id=response)
                assert refused[0] == 404


async def test_streams_pass_from_process_to_process_unchanged() -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        async with router.client.post(
            engine.url + CHAT, json={**BODY, "max_tokens": 50, "stream": True}
        ) as direct:
            expected = await direct.read()
        for i in range(8):
            async with router.post(f"w{i % 4}", max_tokens=50, stream=True) as answer:
                assert await answer.read() == expected
                assert answer.headers["Content-Type"] == direct.headers["Content-Type"]
        async with router.post("w0", model="unknown") as refused:
            assert refused.status == 404
            assert (await refused.json())["error"]["code"] == "model_not_found"


async def test_each_process_knows_what_the_others_have_placed() -> None:
    """One engine with one slot: a call that another process has placed there is waited for."""
    settings = FakeSettings(slots=1, step_s=0.01, policy="fcfs")
    async with FakeServer(settings) as engine, started(engine.url, hold_depth=0) as router:
        owners = {RouterProcess(0, 2, "").owner(f"w{i}"): f"w{i}" for i in range(16)}
        async with router.post(owners[0], max_tokens=200, stream=True) as running:
            await running.content.readline()
            await asyncio.sleep(0.6)  # the processes ask each other more often than that
            waiting = asyncio.ensure_future(router.post(owners[1], max_tokens=1).__aenter__())
            await router.until("held_calls", 1)
            assert engine.waiting == 0
            await running.read()
            assert (await waiting).status == 200


async def test_a_process_that_dies_is_started_again() -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        before = router.children()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        while set(router.children()) & set(before[:1]) or len(router.children()) < 2:
            await asyncio.sleep(0.05)
        await router.ready()
        for i in range(6):
            async with router.post(f"w{i}", max_tokens=1) as answer:
                assert answer.status == 200


async def test_without_their_parent_the_processes_end() -> None:
    async with FakeServer() as engine, started(engine.url) as router:
        children = router.children()
        router.parent.kill()
        while any(_runs(pid) for pid in children):
            await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_finishes_what_every_process_has_accepted(number: signal.Signals) -> None:
    async with FakeServer(FakeSettings(step_s=0.01)) as engine, started(engine.url) as router:
        streams = [
            await router.post(f"w{i}", max_tokens=60, stream=True).__aenter__() for i in range(6)
        ]
        for stream in streams:
            await stream.content.readline()
        if number is signal.SIGINT:  # Ctrl-C at a terminal is for all of them
            for pid in router.children():
                os.kill(pid, number)
        router.parent.send_signal(number)
        for stream in streams:
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert await router.parent.wait() == 0
        assert engine.aborted == 0


async def test_changes_to_the_engines_reach_every_process() -> None:
    async with (
        FakeServer() as engine,
        FakeServer() as second,
        started(engine.url, admin_api_key="adm") as router,
    ):
        body = {"url": second.url, "name": "second"}
        key = {"Authorization": "Bearer adm"}
        async with router.client.post(router.url + "/workers", json=body, headers=key) as answer:
            assert answer.status == 201, await answer.text()
        seen = set()
        while len(seen) < 2:
            async with router.client.get(router.url + "/workers") as listed:
                names = [one["name"] for one in (await listed.json())["workers"]]
                if "second" in names:
                    seen.add(listed.headers["x-hexgen-process"])


def test_metrics_of_processes_add_up() -> None:
    one = (
        "# HELP a_total Calls\n# TYPE a_total counter\n"
        'a_total{x="1"} 2.0\n# HELP up Up\n# TYPE up gauge\nup 1.0\n'
        "# HELP r_open_calls Open\n# TYPE r_open_calls gauge\nr_open_calls 3.0\n"
    )
    two = 'a_total{x="1"} 5.0\na_total{x="2"} 1.0\nup 1.0\nr_open_calls 4.0\n'
    assert merged_exposition([one, two]).splitlines() == [
        "# HELP a_total Calls", "# TYPE a_total counter", 'a_total{x="1"} 7.0',
        'a_total{x="2"} 1.0', "# HELP up Up", "# TYPE up gauge", "up 1.0",
        "# HELP r_open_calls Open", "# TYPE r_open_calls gauge", "r_open_calls 7.0",
    ]  # fmt: skip
