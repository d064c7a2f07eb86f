"""Prompts computed by one real engine, answers by another: the same text as from one engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.types import EngineReport, StepCost
from tests.e2e.forkserver import Forked, ForkServer
from tests.e2e.programs import Server, free_port, small_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

# As if measured: one quick at prompts, one at answers, one in between.
COSTS = {
    "p": StepCost(0.01, 0.0, 0.0, 0.0, 1e-5, 0.0),
    "d": StepCost(0.01, 1e-5, 0.0, 0.0, 1e-2, 0.0),
    "both": StepCost(0.02, 1e-3, 0.0, 0.0, 1e-3, 0.0),
}


class Fleet(NamedTuple):
    """Engines by name, and where each is."""

    programs: dict[str, Forked]
    urls: dict[str, str]


@pytest.fixture(scope="module")
def fleet(
    forks: ForkServer, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """A prefill and a decode engine that share a folder, and one beside them."""
    folder = tmp_path_factory.mktemp("engines")
    shares = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
    }
    programs, urls = {}, {}
    for name in COSTS:
        port = free_port()
        # The example connector stores a prompt as it is after its first step: that is to be all.
        usual = [word for word in small_engine(port) if "batched-tokens" not in word]
        argv = [tiny_model, *usual, "--max-num-batched-tokens=8192"]
        if name != "both":
            argv.append(f"--kv-transfer-config={json.dumps(shares)}")
        log = folder / name
        program = forks.start("hexgen_vllm.serve", argv, log, {"VLLM_LOGGING_LEVEL": "INFO"})
        programs[name], urls[name] = program, f"http://127.0.0.1:{port}"
    for name, program in programs.items():
        Server(program, urls[name]).wait_healthy()
    yield Fleet(programs, urls)
    for program in programs.values():
        program.stop()


@asynccontextmanager
async def opened(fleet: Fleet) -> AsyncIterator[Router]:
    """Open a router that takes the engines for what :data:`COSTS` says, from now on."""
    said = {"p": "?role=prefill", "d": "?role=decode", "both": ""}
    urls = tuple(f"{name}={fleet.urls[name]}{said[name]}" for name in COSTS)
    # Nothing is read of the engines after the first time.
    options = RouterOptions(worker_urls=urls, port=0, stats_interval_secs=3600.0)
    async with Router(options, DispatchOptions()) as router:
        coordinator = router.context.service.coordinator
        loads = coordinator.engines
        await until(lambda: len(loads) == 3)
        await until(lambda: all(load.report.running is not None for load in loads.values()))
        for name, cost in COSTS.items():
            coordinator.engine_reported(name, EngineReport(cost=cost))
        yield router


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.02)


def prompt(i: int) -> list[int]:
    """Return token ids, as many as the example connector finds again: not a block and one more."""
    return random.Random(i).choices(range(10, 500), k=330 + i)


async def ask(client: aiohttp.ClientSession, url: str, i: int) -> tuple[str, str, Any]:
    """Return an answer, who gave it, and its token counts."""
    body = {"model": "tiny", "prompt": prompt(i), "max_tokens": 24, "temperature": 0,
            "ignore_eos": True, "min_tokens": 24}  # fmt: skip
    async with client.post(url + "/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        said = await answer.json()
        engine = answer.headers.get("x-hexgen-engine", "")
        return said["choices"][0]["text"], engine, said["usage"]


async def test_answers_are_those_of_one_engine_and_outlive_the_prefill_engine(
    fleet: Fleet,
) -> None:
    async with opened(fleet) as router, aiohttp.ClientSession() as client:
        expected = [(await ask(client, fleet.urls["both"], i))[0] for i in range(16)]
        assert len(set(expected)) == 16
        found = await asyncio.gather(*(ask(client, router.url, i) for i in range(8)))
        assert [text for text, _, _ in found] == expected[:8]
        assert {engine for _, engine, _ in found} <= {"d", "both"}
        counts = [usage for _, _, usage in found]
        assert [one["prompt_tokens"] for one in counts] == [330 + i for i in range(8)]
        assert all(one["completion_tokens"] == 24 for one in counts)
        prefills = router.context.ledger.prefills
        done = prefills["done"]
        assert done >= 4
        assert prefills["failed"] == prefills["declined"] == 0
        assert fleet.programs["d"].text().count("External Cache Hit!") >= done

        # It is held in the middle of prompts, and dies.
        prefiller = fleet.programs["p"]
        os.killpg(prefiller.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(ask(client, router.url, i)) for i in range(8, 16)]
        load = router.context.service.coordinator.engines["p"]
        await until(lambda: load.in_flight)
        os.killpg(prefiller.pid, signal.SIGKILL)
        found = await asyncio.gather(*tasks)
        assert [text for text, _, _ in found] == expected[8:]
        assert prefills["failed"] >= 1
        assert router.context.ledger.answered() == 16
        for one in router.context.service.coordinator.engines.values():
            assert not one.in_flight
        for name in ("d", "both"):
            assert "Traceback" not in fleet.programs[name].text()
