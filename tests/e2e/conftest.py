"""What the tests with real servers share: one tiny model and one process that has vLLM loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.forkserver import ForkServer

CACHE = Path(__file__).resolve().parents[2] / ".cache"


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """Return the folder of a model of two small layers, built once per checkout."""
    folder = CACHE / "tiny-model-e2e"
    make = [sys.executable, "-m", "hexgen_vllm.testing.tiny_model", str(folder)]
    subprocess.run([*make, "--hidden=128", "--layers=2"], check=True, capture_output=True)
    return str(folder)


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Return a starter of vLLM programs that takes seconds."""
    with ForkServer() as server:
        yield server
