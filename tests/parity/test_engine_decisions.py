"""The simulated engine decides as vLLM's scheduler: who, how many tokens, who is preempted.

Everything is compared, step by step, over random engines and calls, half of them short of KV.
Three things can differ, and only they may:

1. Two calls that compute the same prefix at the same time. vLLM caches both copies, the simulated
   cache keeps one, so later hits and free blocks can differ by these blocks. It is rare: what a
   step computes can be hit in that very step. Where it does not happen, nothing may differ.
2. The live scheduler re-keys each running call about every 64 steps, the simulated one when keys
   matter. The exact comparisons re-key in every step.
3. The live scheduler prices calls at rates that it fits to its steps, the simulated one at the
   true ones. The exact comparisons price at the assumed rates.

The last test lets all three loose and bounds what they do to latencies and preemptions.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.engine.scheduler import UrgencyScheduler
from tests.parity.of_vllm import of_vllm
from tests.parity.scenarios import draw
from tests.parity.simulated import Log, simulated

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CALLS = 20
GROUPS = 10


class AlwaysFresh(UrgencyScheduler):
    """Prices every running call in every step, at the assumed rates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hexgen_meter.rates = lambda chunk: None

    def _rekey_running(self) -> None:
        for request in self.running:
            self.hexgen_book.price(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def assert_same(seed: int, live: Log, played: Log) -> bool:
    """Return whether the runs are equal; they must be unless a prefix was computed twice."""
    assert live.ends_s.keys() == played.ends_s.keys()
    same = live.decisions() == played.decisions()
    assert same or played.copied, f"scenario {seed} differs without a reason"
    return same


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_stock(folder: Path, policy: str, group: int) -> None:
    order = {"fcfs": "fcfs", "priority": "edf"}[policy]
    seeds = range(group * 20, group * 20 + (20 if policy == "fcfs" else 4))
    equal = preempted = 0
    for seed in seeds:
        scenario = draw(seed, calls=CALLS)
        live = of_vllm(scenario, folder, policy=policy)
        played = simulated(scenario, EngineOptions(order=order), stock=True)
        equal += assert_same(seed, live, played)
        preempted += live.preemptions()
    assert equal >= len(seeds) - 1
    if policy == "fcfs":
        assert preempted > 0, "the scenarios are too easy to tell anything"


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize(
    ("order", "displace"), [("slack", True), ("slack", False), ("paper", True), ("edf", True)]
)
def test_urgency(folder: Path, order: str, displace: bool, group: int) -> None:
    options: dict[str, Any] = {"order": order, "displace": displace}
    seeds = range(group * 20, group * 20 + (20 if order == "slack" and displace else 2))
    equal = 0
    for seed in seeds:
        scenario = draw(seed, calls=CALLS)
        live = of_vllm(scenario, folder, scheduler_class=AlwaysFresh, hexgen=options)
        played = simulated(scenario, EngineOptions(**options), measured=False)
        equal += assert_same(seed, live, played)
    assert equal >= len(seeds) - 2


def test_measured_rates_and_stale_keys_cost_little(folder: Path) -> None:
    live_s: list[float] = []
    played_s: list[float] = []
    preempted = [0, 0]
    for seed in range(25):
        scenario = draw(seed, calls=CALLS)
        live = of_vllm(scenario, folder, scheduler_class=UrgencyScheduler, hexgen={})
        played = simulated(scenario, EngineOptions())
        for arrival in scenario.arrivals:
            live_s.append(live.ends_s[arrival.call_id] - arrival.at_s)
            played_s.append(played.ends_s[arrival.call_id] - arrival.at_s)
        preempted[0] += live.preemptions()
        preempted[1] += played.preemptions()
    assert fmean(played_s) == pytest.approx(fmean(live_s), rel=0.02)
    late = int(0.95 * len(live_s))
    assert sorted(played_s)[late] == pytest.approx(sorted(live_s)[late], rel=0.05)
    assert preempted[1] == pytest.approx(preempted[0], rel=0.15)
