"""What became of workflows, how much time open calls have, and names that are told apart."""

from __future__ import annotations

import pytest

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.marginal_cost import FIRST
from hexgen_vllm.policy.workflow import WorkflowRun
from hexgen_vllm.router.metrics import by_workflow, margins
from hexgen_vllm.router.observe.ledger import (
    MAX_TYPES,
    OTHER,
    PERIOD_S,
    PERIODS,
    BoundedNames,
    Outcomes,
)
from hexgen_vllm.types import Call, EngineReport, EngineSpec, StepCost

COST = StepCost(c0=0.1, c1=0.0, c2=0.0, p0=0.0, p1=0.01, p2=0.0)  # 0.1 s a step, 100 tokens/s


def run(at_s: float, deadline_s: float, kind: str = "t", *, failed: bool = False) -> WorkflowRun:
    return WorkflowRun("w", kind, 0.0, deadline_s, last_seen_s=at_s, failed=failed)


def test_a_workflow_is_judged_by_its_last_call() -> None:
    book = Outcomes()
    for one in (run(5.0, 5.0), run(5.1, 5.0), run(1.0, 5.0, failed=True)):
        book.add(one)
    assert book.ended == {("t", "on-time"): 1, ("t", "late"): 1, ("t", "failed"): 1}
    assert book.periods(6.0)[-1] == {"on-time": 1, "late": 1, "failed": 1}
    assert sum(book.periods(6.0)[-2].values()) == 0


def test_only_recent_periods_are_kept() -> None:
    book = Outcomes()
    for i in range(3 * PERIODS):
        book.add(run(i * PERIOD_S, 1e9))
    now = (3 * PERIODS - 1) * PERIOD_S
    assert [p["on-time"] for p in book.periods(now)] == [1] * PERIODS
    assert book.types(now) == {"t": {"on-time": PERIODS, "late": 0, "failed": 0}}
    assert len(book._periods) <= PERIODS + 1
    book.add(run(0.0, 1e9))  # one that was silent for long
    assert book.ended["t", "on-time"] == 3 * PERIODS + 1
    assert 0 not in book._periods
    assert sum(p["on-time"] for p in book.periods(now + 10 * PERIODS * PERIOD_S)) == 0


def test_types_beyond_the_first_are_one() -> None:
    book = Outcomes()
    for i in range(MAX_TYPES + 5):
        book.add(run(1.0, 2.0, f"t{i}"))
    assert len(book.ended) == MAX_TYPES + 1
    assert book.ended[OTHER, "on-time"] == 5
    name = BoundedNames(1, lambda _: None)
    assert [name(n) for n in ("a", "b", "a")] == ["a", OTHER, "a"]


def fleet(**options: object) -> Coordinator:
    """Return one engine of one slot, where prefill and decode take known times."""
    coordinator = Coordinator(DispatchOptions(policy="slack", hold_depth=0, **options))  # type: ignore[arg-type]
    coordinator.engine_joined(EngineSpec("e", max_num_seqs=1), 0.0)
    coordinator.engine_reported("e", EngineReport(cost=COST))
    return coordinator


def call(name: str, deadline_s: float, workflow: str = "") -> Call:
    return Call(
        name, workflow or name, 0.0, prompt_tokens=100, deadline_s=deadline_s,
        expected_output_tokens=10, final=True,
    )  # fmt: skip


def test_slack_is_what_remains_after_the_call() -> None:
    """Both calls take 1 s of prefill and 1 s of decoding; to join a batch takes steps of 0.1 s."""
    coordinator = fleet()
    placed = 3.0 - FIRST * 0.1
    for one in (call("placed", 5.0), call("held", 9.0)):
        coordinator.call_arrived(one, 0.0)
    assert coordinator.held == 1
    for now, placed_s in ((0.0, placed), (1.0, placed), (4.0, 1.0)):
        found = {m.entry.demand.call.call_id: m.slack_s for m in margins(coordinator, now)}
        assert found["placed"] == pytest.approx(placed_s), "until it runs longer than predicted"
        assert found["held"] == pytest.approx(7.0 - now)


def test_the_worst_call_stands_for_its_workflow() -> None:
    coordinator = fleet()
    for one in (call("a", 30.0, "w1"), call("b", 2.1, "w2"), call("c", 30.0, "w1")):
        coordinator.call_arrived(one, 0.0)
    worst = by_workflow(margins(coordinator, 0.0))
    assert [(m.entry.run.workflow_id, m.at_risk) for m in worst] == [("w2", True), ("w1", False)]


def test_demoted_workflows_are_at_risk_too() -> None:
    coordinator = fleet(overload="protect", reject_at_entry=False)
    for one in (call("a", 30.0), call("b", 0.5)):
        coordinator.call_arrived(one, 0.0)
    (worst, _) = by_workflow(margins(coordinator, 0.0))
    assert worst.entry.run.background
    assert worst.slack_s == pytest.approx(-1.5)
    assert worst.at_risk
