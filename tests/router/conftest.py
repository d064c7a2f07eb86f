"""A router in front of fake engines."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hexgen_vllm.testing.fake_server import FakeSettings
from hexgen_vllm.testing.stand import Stand, open_stand


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
