"""What vLLM does around a preemption, in which order; fails when a version moves it.

Saves must see the blocks of a victim before anything of the step writes them. Model Runner V1
asks us first. V2 zeroes new blocks and copies shared ones before: neither happens with the caches
that we take, and saves are dropped should it.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import vllm

from hexgen_vllm.engine.swap.connector import WRITTEN_BEFORE_SAVES
from tests.engine.nomodel.harness import expected
from tests.engine.nomodel.swap_harness import SwapEngine
from tests.engine.nomodel.test_exact import Load
from tests.engine.nomodel.test_swap_phases import LAZY, PROMPT, URGENT, WRITES

WORKERS = Path(vllm.__file__).parent / "v1" / "worker"
V1 = WORKERS / "gpu_model_runner.py"
V2 = WORKERS / "gpu" / "model_runner.py"
V2_CONNECTOR = WORKERS / "gpu" / "kv_connector.py"


def method(path: Path, owner: str, name: str) -> ast.FunctionDef:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    return part
    raise AssertionError(f"{path.name} has no {owner}.{name}")


def first_calls(function: ast.FunctionDef, *names: str) -> list[str]:
    """Return ``names`` that ``function`` calls, in the order of their first call."""
    lines: dict[str, tuple[int, int]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in names:
                at = (node.lineno, node.col_offset)
                lines[name] = min(at, lines.get(name, at))
    return sorted(lines, key=lambda name: lines[name])


def users_of(path: Path, field: str) -> set[str]:
    """Return the functions of a file that read a field of the step."""
    return {
        function.name
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == field
    }


def test_model_runner_v1_saves_before_anything_else() -> None:
    step = method(V1, "GPUModelRunner", "execute_model")
    order = ["handle_preemptions", "_update_states", "_prepare_inputs", "_model_forward"]
    assert first_calls(step, *reversed(order)) == order
    for field in WRITTEN_BEFORE_SAVES:
        assert users_of(V1, field) <= {"_update_states"}


def test_model_runner_v2_saves_after_zeroing_and_copying_and_before_all_else() -> None:
    step = method(V2, "GPUModelRunner", "execute_model")
    assert first_calls(step, "pre_forward", "update_requests") == ["update_requests", "pre_forward"]
    for field in WRITTEN_BEFORE_SAVES:
        assert users_of(V2, field) == {"update_requests"}
    connector = method(V2_CONNECTOR, "ActiveKVConnector", "pre_forward")
    order = ["handle_preemptions", "bind_connector_metadata"]
    assert first_calls(connector, *reversed(order)) == order
    loads = ("start_load_kv", "_start_load_kv")
    assert first_calls(connector, "handle_preemptions", *loads)[0] == "handle_preemptions"


@pytest.mark.parametrize("v2_runner", [False, True])
def test_steps_write_no_block_before_saves(folder: Path, v2_runner: bool) -> None:
    engine = SwapEngine(folder, async_scheduling=True, v2_runner=v2_runner)
    written: list[Any] = []
    schedule = engine.scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        written.extend(getattr(output, name, None) for name in WRITTEN_BEFORE_SAVES)
        return output

    engine.scheduler.schedule = watched
    load = Load(engine, 1)
    load.play()
    load.check()
    assert engine.host_kv()["saved_tokens"] > 0
    assert not any(written)


@pytest.mark.parametrize("field", WRITTEN_BEFORE_SAVES)
def test_blocks_written_before_are_not_saved(folder: Path, field: str) -> None:
    engine = SwapEngine(folder, max_num_seqs=1)
    build = engine.scheduler.connector.build_connector_meta

    def written(output: Any) -> Any:
        setattr(output, field, [1])
        meta = build(output)
        assert not meta.saves
        setattr(output, field, None)
        return meta

    engine.scheduler.connector.build_connector_meta = written
    engine.add("lazy", PROMPT, WRITES, LAZY)
    engine.steps(8)
    engine.add("urgent", [3] * 40, 12, URGENT)
    engine.run()
    engine.assert_clean()
    assert engine.displaced() == 1
    assert engine.host_kv()["dropped_tokens"].keys() == {"overwritten"}
    assert engine.tokens["lazy"] == expected(PROMPT, WRITES)
