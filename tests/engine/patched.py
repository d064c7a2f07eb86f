"""vLLM's classes with our patch: a copy of the sources is patched, and its methods put in place."""

from __future__ import annotations

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.sched.scheduler import Scheduler

from hexgen_vllm.engine.swap.connector import HOOK
from hexgen_vllm.patch.tree import Tree, installed

SCHEDULER = "vllm/v1/core/sched/scheduler.py"
BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"


def copy_sources(folder: Path) -> Tree:
    """Copy the files that matter, of the vLLM under test; the installed ones are left alone."""
    for name in (SCHEDULER, BASE, "vllm/_version.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed().parent / name, folder / name)
    return Tree(folder / "vllm")


def put_in_place(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the copy, and let vLLM's classes have the methods that differ."""
    for patch in tree.patches():
        tree.apply(patch)
    for owner, path, name in (
        (Scheduler, SCHEDULER, "_preempt_request"),
        (KVConnectorBase_V1, BASE, HOOK),
    ):
        method = getattr(getattr(_load(tree.package.parent / path), owner.__name__), name)
        monkeypatch.setattr(owner, name, method, raising=False)


def _load(path: Path) -> Any:
    spec = spec_from_file_location(f"patched_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
