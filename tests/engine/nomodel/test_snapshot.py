"""What a scheduler says of itself is true, plain JSON, and complete in Prometheus' format."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pytest
from vllm.v1.engine import core_client
from vllm.v1.engine.core import EngineCore

from hexgen_vllm.engine.server.middleware import exposition
from hexgen_vllm.types import StepCost
from tests.engine.nomodel.conftest import Build
from tests.engine.nomodel.harness import FakeEngine


def busy(engine: FakeEngine) -> FakeEngine:
    """Let twelve calls come, none of which ends."""
    for i in range(12):
        engine.add(f"r{i}", [10 + i] * 40, 40)
        engine.steps(3)
    return engine


def test_snapshot_is_plain_json_and_says_what_happened(build: Build) -> None:
    engine = build(blocks=24, max_num_seqs=4)
    fresh = engine.scheduler.hexgen_stats()
    assert (fresh["cost"], fresh["fit_error"], fresh["prefill_share"]) == (None, None, None)
    stats = busy(engine).scheduler.hexgen_stats()
    assert json.loads(json.dumps(stats)) == stats
    assert stats["running"] + stats["waiting"] == sum(stats["slack_counts"])
    assert stats["running"] == len(engine.scheduler.running) > 0
    assert 0 < stats["kv_usage"] <= 1
    assert (stats["kv_tokens"], stats["max_num_seqs"], stats["order"]) == (24 * 16, 4, "due")
    assert set(stats["cost"]) == {"c0", "c1", "c2", "p0", "p1", "p2"}
    chunk_s = StepCost(**stats["cost"]).prefill_s(40)
    assert chunk_s == pytest.approx(0.0005 + 40 / 8000, rel=0.05)
    assert stats["fit_error"] < 0.05


def test_recomputed_tokens_are_those_computed_twice(build: Build) -> None:
    engine = build(blocks=24, prefix_caching=False)
    for i in range(12):
        engine.add(f"r{i}", [10 + i] * 40, 40)
    engine.run()
    stats = engine.scheduler.hexgen_stats()
    assert stats["preemptions"]["kv"] > 0
    once = 12 * (40 + 40 - 1)
    assert stats["recomputed_tokens"] == engine.worker.computed_tokens - once


def test_exposition_shows_the_snapshot(build: Build) -> None:
    stats = busy(build()).scheduler.hexgen_stats()
    lines = exposition(stats).splitlines()
    assert f"hexgen_vllm_running {stats['running']}" in lines
    assert f'hexgen_vllm_step_cost{{coefficient="p1"}} {stats["cost"]["p1"]}' in lines
    assert 'hexgen_vllm_slack_calls{le="+Inf"} 12' in lines
    assert 'hexgen_vllm_info{order="due"} 1' in lines


def test_exposition_leaves_out_what_is_not_known(build: Build) -> None:
    text = exposition(build().scheduler.hexgen_stats())
    assert "step_cost" not in text
    assert "hexgen_vllm_waiting 0" in text.splitlines()


def test_the_engine_core_answers_without_the_plugin(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``--scheduler-cls`` alone, where ``$VLLM_PLUGINS`` leaves plugins out."""
    monkeypatch.delattr(EngineCore, "hexgen_stats", raising=False)
    core = SimpleNamespace(scheduler=build().scheduler)
    assert EngineCore.hexgen_stats(core)["order"] == "due"  # type: ignore[attr-defined]


def test_the_engines_client_can_ask_each_rank() -> None:
    asked = inspect.signature(core_client.AsyncMPClient._call_utility_async)
    assert list(asked.parameters) == ["self", "method", "args", "engine"]
    assert "self.core_engines" in inspect.getsource(core_client)
