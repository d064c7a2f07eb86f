"""Real vLLM engines with two data-parallel ranks: the router places calls on each of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import ANSWER_S, Server, Spawned, free_port, small_engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

CALLS = 24
DONE = re.compile(
    r'^vllm:request_success_total\{engine="(\d)",finished_reason="length",.*\} (\d+)', re.M
)
WAYS = {"ours": ("hexgen_vllm.serve", []), "stock": ("vllm.entrypoints.cli.main", ["serve"])}


@pytest.fixture(params=list(WAYS))
def engine(
    request: pytest.FixtureRequest, forks: ForkServer, tiny_model: str, tmp_path: Path
) -> Iterator[Server]:
    """Yield a server with two ranks, ours or stock."""
    module, first = WAYS[request.param]
    port = free_port()
    ranks = ["--data-parallel-size=2", "--api-server-count=1"]
    program = forks.start(
        module, [*first, tiny_model, *ranks, *small_engine(port)], tmp_path / "engine"
    )
    yield Server(program, port).wait_healthy()
    program.stop()


@pytest.fixture
def router(engine: Server, tmp_path: Path) -> Iterator[Server]:
    """Yield a router before it."""
    port = free_port()
    words = [f"--port={port}", "--worker-urls", f"dp={engine.url}"]
    program = Spawned("hexgen_vllm.router", words, tmp_path / "router")
    server = Server(program, port)
    wait_until(server.is_healthy, program)
    yield server
    assert program.stop() == 0


def ask(router: Server, n: int) -> str:
    """Send a call, and return what it was placed on."""
    body = b'{"model": "tiny", "prompt": "SELECT %d", "max_tokens": 40, "ignore_eos": true}' % n
    call = Request(f"{router.url}/v1/completions", body, {"content-type": "application/json"})
    with urlopen(call, timeout=ANSWER_S) as answer:
        answer.read()
        return str(answer.headers["x-hexgen-engine"])


def test_every_rank_runs_the_calls_that_were_placed_on_it(engine: Server, router: Server) -> None:
    (worker,) = router.get("/workers").json["workers"]
    assert (worker["name"], worker["data_parallel_size"], worker["kv_tokens"]) == ("dp", 2, 16384)
    with ThreadPoolExecutor(CALLS) as pool:
        placed = Counter(pool.map(lambda n: ask(router, n), range(CALLS)))
    assert set(placed) == {"dp@0", "dp@1"}
    assert min(placed.values()) >= CALLS // 12, "which of two equal ones is cheaper may vary"
    ran = {f"dp@{rank}": int(n) for rank, n in DONE.findall(engine.get("/metrics").text)}
    assert ran == dict(placed), "by vLLM's own count"
    engines = router.get("/scheduling/diagnostics").json["engines"]
    assert [one["name"] for one in engines] == ["dp@0", "dp@1"]
    if worker["kind"] == "hexgen":
        check_telemetry(engine, router)


def check_telemetry(engine: Server, router: Server) -> None:
    """Check that each rank has measured itself, and that the router knows."""
    ranks = engine.get("/hexgen/stats").json["ranks"]
    assert [one["engine"] for one in ranks] == [0, 1]
    assert min(one["steps"] for one in ranks) > 0
    for rank in (0, 1):
        assert f'\nhexgen_vllm_steps_total{{engine="{rank}"}} ' in engine.get("/metrics").text

    def fits() -> list[float]:
        shown = router.get("/scheduling/diagnostics").json["engines"]
        return [
            one["cost"]["c0"] for one in shown if one["cost"] and one["cost_from"] == "telemetry"
        ]

    wait_until(lambda: len(fits()) == 2, router.program)
    first, second = fits()
    assert first != second, "each its own"
