"""A real engine stops as Kubernetes stops it: gone from DNS, drained, then SIGTERM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hexgen_vllm.testing.fake_server import FakeServer
from hexgen_vllm.testing.stand import open_stand
from hexgen_vllm.types import EngineState
from tests.e2e.forkserver import ForkServer
from tests.e2e.programs import Server, free_port, small_engine
from tests.router.engines.discovery.dns_server import dns_server

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SERVICE = "_http._tcp.engines.llm"
PACED = (  # so that the stream is still open when the engine is found to be gone
    "--scheduler-cls=hexgen_vllm.testing.pace.PacedUrgencyScheduler",
    '--additional-config={"hexgen_pace": {"step_ms": 10}}',
)
LONG = {"max_tokens": 900, "ignore_eos": True, "stream_options": {"include_usage": True}}


async def test_what_an_engine_has_begun_it_ends(
    forks: ForkServer, tiny_model: str, tmp_path: Path
) -> None:
    """What begins in its last moments goes elsewhere; nothing is lost."""
    port = free_port()
    argv = [tiny_model, *small_engine(port), *PACED, "--shutdown-timeout=60"]
    program = forks.start("hexgen_vllm.serve", argv, tmp_path / "engine")
    await asyncio.to_thread(Server(program, port).wait_healthy)
    async with FakeServer() as other, dns_server() as dns:
        dns.set("pod.llm", "A", "127.0.0.1")
        dns.set(SERVICE, "SRV", f"0 0 {port} pod.llm.")
        options = {"worker_dns": (SERVICE,), "worker_dns_server": dns.address}
        bounds = {"worker_dns_refresh_secs": 0.1, "worker_dns_least_refresh_secs": 0.1}
        async with open_stand(wait=False, worker_urls=(), **options, **bounds) as stand:
            fleet = stand.context.fleet.engines
            await stand.until(stand.context.fleet.ready)
            (leaving,) = fleet
            async with stand.post(stream=True, **LONG) as answer:
                assert answer.headers["x-hexgen-engine"] == leaving
                await answer.content.readline()
                dns.set(SERVICE, "SRV", f"0 0 {other.port} pod.llm.")
                await stand.until(lambda: fleet[leaving].state is EngineState.DRAINING)
                await stand.until(stand.context.fleet.ready)
                stopped = asyncio.create_task(asyncio.to_thread(program.stop))
                async with stand.post() as late:
                    assert (late.status, late.headers["x-hexgen-engine"] != leaving) == (200, True)
                text = (await answer.read()).decode()
            assert text.endswith("data: [DONE]\n\n")
            assert '"completion_tokens":900' in text
            assert await stopped == 0
            await stand.until(lambda: leaving not in fleet)
            stand.assert_settled()
