"""When the router runs out of what connections need, that is held against no engine."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from hexgen_vllm import descriptors
from hexgen_vllm.router.engines.probe import Probe, Unreachable
from hexgen_vllm.router.http.client import Pool
from hexgen_vllm.router.http.errors import (
    CannotConnect,
    RouterShort,
    is_short,
)
from hexgen_vllm.router.options import Worker
from hexgen_vllm.testing.fake_server import FakeServer
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState
from tests.router.http.test_client import HEAD
from tests.router.http.test_server import Wire, call, request
from tests.router.test_lifecycle import started

SHORT = (
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL,
)  # fmt: skip


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Leave this process no descriptor for anything new."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in taken:
            os.close(one)


@pytest.mark.parametrize("number", SHORT)
def test_what_is_short_here_is_told_from_what_is_wrong_there(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert is_short(error)
    assert is_short(OSError(f"Multiple exceptions: {error}, {error}")), "as event loops have it"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        OSError(errno.EHOSTUNREACH, "no route"),
        OSError("Multiple exceptions: [Errno 111] refused, [Errno 113] no route"),
        socket.gaierror(socket.EAI_NONAME, "unknown"),
        TimeoutError(),
        ValueError("[Errno 24]"),
    ],
)
def test_what_is_wrong_there_is_not_short_here(error: Exception) -> None:
    assert not is_short(error)


class Failing(Pool):
    """Cannot connect."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1.0)
        self._failure = error

    async def _make(self, address: Any) -> Any:
        raise self._failure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((OSError(number, "x"), RouterShort) for number in SHORT),
        (socket.gaierror(socket.EAI_AGAIN, "x"), RouterShort),
        (OSError(errno.ECONNREFUSED, "x"), CannotConnect),
    ],
)
async def test_a_connection_fails_for_a_reason(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        await Failing(error).send(URL("http://127.0.0.1:9/"), HEAD, b"")


async def test_without_descriptors_calls_are_refused_and_engines_stay(stand: Stand) -> None:
    wires = [await Wire.to(stand) for _ in range(3)]
    with no_descriptors():
        for wire in wires:
            wire.writer.write(request(call(stand, max_tokens=2)))
            status, headers, body = await wire.answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert headers["x-llm-d-request-dropped-reason"] == "rejected-out-of-connections"
            assert json.loads(body)["error"]["code"] == "rejected-out-of-connections"
        await asyncio.sleep(0.5)  # ten health checks
        assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
    for wire in wires:
        wire.writer.write(request(call(stand, max_tokens=2)))
        assert (await wire.answer())[0] == 200
    assert stand.context.ledger.failed() == {"rejected-out-of-connections": 3}
    stand.assert_settled()


@pytest.mark.parametrize("number", SHORT)
async def test_probes_without_descriptors_take_no_engine_out(stand: Stand, number: int) -> None:
    """Whatever asks: health checks, lists of models, telemetry."""
    probe = Probe(Failing(OSError(number, os.strerror(number))), stand.context.options)
    for watcher in stand.context.watchers._watchers.values():
        watcher._probe = probe
    with pytest.raises(Unreachable, match="the router"):
        await probe.healthy(Worker("e", stand.engines[0].url))
    await asyncio.sleep(0.5)
    assert [stand.state(i) for i in range(2)] == [EngineState.READY] * 2
    async with stand.post(max_tokens=2) as answer:
        assert answer.status == 200


async def test_more_connections_than_allowed_are_told_so() -> None:
    async with open_stand(max_connections=2) as stand:
        first, second = await Wire.to(stand), await Wire.to(stand)
        await stand.until(lambda: len(stand.router._runner.server.open) == 2)  # type: ignore
        for _ in range(20):
            third = await Wire.to(stand)
            third.writer.write(request(call(stand, max_tokens=2)))
            status, headers, body = await third.answer()
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            assert json.loads(body)["error"]["code"] == "rejected-out-of-connections"
            assert await third.reader.read() == b""
            third.writer.close()
            await stand.until(lambda: len(stand.router._runner.server.open) == 2)  # type: ignore
        first.writer.write(request(call(stand, max_tokens=2)))
        assert (await first.answer())[0] == 200
        second.writer.close()
        await stand.until(lambda: len(stand.router._runner.server.open) == 1)  # type: ignore
        fourth = await Wire.to(stand)
        fourth.writer.write(request(call(stand, max_tokens=2)))
        assert (await fourth.answer())[0] == 200


async def test_a_flood_of_connections_is_cut_off() -> None:
    """Who opens them and says nothing keeps no descriptor of those beyond the bound."""
    async with open_stand(max_connections=5) as stand:
        first = await Wire.to(stand)
        flood = [await Wire.to(stand) for _ in range(100)]
        server: Any = stand.router._runner.server  # type: ignore[union-attr]
        await stand.until(lambda: server.refused >= 96)
        assert len(server.open) <= 5 + 16
        shown = stand.context.metrics.exposition().decode()
        assert f"hexgen_router_refused_connections_total {float(server.refused)}\n" in shown
        assert "hexgen_router_most_client_connections 5.0\n" in shown
        first.writer.write(request(call(stand, max_tokens=2)))
        assert (await first.answer())[0] == 200
        for wire in flood:
            wire.writer.close()


@pytest.mark.parametrize(("limit", "most"), [(200, 68), (1024, 448), (2**20, 458752), (10, 1)])
def test_connections_leave_descriptors_for_engines(limit: int, most: int) -> None:
    assert descriptors.connections_for(limit) == most
    assert limit < 64 or 2 * most + 64 <= limit


def test_the_soft_limit_becomes_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        raised = descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == raised
        assert raised == (hard if 0 < hard < 2**20 else 2**20)
        assert descriptors.raise_limit() == raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_process_raises_its_limit(workers: int) -> None:
    """Started with a low soft limit, as shells and service managers do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with FakeServer() as engine:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            async with started(engine.url, router_workers=workers) as router:
                for pid in (router.process.pid, *children(router.process.pid)):
                    if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                        assert found == min(hard, 2**20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
