"""A test stand: a router in front of fake engines, and a client, all in one event loop.

async with open_stand(FakeSettings(), FakeSettings(step_s=0.01), policy="slack") as stand:
    async with stand.post(stream=True) as answer:
        ...
    stand.assert_settled()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from hexgen_vllm.clock import Clock
from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.router.app import Router
from hexgen_vllm.router.context import Context
from hexgen_vllm.router.options import RouterOptions
from hexgen_vllm.testing.fake_server import FakeServer, FakeSettings, Received
from hexgen_vllm.types import EngineState, Role

CHAT: Final = "/v1/chat/completions"
BODIES: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/embeddings": {"input": ["hi"]},
}
_QUICK: Final = {
    "port": 0,
    "health_check_interval_secs": 0.05,
    "stats_interval_secs": 0.05,
    "retry_initial_backoff_ms": 1.0,
}


@dataclass(slots=True)
class Stand:
    """A running router with its engines ``engine-0``, ``engine-1``, ..., and a client."""

    router: Router
    engines: list[FakeServer]
    client: aiohttp.ClientSession

    @property
    def context(self) -> Context:
        """The router's parts."""
        return self.router.context

    def body(self, path: str = CHAT, **more: Any) -> dict[str, Any]:
        """Return a small request for ``path`` with ``more`` fields."""
        return {"model": "tiny", **BODIES[path], **more}

    def post(self, path: str = CHAT, *, headers: dict[str, str] | None = None, **more: Any) -> Any:
        """Send :meth:`body` to the router."""
        body = self.body(path, **more)
        return self.client.post(self.router.url + path, json=body, headers=headers or {})

    def get(self, path: str) -> Any:
        """Ask the router for ``path``."""
        return self.client.get(self.router.url + path)

    def received(self) -> list[Received]:
        """Return what the engines were sent."""
        return [one for engine in self.engines for one in engine.received]

    def state(self, i: int) -> EngineState:
        """Return the state in which the router sees engine ``i``."""
        return self.context.fleet.engines[f"engine-{i}"].state

    async def until(self, true: Callable[[], object]) -> None:
        """Wait until ``true()`` is; the limit is the test's own timeout."""
        while not true():
            await asyncio.sleep(0.002)

    async def all_ready(self) -> None:
        """Wait until the router sends calls to every engine."""
        await self.until(lambda: len(self.context.fleet.ready()) == len(self.engines))

    def assert_settled(self) -> None:
        """Check that nothing is open, held or in flight, and that every call is in the book."""
        coordinator, book = self.context.service.coordinator, self.context.ledger
        assert book.open == 0
        assert book.arrived.total() == book.answered() + sum(book.failed().values())
        assert coordinator.held == self.context.service.waiting == 0
        assert not self.context.guard.attempts
        for load in coordinator.engines.values():
            assert not load.in_flight
            assert load.queued_prefill_tokens() == 0


@asynccontextmanager
async def open_stand(
    *settings: FakeSettings,
    policy: str = "slack",
    dispatch: dict[str, Any] | None = None,
    clock: Clock | None = None,
    wait: bool = True,
    roles: Sequence[Role] = (),
    **options: Any,
) -> AsyncIterator[Stand]:
    """Start engines (one stock engine by default), a router and a client.

    Args:
        settings: one per engine.
        policy: how calls are placed.
        dispatch: other ``DispatchOptions``.
        clock: the router's.
        wait: wait until every engine has joined.
        roles: of the engines, if not all are for both.
        options: ``RouterOptions``.
    """
    async with AsyncExitStack() as stack:
        fakes = [FakeServer(one) for one in settings or (FakeSettings(),)]
        engines = [await stack.enter_async_context(fake) for fake in fakes]
        urls = [engine.url for engine in engines]
        if roles:
            said = zip(urls, roles, strict=True)
            urls = [f"{url}?role={role.value}" for url, role in said]
        given = {**_QUICK, "worker_urls": tuple(urls), **options}
        placing = DispatchOptions(policy=policy, **(dispatch or {}))
        router = Router(RouterOptions(**given), placing, clock)
        await stack.enter_async_context(router)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(auto_decompress=False, read_bufsize=2**20)
        )
        stand = Stand(router, engines, client)
        if wait:
            await stand.all_ready()
        yield stand
