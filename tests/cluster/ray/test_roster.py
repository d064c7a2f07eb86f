"""The roster against a real router in front of fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from hexgen_vllm.cluster.ray.router import Roster, RouterAway, RouterClient
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand
from hexgen_vllm.types import EngineState

KEY = "admin-secret"


class Scene(NamedTuple):
    stand: Stand
    router: RouterClient
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
        router = RouterClient(stand.client, stand.router.url, KEY)
        yield Scene(stand, router, Roster(router, said.append), said)


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


async def test_one_that_leaves_is_forgotten_even_if_it_dies_and_serves_again() -> None:
    slow = FakeSettings(step_s=0.02)
    async with FakeServer(slow) as engine, FakeServer() as again, scene() as at:
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        async with at.stand.post(stream=True, max_tokens=40) as answer:
            await answer.content.readline()
            leaving = asyncio.ensure_future(at.roster.leave("a"))
            await asyncio.sleep(0)
            at.roster.lost("a")
            at.roster.serving("a", again.url)
            for _ in range(2):
                await at.roster.compare()
                assert at.states() == {"a": EngineState.DRAINING}
            assert "[DONE]" in await answer.text()
        await at.stand.until(lambda: not at.states())
        for _ in range(2):
            await at.roster.compare()
        assert at.states() == {}
        await leaving


async def test_one_that_was_to_leave_and_stays_gets_calls_again() -> None:
    slow = FakeSettings(step_s=0.02)
    async with FakeServer(slow) as engine, scene() as at:
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        async with at.stand.post(stream=True, max_tokens=20) as answer:
            await answer.content.readline()
            leaving = asyncio.ensure_future(at.roster.leave("a"))
            await asyncio.sleep(0)
            await at.roster.compare()
            assert at.states() == {"a": EngineState.DRAINING}
            leaving.cancel()
            at.roster.stay("a", engine.url)
            await at.roster.compare()
            assert at.states() == {"a": EngineState.READY}
            assert "[DONE]" in await answer.text()
        at.stand.context.tick()
        await at.roster.compare()
        assert at.states() == {"a": EngineState.READY}
        leaving = asyncio.ensure_future(at.roster.leave("a"))
        await asyncio.sleep(0)
        for _ in range(2):
            await at.roster.compare()
        assert at.states() == {}
        at.roster.stay("a", engine.url)
        await at.roster.compare()
        assert at.states() == {"a": EngineState.READY}


async def test_one_that_leaves_while_it_is_being_registered_is_not_left_behind() -> None:
    async with FakeServer() as engine, scene() as at:
        add = at.router.add

        async def leave_meanwhile(name: str, url: str) -> None:
            leaving.append(asyncio.ensure_future(at.roster.leave(name)))
            await add(name, url)

        leaving: list[asyncio.Future[None]] = []
        at.router.add = leave_meanwhile  # type: ignore[method-assign]
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        assert at.states() == {"a": EngineState.READY}
        assert not leaving[0].done()
        for _ in range(2):
            await at.roster.compare()
        assert at.states() == {}
        await leaving[0]


async def test_a_removal_that_the_router_did_not_hear_is_told_again() -> None:
    async with FakeServer() as engine, scene() as at:
        remove, tries = at.router.remove, list[str]()

        async def unheard(name: str, *, force: bool = False) -> None:
            tries.append(name)
            if len(tries) == 1:
                raise RouterAway("the router does not answer")
            await remove(name, force=force)

        at.router.remove = unheard  # type: ignore[method-assign]
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        leaving = asyncio.ensure_future(at.roster.leave("a"))
        await asyncio.sleep(0)
        for _ in range(3):
            await at.roster.compare()
        assert at.states() == {}
        await leaving


async def test_what_an_operator_drained_stays_drained() -> None:
    async with FakeServer() as engine, scene() as at:
        at.roster.serving("a", engine.url)
        await at.roster.compare()
        at.stand.context.fleet.drain("a")
        for _ in range(2):
            await at.roster.compare()
        assert at.states() == {"a": EngineState.DRAINING}
        at.roster.lost("a")
        await at.roster.compare()
        at.roster.serving("a", engine.url)
        for _ in range(2):
            await at.roster.compare()
        assert at.states() == {"a": EngineState.DRAINING}


async def test_a_lost_engine_is_drained_once() -> None:
    engine = FakeServer()
    async with scene() as at:
        async with engine:
            at.roster.serving("a", engine.url)
            await at.roster.compare()
            at.roster.lost("a")
            await at.roster.compare()
        await at.stand.until(lambda: at.states() == {"a": EngineState.DOWN})
        at.router.drain = None  # type: ignore[assignment,method-assign]
        await at.roster.compare()


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
