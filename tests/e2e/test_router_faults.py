"""Real engines are killed, stopped and restarted behind a real router, under load.

Whatever happens, every call ends in a way its client can tell, and the router's book balances:
calls that came in are calls that were answered and calls that failed, each with its reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.fault_proxy import Fault, FaultProxy
from tests.e2e.forkserver import Forked, ForkServer
from tests.e2e.programs import START_S, Server, Spawned, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
QUICK = [
    "--policy=least_outstanding", "--health-check-interval-secs=0.5",
    "--health-check-timeout-secs=1", "--engine-stall-secs=1", "--lost-stream-timeout-secs=3",
    "--cb-timeout-duration-secs=1", "--log-level=warning",
]  # fmt: skip


class Engine:
    """A real engine that can be killed and started again at the same place."""

    def __init__(self, forks: ForkServer, model: str, folder: Path) -> None:
        self._forks, self._model, self._folder = forks, model, folder
        self.port, self._starts = free_port(), 0
        self.program = self._start()

    def _start(self) -> Forked:
        self._starts += 1
        log = self._folder / f"engine-{self.port}-{self._starts}"
        argv = [self._model, *small_engine(self.port)]
        return self._forks.start("hexgen_vllm.serve", argv, log, SMALL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.program.pid, number)

    def kill(self) -> None:
        """End it without a word."""
        self.signal(signal.SIGKILL)
        self.program.wait()

    def start(self) -> None:
        """Start it again, where it was."""
        self.program = self._start()

    def wait(self) -> None:
        """Return when it is up."""
        Server(self.program, self.port).wait_healthy()


class Site:
    """A router in front of two engines, and a client that keeps book of what it sees."""

    def __init__(
        self, router: Server, engines: list[Engine], client: aiohttp.ClientSession
    ) -> None:
        self.router, self.engines, self.client = router, engines, client
        self.seen: Counter[str] = Counter()

    async def call(self, tokens: int = 40, stream: bool = True) -> str:
        """Make a call and return what became of it."""
        body = {"model": "tiny", "prompt": "SELECT", "max_tokens": tokens, "ignore_eos": True,
                "stream": stream}  # fmt: skip
        async with self.client.post(self.router.url + "/v1/completions", json=body) as answer:
            raw = await answer.read()
        assert b"127.0.0.1" not in raw
        found = _outcome(answer.status, raw, stream, tokens)
        self.seen[found] += 1
        return found

    async def load(self, calls: int, tokens: int = 40) -> list[str]:
        """Make calls at once, half of them streams."""
        return await asyncio.gather(*(self.call(tokens, i % 4 < 2) for i in range(calls)))

    async def states(self) -> dict[str, str]:
        """Return the state of each engine."""
        return {one["name"]: one["state"] for one in await self._workers()}

    async def _workers(self) -> list[dict[str, Any]]:
        async with self.client.get(self.router.url + "/workers") as answer:
            return list((await answer.json())["workers"])

    async def busy(self, i: int) -> None:
        """Wait until engine ``i`` has calls, and has had time to begin its answers."""
        while not (await self._workers())[i]["load"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)

    async def until(self, i: int, *states: str) -> float:
        """Wait until engine ``i`` is in one of ``states``; return the seconds that took."""
        began = time.monotonic()
        while (await self.states())[f"engine-{i}"] not in states:
            assert time.monotonic() < began + START_S, self.router.program.text()[-3000:]
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def back(self, i: int) -> None:
        """Call until engine ``i`` has passed its trial."""
        while (await self.states())[f"engine-{i}"] != "ready":
            await self.load(2, tokens=2)

    async def assert_book_balances(self) -> None:
        """Compare the router's book with itself and with what the client saw."""
        book = await self.book()
        assert book["open"] == 0
        assert book["received"] == book["answered"] + book["failed"] == self.seen.total()
        assert book["answered"] == self.seen["answered"]

    async def book(self) -> dict[str, float]:
        """Return the router's counts of calls."""
        async with self.client.get(self.router.url + "/metrics") as answer:
            text = await answer.text()
        found = dict.fromkeys(("received", "answered", "failed", "open"), 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "hexgen_router_calls_received_total":
                    found["received"] += sample.value
                elif sample.name == "hexgen_router_calls_total":
                    ok = sample.labels["outcome"] == "answered"
                    found["answered" if ok else "failed"] += sample.value
                elif sample.name == "hexgen_router_open_calls":
                    found["open"] = sample.value
        return found


def _outcome(status: int, raw: bytes, stream: bool, tokens: int) -> str:
    if status != 200:
        error = json.loads(raw)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return f"{status} {error['code']}"
    if not stream:
        assert json.loads(raw)["usage"]["completion_tokens"] == tokens
        return "answered"
    assert raw.endswith(b"\n\n"), "no event is cut in two"
    last = raw.split(b"\n\n")[-2].removeprefix(b"data: ")
    if last == b"[DONE]":
        return "answered"
    return f"event {json.loads(last)['error']['code']}"


@pytest.fixture(scope="module")
def engines(
    forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Engine]]:
    folder = tmp_path_factory.mktemp("engines")
    started = [Engine(forks, tiny_model, folder) for _ in range(2)]
    for engine in started:
        engine.wait()
    yield started
    for engine in started:
        if engine.program.poll() is None:
            engine.signal(signal.SIGCONT)
            engine.program.stop()


