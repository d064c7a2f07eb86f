"""Ray without Ray: actors whose engines are there already."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hexgen_vllm.cluster.ray.nodes import Node, Place, Started


class Broken(Exception):  # noqa: N818 - stands for those of Ray
    """A failure of the kind that tests ask for."""


class FakeRay:
    """The module.

    Attributes:
        starts: how often an engine was started.
        ends: how one of them ended, once that is set.
        room: whether there is a node with room.
        trouble: what the next attempts to kill an actor raise.

    Args:
        urls: of the engines, by name.
    """

    def __init__(self, urls: Mapping[str, str]) -> None:
        kinds = dict.fromkeys(("ActorDiedError", "RayActorError", "RayError"), Broken)
        self.exceptions = SimpleNamespace(**kinds)
        self.starts, self.trouble = 0, list[Exception]()
        self.ends: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.room = asyncio.Event()
        self.room.set()
        self._urls = urls

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, _: object, name: str, *more: object) -> Any:
        async def place() -> Place:
            await self.room.wait()
            return Place("127.0.0.1", "node")

        async def start() -> Started:
            self.starts += 1
            return Started(self._urls[name])

        async def wait() -> str:
            return await asyncio.shield(self.ends)

        async def stop(grace_s: float) -> None:
            return None

        def linger() -> asyncio.Future[None]:
            return asyncio.ensure_future(asyncio.sleep(0))

        methods: dict[str, Any] = {
            "place": place, "start": start, "wait": wait, "stop": stop, "linger": linger,
        }  # fmt: skip
        return SimpleNamespace(**{n: SimpleNamespace(remote=f) for n, f in methods.items()})

    def kill(self, _: object, *, no_restart: bool) -> None:
        if self.trouble:
            raise self.trouble.pop()


class FakeLibrary:
    """Stands for :class:`hexgen_vllm.cluster.ray.nodes.Library`."""

    address = "nowhere"

    def __init__(self, ray: FakeRay) -> None:
        self.ray = ray

    def nodes(self) -> list[Node]:
        return [Node("node", "127.0.0.1", {"CPU": 8.0})]

    def close(self) -> None:
        """Do nothing."""
