"""What every test shares: a quiet, offline environment, and no GPU test without a GPU."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two busy cores make any time limit a coin toss; the number of examples bounds the work.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
for name, value in QUIET.items():  # at import: libraries read some of these only once
    os.environ.setdefault(name, value)


FOLDERS = Path(__file__).parent
ENGINES = ("engine/nomodel", "engine/real", "engine/swap")
MARKS = re.compile(r"^pytestmark = (.*)$", re.M)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import files of which no test is to run: vLLM alone takes half a minute."""
    wanted = config.option.markexpr
    if " or " in wanted:
        return None
    unwanted = set(re.findall(r"\bnot (\w+)", wanted))
    if collection_path.is_dir():
        inside = collection_path.is_relative_to(FOLDERS)
        here = collection_path.relative_to(FOLDERS).as_posix() if inside else ""
        return True if "engine" in unwanted and here in ENGINES else None
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    marks = MARKS.search(collection_path.read_text(encoding="utf-8"))
    names = set(re.findall(r"mark\.(\w+)", marks[1])) if marks else set()
    return True if names & unwanted else None


def has_gpu() -> bool:
    """Tell whether an NVIDIA GPU can be used, without loading torch where there is none."""
    if shutil.which("nvidia-smi") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(FOLDERS / folder in item.path.parents for folder in ENGINES):
            item.add_marker(pytest.mark.engine)
        if FOLDERS / "engine/real" in item.path.parents:
            item.add_marker(pytest.mark.slow)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not has_gpu():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
