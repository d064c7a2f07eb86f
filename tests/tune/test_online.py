"""When a running router is tuned, and what becomes of a proposal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hexgen_vllm.recent import RecentCall, RecentWorkflow
from hexgen_vllm.tune.online import (
    Action,
    OnlineOptions,
    OnlineTuner,
    Proposal,
    TuningPhase,
)
from hexgen_vllm.tune.traffic import Live, Traffic, blocks, live_loss, traffic

STEADY = Traffic(rate_per_s=1.0, calls=20.0, prompt_tokens=50_000, output_tokens=2_000)
BUSIER = replace(STEADY, rate_per_s=1.5)
PRESENT = {"alpha": 0.2}
BETTER = Proposal({"alpha": 0.5}, loss=80.0, present_loss=100.0, spread=2.0)
LIVE = Live(loss=102.0, spread=3.0)


def tuner(mode: str = "auto") -> OnlineTuner:
    options = OnlineOptions(tune=mode, tune_period_s=1000.0, tune_least_s=100.0, tune_workflows=50)
    return OnlineTuner(options, PRESENT, now=0.0)


def searching(mode: str = "auto") -> OnlineTuner:
    found = tuner(mode)
    found.search_started(STEADY, "first", 200.0)
    return found


def test_a_search_waits_for_evidence_and_for_its_turn() -> None:
    one = tuner()
    assert one.due(STEADY, 49, 200.0) is None
    assert one.due(STEADY, 50, 99.0) is None
    assert one.due(None, 50, 200.0) is None
    assert one.due(STEADY, 50, 200.0) == "first"
    assert tuner("off").due(STEADY, 50, 200.0) is None


def test_later_searches_start_on_drift_or_after_the_period() -> None:
    one = searching()
    assert one.due(BUSIER, 99, 10_000.0) is None  # one at a time
    one.search_failed("no fleet", 300.0)
    assert one.due(STEADY, 99, 500.0) is None
    assert one.due(BUSIER, 99, 350.0) is None
    assert one.due(BUSIER, 99, 500.0) == "drift"
    assert one.due(STEADY, 99, 1300.0) == "period"


def test_a_convincing_gain_is_applied() -> None:
    one = searching()
    assert one.proposed(BETTER, LIVE, workflows=60, now=250.0) is Action.APPLY
    assert (one.phase, one.values) == (TuningPhase.TRYING, {"alpha": 0.5})
    assert one.simulator_error == pytest.approx(1 - 100 / 102)


@pytest.mark.parametrize(
    ("proposal", "live", "why"),
    [
        (replace(BETTER, spread=10.0), LIVE, "spread"),
        (replace(BETTER, spread=math.inf), LIVE, "spread"),
        (BETTER, Live(150.0, 1.0), "simulator"),
        (BETTER, Live(math.nan, math.inf), "simulator"),
        (replace(BETTER, values=PRESENT), LIVE, "nothing better"),
    ],
)
def test_a_doubtful_gain_is_not(proposal: Proposal, live: Live, why: str) -> None:
    one = searching()
    assert one.proposed(proposal, live, workflows=60, now=250.0) is Action.NOTHING
    assert (one.phase, one.values) == (TuningPhase.WATCHING, PRESENT)
    assert why in one.history[-1].why


def test_suggest_only_suggests() -> None:
    one = searching("suggest")
    assert one.proposed(BETTER, LIVE, workflows=60, now=250.0) is Action.NOTHING
    assert (one.values, one.suggested) == (PRESENT, {"alpha": 0.5})


def test_a_worse_live_result_is_reverted() -> None:
    one = searching()
    one.proposed(BETTER, LIVE, workflows=60, now=250.0)
    assert one.judge(Live(500.0, 1.0), workflows=109, now=300.0) is Action.NOTHING  # too early
    assert one.judge(Live(120.0, 3.0), workflows=110, now=300.0) is Action.REVERT
    assert (one.phase, one.values) == (TuningPhase.WATCHING, PRESENT)


@pytest.mark.parametrize("loss", [80.0, 102.0, 109.0])  # 109 is within the spread of both
def test_a_live_result_that_is_not_worse_stays(loss: float) -> None:
    one = searching()
    one.proposed(BETTER, LIVE, workflows=60, now=250.0)
    assert one.judge(Live(loss, 3.0), workflows=110, now=300.0) is Action.NOTHING
    assert one.values == {"alpha": 0.5}
    assert [event.what for event in one.history] == ["search", "apply", "confirm"]


def test_a_change_that_cannot_be_judged_is_reverted() -> None:
    one = searching()
    one.proposed(BETTER, LIVE, workflows=60, now=250.0)
    assert one.judge(Live(math.nan, math.inf), workflows=110, now=300.0) is Action.REVERT


def test_the_history_is_bounded_and_counted() -> None:
    one = tuner()
    for index in range(300):
        one.search_started(STEADY, "period", float(index))
        one.search_failed("x", float(index))
    assert len(one.state(300.0)["history"]) == 100
    assert one.counts == {"search": 300, "failed": 300}


def test_traffic_and_live_loss() -> None:
    calls = (RecentCall("a", 0.0, 1.0, 100, 10), RecentCall("b", 1.0, 1.0, 300, 30))
    seen = [RecentWorkflow("x", 2.0 * i, calls) for i in range(20)]
    assert traffic(seen) == Traffic(0.5, 2.0, 400.0, 40.0)
    assert traffic(seen[:1]) is None
    assert sum(map(len, blocks(seen))) == 20
    assert blocks([]) == []
    assert live_loss([1.0, 3.0]) == Live(2.0, 1.0)
    assert live_loss([1.0, math.inf]).spread == math.inf
