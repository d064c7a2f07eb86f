"""Engines with roles in virtual time: prompts at one engine, a transfer, answers at another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.engine.engine import SimEngine
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.scenario_file import load
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import (
    CallSpec,
    WorkflowSpec,
    generator,
    poisson,
    timed,
)
from hexgen_vllm.types import StepCost

PROMPTS = EngineModel("p", StepCost(0.02, 7e-5, 0.0, 0.0, 1e-4, 0.0), role="prefill")
ANSWERS = EngineModel("d", StepCost(0.01, 4e-4, 0.0, 0.0, 6e-4, 0.0), role="decode")
EXACT = SimOptions(router_latency_s=0.0, rates="true", step_noise=0.0, kv_transfer_rate=10_000.0)


class Steps:
    """Prompt tokens and steps that each engine had."""

    def __init__(self) -> None:
        self.prompt: dict[str, int] = {}

    def stepped(self, engine: SimEngine, start_s: float, steps: int) -> None:
        tokens = sum(s.chunk for s in engine.batch.chunks)
        name = engine.model.engine_id
        self.prompt[name] = self.prompt.get(name, 0) + tokens


def one_call(prompt: int, output: int) -> WorkflowSpec:
    return WorkflowSpec("w", "t", ((CallSpec("s", prompt, output),),))


def run(
    *models: EngineModel,
    policy: Policy | None = None,
    options: SimOptions = EXACT,
    workflows: tuple[WorkflowSpec, ...] = (one_call(6_000, 30),),
) -> tuple[Simulation, Steps]:
    steps = Steps()
    told = policy or named("slack")
    simulation = Simulation(models, told, lambda _: 60.0, options, observer=steps)
    simulation.run(workflows)
    assert not any(e.in_flight for e in simulation.coordinator.engines.values())
    return simulation, steps


def test_a_call_takes_its_prompt_the_transfer_and_its_answer() -> None:
    simulation, steps = run(PROMPTS, ANSWERS)
    (record,) = simulation.calls
    assert record.engine == "d"
    assert steps.prompt == {"p": 6_000, "d": 1}
    prefill_s = 3 * 0.02 + 6_000 * 1e-4  # three steps of 2,048 tokens at most
    first_s = prefill_s + 6_000 / 10_000 + 0.01 + 4e-4
    assert record.ttft_s == pytest.approx(first_s)
    assert record.latency_s == pytest.approx(first_s + 29 * (0.01 + 4e-4))


def test_a_transfer_that_takes_longer_than_the_prompt_is_not_made() -> None:
    policy = named("slack")
    slow = replace(policy, dispatch=replace(policy.dispatch, kv_transfer_rate=1_000.0))
    _, steps = run(PROMPTS, ANSWERS, policy=slow)
    assert steps.prompt == {"d": 6_000}


def test_without_roles_every_engine_does_both() -> None:
    policy = replace(named("round_robin+fcfs"), roles=False)
    simulation, steps = run(PROMPTS, ANSWERS, policy=policy)
    assert simulation.calls[0].engine == "d"  # the first by name
    assert steps.prompt == {"d": 6_000}


@pytest.mark.parametrize("name", ["slack", "least_outstanding+fcfs", "earliest_finish"])
def test_fleets_of_all_roles_answer_all_and_repeat_themselves(name: str) -> None:
    models = (
        PROMPTS,
        replace(PROMPTS, engine_id="p2", cost=PROMPTS.cost.scaled(2.0)),
        ANSWERS,
        replace(ANSWERS, engine_id="d2", max_num_seqs=4),
        EngineModel("both", StepCost(0.03, 2e-4, 0.0, 0.0, 3e-4, 0.0), max_num_seqs=8),
    )
    specs = timed(tuple(text2sql(25, seed=3)), poisson(25, 1.0, generator(3, "arrivals")))
    options = SimOptions(kv_transfer_rate=40_000.0)
    runs = [run(*models, policy=named(name), options=options, workflows=specs) for _ in range(2)]
    (first, steps), (second, _) = runs
    assert first.calls == second.calls
    assert all(w.error is None for w in first.workflows)
    assert len(first.workflows) == 25
    answered = {record.engine for record in first.calls}
    assert answered <= {"d", "d2", "both"}
    assert steps.prompt["p"] > 0
    assert first.records.cached_tokens < first.records.prompt_tokens


def test_roles_stand_in_scenario_files(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    text = """
fleet:
  - {name: a, device: A100, role: ROLE}
  - {name: b, device: A100, role: decode}
arrivals: {rates: [1.0]}
policies: [slack, {policy: slack, name: plain, roles: SAID}]
"""
    file.write_text(text.replace("ROLE", "prefill").replace("SAID", "false"))
    scenario = load(file)
    assert [model.role for model in scenario.fleet] == ["prefill", "decode"]
    assert [policy.roles for policy in scenario.policies] == [True, False]
    for role, said, wrong in (("prefil", "true", "role must be"), ("decode", "maybe", "roles")):
        file.write_text(text.replace("ROLE", role).replace("SAID", said))
        with pytest.raises(ConfigError, match=wrong):
            load(file)
