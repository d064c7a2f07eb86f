"""The three databases, built once, and a server that answers as it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from examples.text2sql.databases import build_all
from tests.examples.scripted import Scripted


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the files of the databases by name."""
    return build_all(tmp_path_factory.mktemp("databases"))


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    """Yield a running server without answers."""
    async with Scripted() as server:
        yield server
