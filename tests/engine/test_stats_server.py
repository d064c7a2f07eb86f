"""Telemetry without vLLM's HTTP server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from hexgen_vllm.engine.stats_server import StatsServer
from hexgen_vllm.errors import ConfigError

SNAPSHOT: dict[str, Any] = {
    "order": "slack",
    "running": 3,
    "fit_error": float("nan"),
    "preemptions": {"displaced": 2},
    "cost": None,
    "slack_bounds_s": [0.0],
    "slack_counts": [1, 2],
}


@pytest.fixture
def server() -> Iterator[StatsServer]:
    made = StatsServer(lambda: SNAPSHOT, 0, rank=1)
    yield made
    made.close()


def get(server: StatsServer, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def test_gives_json_and_metrics(server: StatsServer) -> None:
    found = json.loads(get(server, "/hexgen/stats"))
    assert found == {"engine": 1, "data_parallel_size": 1, **SNAPSHOT, "fit_error": None}
    page = get(server, "/metrics?x=1")
    assert "hexgen_vllm_running 3\n" in page
    assert 'hexgen_vllm_preemptions_total{cause="displaced"} 2\n' in page


def test_has_nothing_else(server: StatsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server, "/v1/models")


def test_calls_may_come_and_go_while_it_is_read() -> None:
    tries = []

    def moving() -> dict[str, Any]:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return SNAPSHOT

    server = StatsServer(moving, 0)
    try:
        assert json.loads(get(server, "/hexgen/stats"))["running"] == 3
    finally:
        server.close()


def test_a_port_in_use_is_refused_in_one_sentence(server: StatsServer) -> None:
    with pytest.raises(ConfigError, match=f"stats_port {server.port} cannot be used"):
        StatsServer(lambda: SNAPSHOT, server.port)


@pytest.mark.parametrize(
    ("host", "shown", "status"),
    [
        ("0.0.0.0", "Bearer k", 200),
        ("0.0.0.0", "bearer k", 200),
        ("0.0.0.0", "Bearer x", 401),
        ("0.0.0.0", "k", 401),
        ("0.0.0.0", "", 401),
        ("127.0.0.1", "", 200),
    ],
)
def test_beyond_this_machine_it_wants_the_key(
    monkeypatch: pytest.MonkeyPatch, host: str, shown: str, status: int
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    server = StatsServer(lambda: SNAPSHOT, 0, host=host)
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        client.request("GET", "/hexgen/stats", headers={"Authorization": shown})
        answer = client.getresponse()
        assert answer.status == status
        assert (b"order" in answer.read()) is (status == 200)
    finally:
        client.close()
        server.close()
