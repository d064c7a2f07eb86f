"""The three databases of the example, built once, and a server that answers as it is told to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from examples.text2sql.databases import build_all
from examples.text2sql.main import opened
from hexgen_vllm.text2sql.database import Database
from tests.text2sql import shops
from tests.text2sql.postgres_server import HINT, programs, running
from tests.text2sql.scripted import Scripted


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the files of the databases by name."""
    return build_all(tmp_path_factory.mktemp("databases"))


@pytest.fixture(scope="session")
def databases(paths: Mapping[str, Path]) -> Iterator[Mapping[str, Database]]:
    """Yield the databases by name."""
    with opened(paths) as found:
        yield found


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    """Yield a running server without answers."""
    async with Scripted() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Yield the URL of a server with the shop for music, as its superuser.

    Without PostgreSQL its tests fail in CI, and are skipped elsewhere.
    """
    if programs() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(HINT)
    with running() as url:
        shops.build_postgres(url)
        yield url