@asynccontextmanager
async def opened(
    engines: list[Engine], folder: Path, *more: str, proxy: FaultProxy | None = None
) -> AsyncIterator[Site]:
    """Start a router; with ``proxy`` that is where it finds the first engine."""
    port = free_port()
    urls = [f"http://127.0.0.1:{engine.port}" for engine in engines]
    if proxy is not None:
        urls[0] = proxy.url
    argv = [*QUICK, *more, f"--port={port}", "--worker-urls", *urls]
    router = Server(Spawned("hexgen_vllm.router", argv, folder / f"router-{port}"), port)
    try:
        router.wait_healthy()
        async with aiohttp.ClientSession() as client:
            site = Site(router, engines, client)
            for i in range(2):
                await site.until(i, "ready")
            yield site
    finally:
        if router.program.poll() is None:
            assert router.program.stop() == 0
        assert "Traceback" not in router.program.text()


@pytest.fixture
async def site(engines: list[Engine], tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(engines, tmp_path) as one:
        assert set(await one.load(4)) == {"answered"}
        yield one


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n  {text}", end="")


async def test_kill_9_under_load(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """What had begun there ends with an error; all else is answered; the engine comes back."""
    running = asyncio.ensure_future(site.load(12, tokens=400))
    await site.busy(0)
    killed = time.monotonic()
    site.engines[0].kill()
    after = await site.load(6)
    assert set(after) == {"answered"}
    took_s = time.monotonic() - killed
    assert (await site.states())["engine-0"] == "down"
    outcomes = Counter(await running)
    assert set(outcomes) <= {"answered", "event engine-lost", "502 engine-lost"}
    assert outcomes["answered"] >= 6
    await site.assert_book_balances()
    tell(capsys, f"kill -9: {dict(outcomes)}; 6 calls after it answered within {took_s:.2f} s")
    site.engines[0].start()
    back_s = await site.until(0, "trial", "ready")
    await site.back(0)
    await site.assert_book_balances()
    tell(capsys, f"restart: gets calls again {back_s:.1f} s after its start")


async def test_a_stopped_engine_is_left_out_and_comes_back(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP leaves connections open and accepts new ones: only silence tells."""
    running = asyncio.ensure_future(site.load(8, tokens=400))
    await site.busy(0)
    began = time.monotonic()
    site.engines[0].signal(signal.SIGSTOP)
    try:
        down_s = await site.until(0, "down")
        assert set(await site.load(6)) == {"answered"}
        outcomes = Counter(await running)
        took_s = time.monotonic() - began
    finally:
        site.engines[0].signal(signal.SIGCONT)
    assert set(outcomes) <= {"answered", "event engine-timeout", "502 engine-lost"}
    assert outcomes["answered"] >= 4
    await site.until(0, "trial", "ready")
    await site.back(0)
    assert set(await site.load(4)) == {"answered"}
    await site.assert_book_balances()
    tell(capsys, f"SIGSTOP: left out after {down_s:.1f} s; {dict(outcomes)} after {took_s:.1f} s")


async def test_every_way_to_break_a_real_answer(
    engines: list[Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first byte calls go to the other engine; after it their clients are told."""
    kinds = ("reset", "close", "half", "garbage", "hang")
    told, found = {"engine-lost", "engine-timeout"}, []
    async with (
        FaultProxy(engines[0].port) as proxy,
        opened(engines, tmp_path, proxy=proxy) as site,
    ):
        for kind, after, stream in (*((k, 0, True) for k in kinds), ("drip", 0, True),
                                    *((k, 800, True) for k in kinds),
                                    *((k, 250, False) for k in kinds)):  # fmt: skip
            proxy.faults.append(Fault(kind, after))  # type: ignore[arg-type]
            # A slow machine merges tokens into few events: 40 of them can be 800 bytes.
            tokens = 200 if after == 800 else 40
            calls = (site.call(tokens, stream) for _ in range(2))  # one for each engine
            outcomes = sorted(await asyncio.gather(*calls))
            assert not proxy.faults
            found.append(f"{kind} after {after} bytes {outcomes}")
            assert outcomes[0] in ("answered", "502 engine-lost")
            broken = {one.split()[1] for one in outcomes if one != "answered"}
            assert len(broken) == (1 if after else 0), found
            assert broken <= told
            await site.back(0)
        await site.assert_book_balances()
    tell(capsys, f"real answers broken: {'; '.join(found)}")


async def said(client: aiohttp.ClientSession, url: str, i: int) -> dict[str, Any]:
    """Return what a client makes of a long greedy stream; ``i`` chooses the endpoint and prompt."""
    chat, prompt = i % 2 == 1, f"SELECT name FROM t{i} WHERE ü = '漢字' AND"
    body: dict[str, Any] = {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 120,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    async with client.post(url + path, json=body) as answer:
        events = (await answer.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events[-2:]
    found: dict[str, Any] = {"text": "", "roles": 0, "names": set(), "reasons": []}
    for chunk in (json.loads(event.removeprefix("data: ")) for event in events[:-2]):
        found["names"].add((chunk["id"], chunk["created"], chunk["object"]))
        found["usage"] = chunk.get("usage")
        for choice in chunk["choices"]:
            assert not choice.get("token_ids")
            delta = choice["delta"] if chat else choice
            found["text"] += delta.get("content" if chat else "text") or ""
            found["roles"] += "role" in delta
            found["reasons"] += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    return {**found, "names": len(found["names"])}


async def test_streams_go_on_at_another_engine(
    engines: list[Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken at any byte, and by kill -9: the answers are those of an engine that lives."""
    undisturbed = f"http://127.0.0.1:{engines[1].port}"
    rng = random.Random(3)
    async with (
        FaultProxy(engines[0].port) as proxy,
        opened(engines, tmp_path, "--migration-limit=3", proxy=proxy) as site,
    ):
        expected = [await said(site.client, undisturbed, i) for i in range(8)]
        assert all(one["usage"]["completion_tokens"] == 120 for one in expected)
        for i in range(6):
            kind = rng.choice(("reset", "close", "half", "garbage"))
            proxy.faults.append(Fault(kind, rng.randrange(300, 12_000)))  # type: ignore[arg-type]
            both = (said(site.client, site.router.url, i) for _ in range(2))  # one for each engine
            assert await asyncio.gather(*both) == [expected[i]] * 2
            proxy.faults.clear()
            await site.back(0)
        running = asyncio.gather(*(said(site.client, site.router.url, i) for i in range(8)))
        await site.busy(0)
        engines[0].kill()
        assert await running == expected
        async with site.client.get(site.router.url + "/metrics") as answer:
            counts = [
                line.split("outcome=")[1]
                for line in (await answer.text()).splitlines()
                if line.startswith("hexgen_router_migrations_total") and not line.endswith(" 0.0")
            ]
        assert {count.split('"')[1] for count in counts} <= {"continued", "closed"}
        assert counts
    engines[0].start()
    engines[0].wait()
    tell(capsys, f"streams that went on: {' '.join(counts)}")


async def test_flapping(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that stops and goes on again and again: calls are slow at worst."""
    outcomes: Counter[str] = Counter()
    for _ in range(4):
        site.engines[1].signal(signal.SIGSTOP)
        first = asyncio.ensure_future(site.load(4))
        await asyncio.sleep(0.4)
        site.engines[1].signal(signal.SIGCONT)
        outcomes.update(await first)
    assert set(outcomes) <= {"answered", "event engine-timeout", "502 engine-lost"}
    assert outcomes["answered"] >= 12
    await site.until(1, "trial", "ready")
    await site.back(1)
    await site.assert_book_balances()
    tell(capsys, f"flapping: {dict(outcomes)}")


async def test_sigterm_of_the_router_under_load(
    engines: list[Engine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One engine is held, so that calls are under way until the late one has its answer."""
    patient = ("--health-check-timeout-secs=60", "--engine-stall-secs=60",
               "--lost-stream-timeout-secs=60", "--shutdown-timeout=60")  # fmt: skip
    async with opened(engines, tmp_path, *patient) as site:
        engines[0].signal(signal.SIGSTOP)
        try:
            running = asyncio.ensure_future(site.load(8, tokens=200))
            await site.busy(0)
            os.kill(site.router.program.pid, signal.SIGTERM)
            while await asyncio.to_thread(site.router.is_healthy):
                await asyncio.sleep(0.01)
            late = await site.call()
        finally:
            engines[0].signal(signal.SIGCONT)
        assert late == "503 rejected-shutting-down"
        outcomes = Counter(await running)
        assert outcomes == {"answered": 8}
        assert site.router.program.wait() == 0
        tell(capsys, f"SIGTERM: {dict(outcomes)}, later calls {late}, exit code 0")


async def test_all_engines_down_and_back(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.engines[0].signal(signal.SIGSTOP)  # so that it has calls when it dies
    running = asyncio.ensure_future(site.load(6, tokens=800))
    await site.busy(0)
    for engine in site.engines:
        engine.kill()
    outcomes = Counter(await running)
    ended = outcomes.pop("answered", 0)  # at the other, on a machine that was late to kill it
    assert set(outcomes) <= {"event engine-lost", "502 engine-lost", "503 rejected-no-endpoints"}
    assert ended < 6
    refused = Counter(await site.load(4))
    assert refused == {"503 rejected-no-endpoints": 4}
    assert not site.router.is_healthy()
    await site.assert_book_balances()
    for engine in site.engines:
        engine.start()
    for i in range(2):
        await site.until(i, "trial", "ready")
        await site.back(i)
    assert set(await site.load(4)) == {"answered"}
    await site.assert_book_balances()
    tell(capsys, f"all down: {dict(outcomes)}, then {dict(refused)}, then answered again\n")


def test_outcomes_are_told_apart() -> None:
    """The book would balance if everything were called answered."""
    event: Any = b'data: {"error": {"code": "x"}}\n\n'
    assert _outcome(200, b"data: {}\n\ndata: [DONE]\n\n", True, 1) == "answered"
    assert _outcome(200, b"data: {}\n\n" + event, True, 1) == "event x"
    with pytest.raises(AssertionError):
        _outcome(200, b'{"usage": {"completion_tokens": 1}}', False, 2)
