"""A router in front of fake engines, on the event loop of production and on Python's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand

LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
# Long, and about decisions rather than connections, or about processes, which choose their loop.
ON_ONE = frozenset(
    (
        "test_churn.py",
        "test_crashes.py",
        "test_overview_sum.py",
        "test_processes.py",
        "test_tuning.py",
    )
)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on both loops, and long ones that gain nothing from it on production's."""
    return {"uvloop": LOOPS["uvloop"]} if item.path.name in ON_ONE else LOOPS


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    """A router in front of two stock engines."""
    async with open_stand(FakeSettings(), FakeSettings()) as opened:
        yield opened


@pytest.fixture
async def single() -> AsyncIterator[Stand]:
    """A router in front of one stock engine."""
    async with open_stand() as opened:
        yield opened
