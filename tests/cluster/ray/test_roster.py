"""The roster against a real router in front of fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from hexgen_vllm.cluster.ray.roster import Roster
from hexgen_vllm.cluster.ray.router_client import RouterAway, RouterClient
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState

KEY = "admin-secret"


class Scene(NamedTuple):
    stand: Stand
    roster: Roster
    said: list[str]

    def states(self) -> dict[str, EngineState]:
        return {name: e.state for name, e in self.stand.context.fleet.engines.items()}


@asynccontextmanager
async def scene(**options: object) -> AsyncIterator[Scene]:
    """Yield a router that knows no engine but those of the roster."""
    given = {"worker_urls": (), "admin_api_key": (KEY,), **options}
    async with open_stand(wait=False, **given) as stand:
        said: list[str] = []
        roster = Roster(RouterClient(stand.client, stand.router.url, KEY), said.append)
        yield Scene(stand, roster, said)


async def test_an_engine_that_serves_gets_calls_and_one_that_is_lost_none() -> None:
    async with FakeServer() as engine, scene() as at:
        at.roster.serving("a", engine.url)
        assert not at.roster.settled
        await at.roster.compare()
        assert at.roster.settled
        assert at.states() == {"a": EngineState.READY}
        at.roster.lost("a")
        await at.roster.compare()
        assert at.states() == {"a": EngineState.DRAINING}
        async with at.stand.post() as answer:  # its model stays known
            assert answer.status == 503


async def test_an_engine_that_serves_again_at_its_address_or_another_one_gets_calls() -> None:
    async with FakeServer() as one, FakeServer() as two, scene() as at:
        for engine in (one, one, two):
            at.roster.serving("a", engine.url)
            await at.roster.compare()
            assert at.states() == {"a": EngineState.READY}
            async with at.stand.post() as answer:
                assert answer.status == 200
            at.roster.lost("a")
            await at.roster.compare()
        assert [len(one.received), len(two.received)] == [2, 1]


async def test_an_engine_at_the_address_of_one_that_was_lost_takes_its_place() -> None:
    async with FakeServer() as engine, scene() as at:
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        at.roster.lost("a")
        at.roster.serving("b", engine.url)
        await at.roster.compare()
        assert at.states() == {"b": EngineState.READY}
        assert at.said == []


async def test_a_router_that_forgot_everything_is_told_again() -> None:
    async with FakeServer() as engine, scene() as at:
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        at.stand.context.watchers.remove("a")
        await at.roster.compare()
        assert at.states() == {"a": EngineState.READY}


async def test_an_engine_leaves_when_its_stream_has_ended() -> None:
    async with FakeServer(FakeSettings(step_s=0.01)) as engine, scene() as at:
        at.roster.serving("a", engine.url)
        keeping = asyncio.ensure_future(at.roster.keep())
        await at.stand.until(lambda: at.roster.settled)
        async with at.stand.post(stream=True, max_tokens=40) as answer:
            leaving = asyncio.ensure_future(at.roster.leave("a"))
            await at.stand.until(lambda: at.states() == {"a": EngineState.DRAINING})
            assert not leaving.done()
            text = await answer.text()
        assert text.rstrip().endswith("data: [DONE]")
        await leaving
        assert at.states() == {}
        keeping.cancel()
        at.stand.assert_settled()


async def test_one_that_was_never_registered_leaves_at_once() -> None:
    async with scene() as at:
        leaving = asyncio.ensure_future(at.roster.leave("a"))
        await asyncio.sleep(0)
        await at.roster.compare()
        await leaving


async def test_a_refusal_is_said_once_and_tried_again() -> None:
    async with FakeServer() as engine, scene(worker_allowed_hosts=("10.0.0.0/8",)) as at:
        at.roster.serving("a", engine.url)
        for _ in range(3):
            await at.roster.compare()
        assert at.said == [
            "engine a: the router says: Engines may not be registered on this host; see "
            "--worker-allowed-hosts."
        ]
        assert not at.roster.settled


async def test_a_router_that_is_not_there_is_said_to_be_away() -> None:
    async with scene() as at:
        client = RouterClient(at.stand.client, "http://127.0.0.1:1", KEY)
        with pytest.raises(RouterAway, match="the router does not answer"):
            await client.workers()
        wrong = RouterClient(at.stand.client, at.stand.router.url, "guess")
        with pytest.raises(RouterAway, match="A valid admin API key is needed"):
            await wrong.drain("a")
