"""One engine's life, where Ray is a list of what it was asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from hexgen_vllm.clock import SystemClock
from hexgen_vllm.cluster import ClusterSpec, EngineEntry
from hexgen_vllm.cluster.ray.host import Place, Started
from hexgen_vllm.cluster.ray.library import Library
from hexgen_vllm.cluster.ray.replica import Replica

URL = "http://127.0.0.1:1"


class Broken(Exception):  # noqa: N818 - stands for those of Ray
    """A failure of the kind that tests ask for."""


class FakeRay:
    """One actor, which serves until :attr:`ends`."""

    def __init__(self) -> None:
        kinds = dict.fromkeys(("ActorDiedError", "RayActorError", "RayError"), Broken)
        self.exceptions = SimpleNamespace(**kinds)
        self.starts, self.trouble = 0, list[Exception]()
        self.ends: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, *_: object) -> Any:
        async def place() -> Place:
            return Place("127.0.0.1", "node")

        async def start() -> Started:
            self.starts += 1
            return Started(URL)

        async def wait() -> str:
            return await asyncio.shield(self.ends)

        def linger() -> asyncio.Future[None]:
            return asyncio.ensure_future(asyncio.sleep(0))

        methods: dict[str, Any] = {"place": place, "start": start, "wait": wait, "linger": linger}
        return SimpleNamespace(**{n: SimpleNamespace(remote=f) for n, f in methods.items()})

    def kill(self, _: object, *, no_restart: bool) -> None:
        if self.trouble:
            raise self.trouble.pop()


class Scene:
    def __init__(self) -> None:
        self.ray, self.heard = FakeRay(), list[str]()
        entry = EngineEntry(name="a", model="m")
        self.replica = Replica(
            "a",
            entry,
            ClusterSpec(engines=(entry,), restart_after_s=0),
            cast(Library, SimpleNamespace(ray=self.ray)),
            self,
            clock=SystemClock(),
            log_dir="",
            report=lambda line: None,
        )

    def serving(self, name: str, url: str) -> None:
        self.heard.append(f"{name} serves")

    def lost(self, name: str) -> None:
        self.heard.append(f"{name} is lost")


async def test_an_engine_that_dies_is_placed_again() -> None:
    scene = Scene()
    running = asyncio.ensure_future(scene.replica.run())
    await scene.replica.ready
    scene.ray.ends.set_result("died with exit code 1")
    while scene.ray.starts < 3:
        await asyncio.sleep(0)
    assert scene.heard[:3] == ["a serves", "a is lost", "a serves"]
    running.cancel()


async def test_whatever_goes_wrong_is_tried_again() -> None:
    scene = Scene()
    scene.ray.trouble = [OSError("no such thing"), ValueError("nor this")]
    running = asyncio.ensure_future(scene.replica.run())
    await scene.replica.ready
    scene.ray.ends.set_result("died with exit code 1")
    while scene.ray.starts < 3 and not running.done():
        await asyncio.sleep(0)
    assert not running.done()
    assert scene.ray.trouble == []
    running.cancel()


async def test_one_that_dies_while_it_leaves_is_not() -> None:
    scene = Scene()
    running = asyncio.ensure_future(scene.replica.run())
    await scene.replica.ready
    scene.replica.leaving = True
    scene.ray.ends.set_result("died with exit code 1")
    await asyncio.wait_for(running, 10)
    assert (scene.ray.starts, scene.replica.url) == (1, None)
    assert scene.heard == ["a serves", "a is lost"]
