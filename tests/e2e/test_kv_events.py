"""A real engine tells of its KV blocks, and the router believes it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.prefix_index import PrefixIndex
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.calls.prompt import Prompt, chain
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.types import Call
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine(
    forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Return the URL of an engine, and what the router is told of its events."""
    port, events, again = free_port(), free_port(), free_port()
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",  # vLLM does not listen on one address only
        "replay_endpoint": f"tcp://127.0.0.1:{again}",
    }
    argv = [tiny_model, *small_engine(port), f"--kv-events-config={json.dumps(config)}"]
    log = tmp_path_factory.mktemp("engine") / "log"
    program = forks.start("hexgen_vllm.serve", argv, log, {"VLLM_SERVER_DEV_MODE": "1"})
    Server(program, port).wait_healthy()
    yield f"http://127.0.0.1:{port}", f"?kv_events={events}&kv_replay={again}"
    program.stop()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Router]:
    options = RouterOptions(worker_urls=(f"e={url}",), port=0, health_check_interval_secs=0.2)
    async with Router(options, DispatchOptions()) as router:
        await until(router.context.fleet.ready)
        await until(lambda: router.context.kv_events.feeds)
        yield router


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.02)


async def ask(client: aiohttp.ClientSession, url: str, prompt: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    async with client.post(url + "/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


def prompt(i: int) -> str:
    return f"{i}: " + f"SELECT name, year FROM table_{i} WHERE id = {i} AND " * 45


def held(router: Router, text: str) -> int:
    """Return how many tokens of a prompt the router believes to be cached."""
    prefix = chain(Prompt(text, len(text), 0), "tiny")
    call = Call("c", "w", 0.0, 10**6, prefix=prefix, prefix_chunk_tokens=1)
    index: PrefixIndex = router.context.service.coordinator.engines["e"].prefixes
    return index.match(call)


async def test_what_an_engine_evicts_and_clears_is_believed_no_more(
    engine: tuple[str, str], tmp_path: Path
) -> None:
    url, events = engine
    async with opened(url + events) as router, aiohttp.ClientSession() as client:
        book, known = router.context.ledger.kv_events, router.context.kv_events.prompts
        for i in itertools.count():  # past the router, as others do, until it listens
            await ask(client, url, f"{i}: first of all, " * 30)
            if known.usable:
                break
            await asyncio.sleep(0.1)
        for i in range(2):
            await ask(client, router.url, prompt(i))
        for i in range(2):
            key = chain(Prompt(prompt(i), len(prompt(i)), 0), "tiny")[-1]
            await until(lambda key=key: known.knows(key))  # type: ignore[misc]
            assert held(router, prompt(i)) == len(prompt(i)) // 1024 == 2
        used = 2
        while held(router, prompt(0)):  # the engine's cache is small
            await ask(client, url, prompt(used))
            used += 1
            await asyncio.sleep(0.05)
            assert used < 60
        assert used > 6  # not before it was full
        async with client.post(url + "/reset_prefix_cache") as answer:
            assert answer.status == 200
        await ask(client, router.url, prompt(0))
        await until(lambda: held(router, prompt(1)) == 0)
        assert held(router, prompt(0)) == 2
        assert book["bad"] == book["lost"] == 0

    # A router that starts later has all of it sent again.
    async with opened(url + events) as router, aiohttp.ClientSession() as client:
        feed = router.context.kv_events.feeds["e"]
        for i in itertools.count(99):  # what was told before it listened is known by the next
            await ask(client, url, prompt(i))
            if router.context.ledger.kv_events["replayed"] > 3:
                break
            await asyncio.sleep(0.1)
        assert router.context.ledger.kv_events["lost"] == 0
        assert len(feed.blocks) > 10
