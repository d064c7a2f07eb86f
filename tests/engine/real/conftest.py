"""Real engines on the CPU, one after the other, in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import cpu_worker
from tests.engine.real.engines import RealEngine

CACHE = Path(__file__).resolve().parents[3] / ".cache"
Start = Callable[..., RealEngine]


@pytest.fixture(scope="session")
def model() -> str:
    """Return the folder of a model of two small layers, built once per checkout."""
    folder = CACHE / "tiny-model-e2e"
    make = [sys.executable, "-m", "hexgen_vllm.testing.tiny_model", str(folder)]
    subprocess.run([*make, "--hidden=128", "--layers=2"], check=True, capture_output=True)
    return str(folder)


@pytest.fixture(scope="module")
def start(model: str) -> Iterator[Start]:
    """Start an engine, ``start(UrgencyScheduler, max_num_seqs=2)``, and end the one before."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    cpu_worker.allow_async(patch)
    cpu_worker.allow_many(patch)
    engines: list[RealEngine] = []

    def begin(scheduler_class: type | None = None, **args: Any) -> RealEngine:
        while engines:
            engines.pop().close()
        engines.append(RealEngine(model, scheduler_class, **{"async_scheduling": False, **args}))
        return engines[-1]

    yield begin
    while engines:
        engines.pop().close()
    patch.undo()
