"""One engine's life, where Ray is a list of what it was asked."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from hexgen_vllm.clock import SystemClock
from hexgen_vllm.cluster import ClusterSpec, EngineEntry
from hexgen_vllm.cluster.ray import engines
from hexgen_vllm.cluster.ray.engines import Replica
from hexgen_vllm.cluster.ray.nodes import Library
from tests.cluster.ray.fake_ray import FakeLibrary, FakeRay

URL = "http://127.0.0.1:1"


class Scene:
    def __init__(self) -> None:
        self.ray, self.heard = FakeRay({"a": URL}), list[str]()
        entry = EngineEntry(name="a", model="m")
        self.replica = Replica(
            "a",
            entry,
            ClusterSpec(engines=(entry,), restart_after_s=0),
            cast(Library, FakeLibrary(self.ray)),
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
    await asyncio.wait_for(running, 60)
    assert (scene.ray.starts, scene.replica.url) == (1, None)
    assert scene.heard == ["a serves", "a is lost"]


async def test_one_that_finds_no_node_says_so_until_it_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "_PATIENCE_S", 0.0)
    scene = Scene()
    scene.ray.room.clear()
    running = asyncio.ensure_future(scene.replica.run())
    while not scene.replica.placeless:
        await asyncio.sleep(0)
    scene.ray.room.set()
    await scene.replica.ready
    assert not scene.replica.placeless
    running.cancel()
