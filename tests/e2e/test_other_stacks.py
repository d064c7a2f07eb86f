"""Our scheduler behind another router, and our router before other schedulers, with real engines.

Each stack is asked by ``examples.other_stacks.order``: are calls that wait served by deadline?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.other_stacks import order
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import (
    LONG_CALLS,
    LONG_TOKENS,
    Program,
    Server,
    Spawned,
    free_port,
    small_engine,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

# Only with the second one does a stock engine say how many calls it runs at once.
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_SERVER_DEV_MODE": "1"}
STOCK = "vllm.entrypoints.cli.main"
OURS_ROUTER = "hexgen_vllm.router"
VLLM_ROUTER = "vllm_router.launch_router"

# Not for our engine behind vllm-router, which may go on with a stream whose client has left: there
# the next try would have to wait for it.
LONG = f"--long-tokens={LONG_TOKENS}"

Start = Callable[[Program, int], Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Wait until a program is a server that lists its models, and stop it in the end."""
    with ExitStack() as stack:

        def started(program: Program, port: int) -> Server:
            stack.callback(program.stop)
            server = Server(program, port)
            wait_until(lambda: server.is_healthy() and lists_models(server), program)
            return server

        yield started


def lists_models(server: Server) -> bool:
    """Return whether the server knows a model."""
    answer = server.get("/v1/models")
    return answer.status == 200 and bool(answer.json["data"])


class Stack:
    """Starts the parts of a stack."""

    def __init__(self, forks: ForkServer, model: str, folder: Path, start: Start) -> None:
        self._forks, self._model, self._folder, self._start = forks, model, folder, start

    def engine(self, module: str, *words: str) -> Server:
        """Start an engine of eight sequence slots."""
        port = free_port()
        argv = [*words[:1], self._model, *words[1:]] if words else [self._model]
        program = self._forks.start(
            module, [*argv, *small_engine(port), *LONG_CALLS], self._folder / "engine", ENV
        )
        return self._start(program, port)

    def router(self, module: str, engine: Server, *words: str) -> Server:
        """Start a router before ``engine``."""
        port = free_port()
        argv = [f"--port={port}", "--host=127.0.0.1", *words, "--worker-urls", engine.url]
        return self._start(Spawned(module, argv, self._folder / "router"), port)


@pytest.fixture
def stack(forks: ForkServer, tiny_model: str, tmp_path: Path, start: Start) -> Stack:
    return Stack(forks, tiny_model, tmp_path, start)


def in_order(server: Server, *words: str) -> bool:
    """Return whether calls that have to wait are answered in the order of their deadlines."""
    code = order.main([f"{server.url}/v1", "tiny", *words])
    assert code in (0, 1), "they never had to wait"
    return code == 0


def test_our_scheduler_behind_vllm_router(stack: Stack) -> None:
    engine = stack.engine("hexgen_vllm.serve")
    router = stack.router(VLLM_ROUTER, engine, "--policy=round_robin")
    for say in order.WAYS:
        assert in_order(router, f"--say={say}"), say
    assert engine.get("/hexgen/stats").json["bad_metadata"] == 0


def test_our_router_before_a_stock_engine_that_schedules_by_priority(stack: Stack) -> None:
    """Calls are bound at once: the engine orders them, by the priorities that it is sent."""
    engine = stack.engine(STOCK, "serve", "--scheduling-policy=priority")
    router = stack.router(OURS_ROUTER, engine, "--policy=slack", "--hold-depth=-1")
    assert router.get("/workers").json["workers"][0]["kind"] == "priority"
    assert in_order(router, LONG)


def test_our_router_before_a_stock_engine_that_serves_whoever_comes_first(stack: Stack) -> None:
    """Calls wait in the router, and none in the engine."""
    engine = stack.engine(STOCK, "serve")
    router = stack.router(OURS_ROUTER, engine, "--policy=slack", "--hold-depth=0")
    (worker,) = router.get("/workers").json["workers"]
    assert (worker["kind"], worker["max_num_seqs"]) == ("fcfs", 8)
    assert in_order(router, LONG)
    # The same engine, and a router that keeps no call back: else all this shows nothing.
    assert not in_order(stack.router(OURS_ROUTER, engine, "--policy=least_outstanding"), LONG)
    assert not in_order(stack.router(VLLM_ROUTER, engine, "--policy=round_robin"), LONG)
