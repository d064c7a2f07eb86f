"""The one command for a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
WITHOUT_PLUGINS = """
import sys
for name in ("pytest_asyncio", "vllm", "hypothesis"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def check(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "ENGINES": "3"} | variables
    command = [str(SCRIPT), *arguments, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_fake_run_keeps_the_result_of_each_part(tmp_path: Path) -> None:
    done = check(tmp_path / "out", "--fake")
    assert done.returncode == 0, done.stdout + done.stderr
    races = json.loads((tmp_path / "out" / "races.json").read_text())
    assert (races["engines"], races["wrong"]) == (3, 0)
    rows = {
        row["tokens"]: row
        for row in json.loads((tmp_path / "out" / "stalls.json").read_text())["stalls"]
    }
    assert rows[4096]["save_ms"] <= 2
    assert rows[4096]["save_after_load_ms"] < 0.1
    assert (tmp_path / "out" / "4-races.txt").read_text()


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    done = check(tmp_path / "out", "--fake", ENGINES="none")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("failed: 4-races")
    assert (tmp_path / "out" / "stalls.json").exists()


def test_the_tests_for_a_gpu_are_found_without_vllm_and_plugins() -> None:
    arguments = [*("-c", "/dev/null", "--rootdir", str(ROOT), "--import-mode=importlib")]
    arguments += ["-p", "no:cacheprovider", "--noconftest", "-q", "--collect-only", "-m", "gpu"]
    arguments += [str(ROOT / "tests/kernels/test_gpu.py")]
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGINS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_staging" in found.stdout
