"""The public names: sorted, all there, and loaded only when they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import hexgen_vllm

HEAVY = ("vllm", "torch", "triton", "transformers", "aiohttp", "numpy", "openai", "matplotlib")


def in_new_process(code: str) -> Any:
    """Run ``code`` in a fresh interpreter and return the JSON value that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_is_sorted_and_complete() -> None:
    assert list(hexgen_vllm.__all__) == sorted(set(hexgen_vllm.__all__))
    assert dir(hexgen_vllm) == list(hexgen_vllm.__all__)


@pytest.mark.parametrize("name", [n for n in hexgen_vllm.__all__ if n != "UrgencyScheduler"])
def test_every_name_can_be_had_without_an_engine(name: str) -> None:
    assert getattr(hexgen_vllm, name) is not None


@pytest.mark.engine
def test_the_scheduler_can_be_had_and_subclasses_vllms() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    # AsyncScheduler comes in where vLLM would take it: only the configuration tells.
    assert issubclass(hexgen_vllm.UrgencyScheduler, Scheduler)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        hexgen_vllm.Nonsense  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"""
import json, sys, hexgen_vllm
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    assert in_new_process(code) == []


@pytest.mark.parametrize("module", ["hexgen_vllm.cli", "hexgen_vllm.router", "hexgen_vllm.client"])
def test_nothing_outside_the_engine_loads_vllm_or_torch(module: str) -> None:
    code = f"""
import json, sys, {module}
print(json.dumps([name for name in ("vllm", "torch", "triton") if name in sys.modules]))
"""
    assert in_new_process(code) == []
