"""Which engines of an entry come and go; engines here are names that start and stop."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hexgen_vllm.cluster import EngineEntry
from hexgen_vllm.cluster.ray.engines import EngineGroup, Replica
from hexgen_vllm.cluster.ray.router import Roster


class FakeReplica:
    def __init__(self, name: str) -> None:
        self.name, self.url, self.leaving, self.stopped = name, f"http://{name}", False, False
        self.placeless, self.may_stop = False, asyncio.Event()
        self.may_stop.set()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self.may_stop.wait()
        self.stopped = True


class FakeRoster:
    """Sees engines off when it is told to."""

    def __init__(self) -> None:
        self.leaving: dict[str, asyncio.Event] = {}

    async def leave(self, name: str) -> None:
        await self.leaving.setdefault(name, asyncio.Event()).wait()

    def stay(self, name: str, url: str) -> None:
        del self.leaving[name]


class Scene:
    def __init__(self, most: int) -> None:
        entry = EngineEntry(name="a", model="m", ray={"max_replicas": most})
        self.roster, self.said, self.loads = FakeRoster(), list[str](), dict[str, int]()
        roster = cast(Roster, self.roster)
        self.group = EngineGroup(entry, cast(Any, FakeReplica), roster, self.said.append)

    def resize(self, count: int) -> list[str]:
        """Have ``count`` engines; return those that stay."""
        self.group.resize(count, lambda name: self.loads.get(name, 0))
        return [one.name for one in self.group.staying]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_idlest_leaves_the_newest_of_equals_and_is_stopped_when_seen_off() -> None:
    scene = Scene(4)
    assert scene.resize(3) == ["a-0", "a-1", "a-2"]
    scene.loads = {"a-0": 2, "a-1": 1, "a-2": 1}
    assert scene.resize(2) == ["a-0", "a-1"]
    await settle()
    leaving = cast(FakeReplica, scene.group.replicas["a-2"])
    assert not leaving.stopped
    scene.roster.leaving["a-2"].set()
    await settle()
    assert leaving.stopped
    assert set(scene.group.replicas) == {"a-0", "a-1"}
    assert scene.said == ["engine a-2: leaves when its calls have ended", "engine a-2: gone"]
    await scene.group.stop()


async def test_one_that_does_not_serve_yet_leaves_before_one_that_does() -> None:
    scene = Scene(2)
    scene.resize(2)
    cast(Replica, scene.group.replicas["a-0"]).url = None
    assert scene.resize(1) == ["a-1"]
    await scene.group.stop()


async def test_one_that_leaves_stays_where_more_are_wanted_again() -> None:
    scene = Scene(2)
    scene.resize(2)
    scene.resize(1)
    await settle()
    assert scene.resize(2) == ["a-0", "a-1"]
    await settle()
    assert scene.roster.leaving == {}
    assert scene.said[-1] == "engine a-1: stays after all"
    scene.resize(1)
    await settle()
    scene.roster.leaving["a-1"].set()
    await settle()
    assert set(scene.group.replicas) == {"a-0"}
    await scene.group.stop()


async def test_the_name_of_one_that_leaves_is_not_given_to_another() -> None:
    scene = Scene(2)
    scene.resize(2)
    scene.resize(1)
    await settle()
    cast(Replica, scene.group.replicas["a-1"]).url = None  # it was lost
    assert scene.resize(2) == ["a-0"]
    scene.roster.leaving["a-1"].set()
    await settle()
    assert scene.resize(2) == ["a-0", "a-1"]
    await scene.group.stop()


async def test_all_are_stopped_whether_they_were_leaving_or_not() -> None:
    scene = Scene(3)
    scene.resize(3)
    scene.resize(2)
    await settle()
    replicas = [cast(FakeReplica, one) for one in scene.group.replicas.values()]
    await scene.group.stop()
    assert [one.stopped for one in replicas] == [True] * 3
    assert scene.group.replicas == {}


async def test_all_are_stopped_while_one_is_just_being_stopped() -> None:
    scene = Scene(2)
    scene.resize(2)
    scene.resize(1)
    await settle()
    replicas = [cast(FakeReplica, one) for one in scene.group.replicas.values()]
    replicas[1].may_stop.clear()
    scene.roster.leaving["a-1"].set()
    await settle()
    stopping = asyncio.ensure_future(scene.group.stop())
    await settle()
    replicas[1].may_stop.set()
    await stopping
    assert [one.stopped for one in replicas] == [True, True]
    assert scene.group.replicas == {}
