"""Kernels under test: libraries built apart from the user's, Triton as the machine allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _native_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries built on first use go to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEXGEN_CACHE_DIR", str(tmp_path_factory.mktemp("native")))
        yield


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton kernels run in Triton's interpreter, on host tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
