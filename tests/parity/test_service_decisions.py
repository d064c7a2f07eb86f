"""One trace through the simulator and through the router's live service: equal decision logs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.trace import read_trace
from hexgen_vllm.sim.workloads.workload import (
    WorkflowSpec,
    generator,
    poisson,
    timed,
)
from hexgen_vllm.types import Decision, Placement, Rejection
from tests.parity.live_service import LiveService

FLEET = tuple(replace(model, max_num_seqs=4) for model in fleet("reference-4"))
WORKFLOWS = 30
OPTIONS = SimOptions()
TRUE_RATES = SimOptions(rates="true", step_noise=0.0)
PROTECT: dict[str, Any] = {
    "overload": "protect",
    "max_held_calls": 8,
    "held_timeout_s": 20.0,
}

Log = list[tuple[float, Decision]]


@pytest.fixture(scope="module")
def workflows(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkflowSpec, ...]:
    """A trace in the public format, as it is read back, at more than the fleet can bear."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    keys = ("step", "input_length", "output_length")
    entries = [
        {
            "Text2SQLRequest": [
                dict(zip(keys, (c.stage, c.prompt_tokens, c.output_tokens), strict=True))
                for c in spec.calls()
            ]
        }
        for spec in text2sql(WORKFLOWS, seed=3)
    ]
    path.write_text(json.dumps(entries))
    # With other seeds two calls come or reach an engine at the very same moment, in either order.
    return timed(read_trace(path), poisson(WORKFLOWS, 1.5, generator(6, "arrivals")))


def deadline_s(spec: WorkflowSpec) -> float:
    return 40.0 if spec.workflow_id.endswith(("1", "5")) else 120.0


def simulated(
    specs: Sequence[WorkflowSpec], policy: Policy, options: SimOptions = OPTIONS
) -> tuple[Log, Simulation]:
    simulation = Simulation(FLEET, policy, deadline_s, options)
    simulation.coordinator.log = log = deque()
    simulation.run(specs)
    return list(log), simulation


async def live(
    specs: Sequence[WorkflowSpec], policy: Policy, options: SimOptions = OPTIONS
) -> tuple[Log, LiveService]:
    service = LiveService(FLEET, policy, options)
    await service.play(specs, deadline_s)
    return list(service.log), service


@pytest.mark.parametrize(
    "policy",
    [
        named("round_robin+fcfs"),
        named("least_outstanding+edf"),
        named("paper", DispatchOptions(alpha=0.4)),
        named("slack"),
        # By latest start: demoted calls are due alike, and either of two that end at once is first.
        replace(named("slack", DispatchOptions(**PROTECT)), engine=EngineOptions(order="slack")),
    ],
    ids=lambda policy: f"{policy.name} {policy.dispatch.overload}",
)
async def test_call_engine_order_and_time_are_equal(
    workflows: tuple[WorkflowSpec, ...], policy: Policy
) -> None:
    expected, simulation = simulated(workflows, policy)
    found, service = await live(workflows, policy)
    assert found == expected
    assert {p.engine_id for _, p in found if isinstance(p, Placement)} == set(service.engines)
    refused = [d for _, d in found if isinstance(d, Rejection)]
    assert bool(refused) == (policy.dispatch.overload == "protect")
    latencies = sorted(w.latency_s for w in simulation.workflows if w.latency_s is not None)
    assert sorted(service.latencies) == pytest.approx(latencies, abs=1e-4)


async def test_they_are_equal_with_true_rates_too(workflows: tuple[WorkflowSpec, ...]) -> None:
    expected, _ = simulated(workflows, named("slack"), TRUE_RATES)
    found, _ = await live(workflows, named("slack"), TRUE_RATES)
    assert found == expected
    fitted, simulation = simulated(workflows, named("slack"))
    assert found != fitted, "fitted rates and noise are at work in the other tests"
    fits = [engine.batch.pricing.fit for engine in simulation.engines.values()]
    assert all(fit is not None and fit.cost() is not None for fit in fits)


async def test_another_alpha_shows(workflows: tuple[WorkflowSpec, ...]) -> None:
    expected, _ = simulated(workflows, named("paper", DispatchOptions(alpha=0.4)))
    found, _ = await live(workflows, named("paper", DispatchOptions(alpha=0.41)))
    assert found != expected


async def test_the_log_is_of_every_call(workflows: tuple[WorkflowSpec, ...]) -> None:
    found, _ = await live(workflows, named("slack"))
    assert len(found) == sum(1 for spec in workflows for _ in spec.calls())
    assert [at for at, _ in found] == sorted(at for at, _ in found)
