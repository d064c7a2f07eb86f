"""The comparison of routers that hear of each other late plays what the simulator plays."""

from __future__ import annotations

import pytest

from benchmarks.router.apart import Apart, Several
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.policies import named
from hexgen_vllm.sim.scenario import ArrivalOptions, Scenario, WorkloadOptions
from hexgen_vllm.sim.simulator import Simulation

POLICY = named("slack")
SCENARIO = Scenario(
    fleet("reference-4"), ArrivalOptions(loads=(0.9,)), WorkloadOptions(workflows=30, warmup=0)
)


def played(routers: int, lag_s: float | None, *, spray: bool = False) -> Apart:
    bounds = SCENARIO.limits()
    (run,) = SCENARIO.runs(bounds.rate_per_s)
    sim = Apart(SCENARIO.fleet, POLICY, lambda _: 60.0)
    several = Several([Coordinator(POLICY.dispatch) for _ in range(routers)], spray, lag_s)
    sim.play(several, lag_s or 1.0, SCENARIO.specs(run))
    return sim


def test_one_of_several_decides_as_the_only_one() -> None:
    alone = Simulation(SCENARIO.fleet, POLICY, lambda _: 60.0)
    (run,) = SCENARIO.runs(SCENARIO.limits().rate_per_s)
    alone.run(SCENARIO.specs(run))
    assert played(1, 0.025).calls == alone.calls


@pytest.mark.parametrize("spray", [False, True])
def test_those_that_tell_each_other_know_the_same_in_the_end(spray: bool) -> None:
    sim = played(3, 0.025, spray=spray)
    assert len(sim.workflows) == 30
    assert all(one.error is None for one in sim.workflows)
    made = sim.coordinator.made
    for _ in range(2):
        sim.coordinator.exchange(sim.now)
    known = [one.workflows.shapes.known_stages() for one in made]
    assert known[0] == known[1] == known[2]
    assert all(e.elsewhere.calls == 0 for one in made for e in one.engines.values())


def test_those_that_do_not_learn_apart() -> None:
    made = played(3, None).coordinator.made
    known = [one.workflows.shapes.known_stages() for one in made]
    assert not known[0] == known[1] == known[2]
