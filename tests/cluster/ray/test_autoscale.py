"""From a real router's numbers to engines that come and go; the engines and Ray are fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest

from hexgen_vllm.cluster import ClusterSpec, EngineEntry
from hexgen_vllm.cluster.ray import supervisor
from hexgen_vllm.cluster.ray.supervisor import RayCluster
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand
from tests.cluster.ray.fake_ray import FakeLibrary, FakeRay

KEY = "admin-secret"
COST = {"c0": 0.05, "c1": 0.0, "c2": 0.0, "p0": 0.0, "p1": 0.0, "p2": 0.0}
SLOTS, CALLS = 2, 14
STATS = {"cost": COST, "max_num_seqs": SLOTS, "kv_tokens": 100_000, "running": 0, "waiting": 0}
QUICK = {"horizon_s": 1.0, "up_load": 0.6, "cooldown_s": 0.0, "down_after_s": 0.3}


class FakeRayRouter:
    """A router that runs elsewhere."""

    def __init__(self, url: str) -> None:
        self.url, self.key = url, KEY

    async def start(self, session: object) -> None:
        """Do nothing."""

    async def keep(self, session: object) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Do nothing."""


class Scene(NamedTuple):
    stand: Stand
    said: list[str]

    async def work(self, calls: int) -> None:
        """Make calls at once, of which two engines can do more in time than one can."""
        deadline = {"x-hexgen-workflow-deadline-ms": "3000"}

        async def call() -> int:
            async with self.stand.post(headers=deadline, ignore_eos=True, max_tokens=8) as answer:
                await answer.read()
                return int(answer.status)

        assert set(await asyncio.gather(*(call() for _ in range(calls)))) == {200}

    def changes(self) -> list[str]:
        return [line.partition(" (")[0] for line in self.said if line.startswith("engines ")]


@asynccontextmanager
async def scene(
    monkeypatch: pytest.MonkeyPatch,
    placement: dict[str, Any],
    *others: EngineEntry,
    **options: Any,
) -> AsyncIterator[Scene]:
    entries = (EngineEntry(name="a", model="tiny", ray=placement), *others)
    names = [name for entry in entries for name in entry.replicas()]
    settings = FakeSettings(step_s=0.05, slots=SLOTS, stats=STATS)
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeServer(settings)) for _ in names]
        given: dict[str, Any] = {"worker_urls": (), "admin_api_key": (KEY,)}
        stand = await stack.enter_async_context(open_stand(wait=False, **given))
        ray = FakeRay(dict(zip(names, (fake.url for fake in fakes), strict=True)))
        process = FakeRayRouter(stand.router.url)
        monkeypatch.setattr(supervisor, "Library", lambda _: FakeLibrary(ray))
        monkeypatch.setattr(supervisor, "RayRouter", lambda *_, **__: process)
        said: list[str] = []
        quick = {"interval_s": 0.1, "scaling": QUICK, **options}
        cluster = RayCluster(ClusterSpec(engines=entries, ray=quick), report=said.append)
        await stack.enter_async_context(cluster)
        yield Scene(stand, said)


async def test_engines_come_while_calls_would_be_late_and_leave_when_fewer_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scene(monkeypatch, {"max_replicas": 2}) as at:
        fleet = at.stand.context.fleet.engines
        assert list(fleet) == ["a-0"]
        await at.work(CALLS)
        assert at.changes()[0] == "engines a: 1 -> 2"
        await at.stand.until(lambda: "engine a-1: gone" in at.said or "engine a-0: gone" in at.said)
        assert at.changes()[-1] == "engines a: 2 -> 1"
        assert len(fleet) == 1
        at.stand.assert_settled()


async def test_engines_of_different_models_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    other = EngineEntry(name="b", model="other")
    async with scene(monkeypatch, {"max_replicas": 2}, other) as at:
        assert any("their models differ" in line for line in at.said)
    async with scene(monkeypatch, {"max_replicas": 2}, other, autoscale=False) as at:
        assert not any("their models differ" in line for line in at.said)


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ({"max_replicas": 2}, {"autoscale": False}),
        ({"max_replicas": 1}, {}),
        ({"min_replicas": 2, "max_replicas": 2}, {}),
    ],
    ids=["off", "no-room", "fixed"],
)
async def test_none_come_or_go_where_that_is_off_or_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, placement: dict[str, Any], options: dict[str, Any]
) -> None:
    async with scene(monkeypatch, placement, **options) as at:
        fleet = at.stand.context.fleet.engines
        before = list(fleet)
        await at.work(CALLS)
        assert list(fleet) == before
        assert len(before) == placement.get("min_replicas", 1)
        assert at.changes() == []
