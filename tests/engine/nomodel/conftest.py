"""Engines without a model, built on vLLM's own scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.headless import Setup
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from tests.engine.nomodel.harness import FakeEngine

Build = Callable[..., FakeEngine]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the made-up model's config file lies."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def build(folder: Path) -> Build:
    """Build an engine: ``build(blocks=24, async_scheduling=True, hexgen={"order": "edf"})``."""

    def make(
        scheduler_class: type = UrgencyScheduler,
        *,
        hexgen: dict[str, Any] | None = None,
        **setup: Any,
    ) -> FakeEngine:
        setup.setdefault("blocks", 200)
        if hexgen is not None:
            setup["additional"] = {"hexgen": hexgen}
        return FakeEngine(scheduler_class, folder, Setup(**setup))

    return make
