"""A real engine whose model is spread over two workers is one engine to the router."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, Spawned, free_port, small_engine, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

CALLS = 12
CALL = {"model": "tiny", "prompt": "SELECT", "max_tokens": 40, "ignore_eos": True}


def test_an_engine_on_two_devices_is_one_engine(
    forks: ForkServer, tiny_model: str, tmp_path: Path
) -> None:
    port, front = free_port(), free_port()
    words = [word for word in small_engine(port) if "executor" not in word]
    argv = [tiny_model, *words, "--tensor-parallel-size=2"]
    program = forks.start("hexgen_vllm.serve", argv, tmp_path / "engine")
    engine = Server(program, port).wait_healthy()
    listen = [f"--port={front}", "--worker-urls", f"big={engine.url}"]
    router = Server(Spawned("hexgen_vllm.router", listen, tmp_path / "router"), front)
    try:
        wait_until(router.is_healthy, router.program)
        with ThreadPoolExecutor(CALLS) as pool:
            answers = list(pool.map(lambda _: router.post("/v1/completions", CALL), range(CALLS)))
        assert [answer.status for answer in answers] == [200] * CALLS
        (worker,) = router.get("/workers").json["workers"]
        assert (worker["name"], worker["data_parallel_size"], worker["load"]) == ("big", 1, 0)
        assert worker["kv_tokens"] == 256 * 32, "each worker has its heads of every block"
        stats = engine.get("/hexgen/stats").json
        assert stats["steps"] >= 40, "all steps are of one scheduler"

        def measured() -> bool:
            (shown,) = router.get("/scheduling/diagnostics").json["engines"]
            return bool(shown["cost_from"] == "telemetry")

        wait_until(measured, router.program)
    finally:
        assert router.program.stop() == 0
        program.stop()
