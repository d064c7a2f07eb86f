"""Metrics and health on a port of their own, and nothing else there."""

from __future__ import annotations

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.ports import free_ports
from hexgen_vllm.testing.stand import CHAT, open_stand


async def test_scrapers_have_a_port_of_their_own() -> None:
    (port,) = free_ports("127.0.0.1", 1)
    async with open_stand(prometheus_port=port, api_key=("k",)) as stand:
        for path, status in (("/metrics", 200), ("/health", 200), ("/liveness", 200),
                             ("/v1/models", 404), ("/workers", 404), ("/ui", 404),
                             ("/nonsense", 404)):  # fmt: skip
            async with stand.client.get(f"http://127.0.0.1:{port}{path}") as answer:
                assert answer.status == status
                text = await answer.text()
                assert ("hexgen_router_open_calls" in text) == (path == "/metrics")
                assert ('"error"' in text) == (status == 404)
        async with stand.client.post(f"http://127.0.0.1:{port}{CHAT}", json={}) as answer:
            assert answer.status in (404, 413)
        assert stand.received() == []


async def test_a_port_in_use_is_one_sentence() -> None:
    async with open_stand() as stand:
        with pytest.raises(
            ConfigError,
            match=r"^cannot listen on 127.0.0.1:\d+ for metrics: Address already in use\.$",
        ):
            async with open_stand(prometheus_port=stand.router.port):
                pass
