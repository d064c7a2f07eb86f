"""A DNS server, and routers that find their engines there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.router.engines.discovery.dns_server import DnsServer, dns_server


@pytest.fixture
async def dns() -> AsyncIterator[DnsServer]:
    """A DNS server on 127.0.0.1."""
    async with dns_server() as server:
        yield server
