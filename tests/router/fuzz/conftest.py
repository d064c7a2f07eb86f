"""One router for all examples of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.router.fuzz.live import Live


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A router in front of a scripted engine."""
    opened = Live(max_payload_size=100_000)
    opened.start()
    yield opened
    opened.stop()
