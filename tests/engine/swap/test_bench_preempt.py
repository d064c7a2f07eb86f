"""``bench preempt`` and ``bench react`` on small loads: the figures of a sane engine are there."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import preempt, preempt_load
from hexgen_vllm.testing.tiny_model import TinySpec, build

SMALL = [
    *("--in-flight", "6", "--workflows", "8", "--prompt", "60", "120", "--output", "40", "90"),
    *("--contexts", "64", "192", "--repeats", "1", "--host-kv-gib", "0.1"),
]


pytestmark = pytest.mark.timeout(600)


def bench(*arguments: str, what: str = "preempt") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hexgen_vllm.cli", "bench", what, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    model = build(folder / "tiny", TinySpec(hidden=64, layers=2))
    done = bench(*SMALL, "--model", str(model), "--json", str(folder / "out" / "preempt.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(mode in done.stdout for mode in ("recompute", "swap", "auto"))
    found: dict[str, Any] = json.loads((folder / "out" / "preempt.json").read_text())
    return found


def test_every_mode_writes_the_same_and_leaks_nothing(figures: dict[str, Any]) -> None:
    modes = {"recompute", "swap", "auto"}
    for key in ("restored_fraction", "tokens_identical", "leaked_blocks", "resume_ms"):
        assert figures[key].keys() == modes
    assert all(figures["tokens_identical"].values())
    assert not any(figures["leaked_blocks"].values())
    assert all(ms > 0 for ms in figures["resume_ms"].values())


def test_copies_take_the_place_of_computing(figures: dict[str, Any]) -> None:
    assert figures["restored_fraction"]["recompute"] == 0
    assert figures["restored_fraction"]["swap"] >= 0.9
    assert figures["recomputed_tokens"]["recompute"] > 100
    assert figures["modes"]["swap"]["host_kv"]["used_bytes"] == 0
    assert figures["modes"]["recompute"]["host_kv"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cuda"], "--device cuda: this vLLM runs on cpu."),
        (["--in-flight", "0"], "--in-flight is too small."),
        (["--output", "9", "3"], "--output: 9 is more than 3."),
        (["--host-kv-gib", "0"], "--host-kv-gib must be more than 0."),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"hexgen-vllm bench preempt: {sentence}"


def row(stages: int, mib: float, mode: str, computed: int, again: int) -> dict[str, Any]:
    times = {"2048": 7.5} if mode == "auto" and stages == 1 and mib == 1024 else {}
    return {
        "stages": stages,
        "host_mib": mib,
        "mode": mode,
        "computed_tokens": computed,
        "recomputed_tokens": again,
        "resume_ms": 7.5 if times else None,
        "resume_ms_by_context": times,
    }


def test_the_comparison_is_with_the_best_of_the_others() -> None:
    in_tree = ("offloading", "simple")
    rows = [row(1, 1024, "recompute", 900, 500)]
    for stages, mib in ((1, 1024), (1, 16), (5, 1024), (5, 16)):
        rows.append(row(stages, mib, "auto", 90 * stages, 3))
        rows.append(row(stages, mib, "offloading", 100 * stages, 60))
        rows.append(row(stages, mib, "simple", 120 * stages, 50))
    assert preempt._headline(rows, in_tree) == {
        "five_calls_over_best_in_tree": 0.9,
        "recomputed_over_best_in_tree_16mib": 0.06,
        "resume_ms_2048": 7.5,
    }


def test_tools_take_as_long_as_those_of_public_traces() -> None:
    rng = random.Random(0)
    times = [preempt_load.think_s(rng) for _ in range(20_000)]
    for limit_s, share in ((1.0, 0.86), (10.0, 0.95)):
        assert sum(t < limit_s for t in times) / len(times) == pytest.approx(share, abs=0.01)


def test_agents_find_what_their_turns_left(tmp_path: Path) -> None:
    model = build(tmp_path / "tiny", TinySpec(hidden=64, layers=2))
    load = ["--in-flight", "6", "--workflows", "6", "--turns", "6", "--output", "6", "12"]
    done = bench(*load, "--model", str(model), "--json", str(tmp_path / "react.json"), what="react")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "react.json").read_text())
    # What is simulated follows the costs that were measured here, on a machine that may be busy.
    for side, most in ((found["modes"], 0.7), (found["simulated"], 0.9)):
        ours = side["ours"]["prefill_tokens"]
        assert ours < most * side["stock"]["prefill_tokens"] <= most * found["prompt_tokens"]
        assert ours < most * side["no host"]["prefill_tokens"]
    assert found["prefill_stock_over_ours"] > 1.4
    assert found["prefill_stock_over_ours_simulated"] > 1.1
    assert found["on_time_fraction"].keys() == {"stock", "LRU", "no host", "ours"}
