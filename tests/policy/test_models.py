"""Several models behind one coordinator: each is placed, queued and predicted for by itself."""

from __future__ import annotations

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.types import (
    Call,
    CallResult,
    Decision,
    EngineKind,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    Rejection,
    StepCost,
)

FAST = StepCost(0.01, 0.0005, 0.0, 0.0, 1 / 8000, 0.0)


def spec(name: str, *models: str) -> EngineSpec:
    return EngineSpec(name, frozenset(models), EngineKind.HEXGEN, max_num_seqs=2, kv_tokens=10_000)


def coordinator(**options: object) -> Coordinator:
    """Return one with a fast engine for ``small`` and one a hundred times slower for ``large``."""
    c = Coordinator(DispatchOptions(policy="slack", hold_depth=0, **options))  # type: ignore[arg-type]
    for name, model, slower in (("s", "small", 1), ("l", "large", 100)):
        c.engine_joined(spec(name, model, f"{model}-lora"), 0.0)
        c.engine_reported(name, EngineReport(cost=FAST.scaled(slower)))
    return c


def call(name: str, model: str, due_s: float = 60.0, **more: object) -> Call:
    return Call(name, f"wf-{name}", 0.0, 100, model=model, deadline_s=due_s, **more)  # type: ignore[arg-type]


def placed(decisions: list[Decision]) -> dict[str, str]:
    return {d.call_id: d.engine_id for d in decisions if isinstance(d, Placement)}


@pytest.mark.parametrize("background_share", [0.0, 1.0])
def test_calls_that_wait_for_a_full_model_do_not_hold_up_another(background_share: float) -> None:
    """However many they are, and however urgent."""
    c = coordinator(background_share=background_share)
    for i in range(100):
        c.call_arrived(call(f"a{i}", "small", due_s=1.0 + i), 0.0)
    assert c.held == 98
    assert placed(c.call_arrived(call("b", "large", due_s=1e6), 0.0)) == {"b": "l"}
    assert placed(c.call_arrived(call("b2", "large-lora", due_s=1e6), 0.0)) == {"b2": "l"}
    assert placed(c.call_arrived(call("b3", "large", due_s=1e6), 0.0)) == {}
    assert placed(c.call_finished("a0", CallResult(True, output_tokens=3), 0.1)) == {"a2": "s"}
    assert placed(c.call_finished("b", CallResult(True, output_tokens=3), 0.2)) == {"b3": "l"}


def test_calls_that_wait_for_a_model_that_is_gone_are_refused_at_once() -> None:
    c = coordinator()
    for i in range(50):
        c.call_arrived(call(f"a{i}", "small", due_s=1.0 + i), 0.0)
    for i in range(3):
        c.call_arrived(call(f"b{i}", "large", due_s=1e6), 0.0)
    decisions = c.engine_changed("l", EngineState.DOWN, 1.0)
    assert [(d.call_id, d.reason) for d in decisions if isinstance(d, Rejection)] == [
        ("b2", "rejected-no-endpoints")
    ]


def test_a_model_that_an_engine_learns_is_placed_there() -> None:
    c = coordinator()
    assert not placed(c.call_arrived(call("x", "new"), 0.0))
    c.engine_serves("s", frozenset({"small", "new"}), 1.0)
    assert placed(c.call_arrived(call("y", "new"), 1.0)) == {"y": "s"}
    cost = c.engines["s"].cost()
    assert cost == FAST, "nothing else is forgotten"
    c.call_arrived(call("z", "new"), 1.0)
    c.call_arrived(call("held", "new"), 1.0)
    assert c.held == 1
    c.engine_reported("l", EngineReport(cost=FAST))
    decisions = c.engine_serves("l", frozenset({"large", "new"}), 2.0)
    assert placed(decisions) == {"held": "l"}


def test_what_follows_a_call_is_timed_on_engines_of_its_model() -> None:
    c = coordinator()
    for model in ("small", "large"):
        more = {"stages_left": 2, "expected_output_tokens": 100}
        c.call_arrived(call(f"{model}-call", model, 1e6, **more), 0.0)
    tails = {d.call_id: d.tail_s for _, d in c.log if isinstance(d, Placement)}
    assert tails["large-call"] > 50 * tails["small-call"]
