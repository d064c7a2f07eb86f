"""On a real engine: overtaking, displacing, and vLLM's features under displacement."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from hexgen_vllm.engine.scheduler import UrgencyScheduler
from hexgen_vllm.wire import CallMeta
from tests.engine.real.conftest import Start
from tests.engine.real.engines import RealEngine

URGENT = CallMeta(workflow_deadline_ms=100.0)
LAZY = CallMeta(workflow_deadline_ms=1_000_000.0)


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_late_urgent_call_displaces_when_every_slot_is_taken(
    start: Start, async_scheduling: bool
) -> None:
    engine = start(UrgencyScheduler, max_num_seqs=2, async_scheduling=async_scheduling)
    for i in range(4):
        engine.add(f"slow{i}", [10 + i] * 40, 60, LAZY)
    engine.steps(5)
    assert sorted(engine.running()) == ["slow0", "slow1"]
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.step()
    assert "urgent" in engine.running()
    engine.run()
    assert engine.ended[0] == "urgent"
    assert engine.scheduler.hexgen_stats()["preemptions"]["displaced"] == 1
    engine.assert_clean()


def test_a_late_urgent_call_displaces_when_no_kv_is_free(start: Start) -> None:
    few = {"num_gpu_blocks_override": 9, "max_model_len": 256}
    engine = start(UrgencyScheduler, enable_prefix_caching=False, **few)
    for i in range(3):
        engine.add(f"slow{i}", [10 + i] * 60, 60, LAZY)
    engine.steps(5)
    engine.add("urgent", [99] * 100, 10, URGENT)
    engine.steps(2)
    assert "urgent" in engine.running()
    engine.run()
    assert engine.ended[0] == "urgent"
    assert engine.scheduler.hexgen_stats()["preemptions"]["displaced"] >= 1
    engine.assert_clean()


def test_without_displacement_an_urgent_call_still_overtakes(start: Start) -> None:
    options = {"hexgen": {"displace": False}}
    engine = start(UrgencyScheduler, max_num_seqs=2, additional_config=options)
    for i in range(6):
        engine.add(f"slow{i}", [10 + i] * 40, 30, LAZY)
    engine.steps(5)
    engine.add("urgent", [99] * 40, 10, URGENT)
    engine.run()
    assert engine.ended.index("urgent") == 2
    assert engine.scheduler.hexgen_stats()["preemptions"]["displaced"] == 0


REGEX = StructuredOutputsParams(regex=r"SELECT [a-h]{5,30} FROM [a-h]{3,20}")
FEATURES: dict[str, dict[str, Any]] = {
    "structured-output": {},
    "speculation": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
}


def play(engine: RealEngine, feature: str) -> None:
    """Forty calls with tight KV; half of them use the feature, urgent ones come in between."""
    for i in range(40):
        structured = feature == "structured-output" and i % 2 == 0
        params = {"structured_outputs": REGEX, "ignore_eos": False} if structured else {}
        prompt = [10 + i % 7, 20 + i, 30] * (5 + i % 20)
        engine.add(f"r{i}", prompt, 40, URGENT if i % 5 == 4 else LAZY, **params)
        engine.steps(2)
    engine.run()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_exact_under_displacement(start: Start, feature: str) -> None:
    more = FEATURES[feature]
    stock = start(num_gpu_blocks_override=2000, **more)
    play(stock, feature)
    options = {"hexgen": {"displace_late_s": 1e6}}
    engine = start(UrgencyScheduler, num_gpu_blocks_override=18, additional_config=options, **more)
    play(engine, feature)
    assert engine.tokens == stock.tokens
    assert engine.reasons == stock.reasons
    preemptions = engine.scheduler.hexgen_stats()["preemptions"]
    assert preemptions["displaced"] > 0
    assert preemptions["kv"] > 0
    engine.assert_clean()
