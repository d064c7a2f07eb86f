"""``hexgen-vllm check-policy FILE.py:Class``: does a placement policy keep to the protocol?

Each check makes a situation that a live fleet gets into and says in a sentence what the policy did
wrong there. They find programming errors; how good the policy is, ``hexgen-vllm sim`` says.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Final

from hexgen_vllm.clock import SystemClock
from hexgen_vllm.config import DispatchOptions, check_policy_name, is_policy_file
from hexgen_vllm.errors import HexgenError
from hexgen_vllm.policy.calls import Demand, InFlight
from hexgen_vllm.policy.coordinator import Coordinator
from hexgen_vllm.policy.engine_load import EngineLoad
from hexgen_vllm.policy.placements import placement
from hexgen_vllm.policy_file import load
from hexgen_vllm.sim.fleets import fleet
from hexgen_vllm.sim.policies import NAMES, named
from hexgen_vllm.sim.simulator import SimOptions, Simulation
from hexgen_vllm.sim.workloads.text2sql import text2sql
from hexgen_vllm.sim.workloads.workload import timed
from hexgen_vllm.types import (
    NO_DEADLINE,
    Call,
    CallResult,
    EngineReport,
    EngineSpec,
    EngineState,
    Placement,
    StepCost,
)

_COST: Final = StepCost(c0=0.02, c1=1e-4, c2=1e-8, p0=0.0, p1=1 / 4000, p2=0.0)
_CALLS: Final = 64


class PolicyError(Exception):
    """What a policy did wrong, in a sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm check-policy``."""
    parser.add_argument("policy", metavar="FILE.py:Class", help="what is checked, or a name")


def main(args: argparse.Namespace) -> int:
    """Run all checks and print one line each.

    Raises:
        ConfigError: there is no such policy.
    """
    name: str = args.policy
    check_policy_name(name)
    load(name)
    wrong = 0
    for check in CHECKS:
        said = run(check, name)
        wrong += said is not None
        print(f"{'ok  ' if said is None else 'FAIL'}  {title(check)}{f': {said}' if said else ''}")
    print(
        f"{len(CHECKS) - wrong} of {len(CHECKS)} checks passed; {_decision_us(name):.0f} µs a call."
    )
    return 1 if wrong else 0


def title(check: Callable[[str], None]) -> str:
    """Return what a check is about, the first line of its docstring."""
    return (check.__doc__ or "").split("\n", maxsplit=1)[0].rstrip(".")


def run(check: Callable[[str], None], name: str) -> str | None:
    """Return what is wrong with the policy ``name``, ``None`` if nothing is."""
    try:
        check(name)
    except (PolicyError, HexgenError) as error:
        return str(error)
    except Exception as error:  # whatever a stranger's code raises
        return f"it raises {type(error).__name__}: {error}"
    return None


def _engines(count: int, *, measured: bool = True) -> list[EngineLoad]:
    found = []
    for index in range(count):
        engine = EngineLoad(EngineSpec(f"engine-{index:04d}", max_num_seqs=8, kv_tokens=100_000))
        if measured:
            cost = _COST.scaled(1.0 + index % 4)
            report = EngineReport(cost=cost, fit_error=0.0, running=0, waiting=0, kv_usage=0.1)
            engine.reported(report)
        found.append(engine)
    return found


def _demand(number: int, **said: Any) -> Demand:
    options: dict[str, Any] = {"prefix": tuple(range(number % 5, 20)), "prefix_chunk_tokens": 256}
    call = Call(f"c{number}", f"w{number // 4}", float(number), 6000, **{**options, **said})
    deadline_s = call.deadline_s
    return Demand(call, 100, deadline_s, 5.0, deadline_s - 5.0, float(number))


def _play(name: str, engines: Sequence[EngineLoad], demands: Sequence[Demand]) -> list[str]:
    """Place ``demands`` one after the other; return where they went."""
    policy = placement(DispatchOptions(policy=name))
    went = []
    for number, demand in enumerate(demands):
        choice = policy.choose(demand, engines, {}, float(number))
        if not any(choice.engine is e for e in engines):
            raise PolicyError("it chose something that is none of the engines.")
        policy.placed(demand, choice, float(number))
        at = Placement(demand.call.call_id, choice.engine.engine_id, "", uncached_tokens=100)
        choice.engine.placed(InFlight(demand.call, at, float(number)))
        went.append(choice.engine.engine_id)
    return went


def one_engine(name: str) -> None:
    """One engine gets every call."""
    _play(name, _engines(1), [_demand(i) for i in range(_CALLS)])


def unmeasured_engines(name: str) -> None:
    """Engines that nothing is known of."""
    _play(name, _engines(4, measured=False), [_demand(i) for i in range(_CALLS)])


def some_measured(name: str) -> None:
    """Some engines measured, others not."""
    _play(name, [*_engines(2), *_engines(4, measured=False)[2:]], [_demand(i) for i in range(9)])


def bare_calls(name: str) -> None:
    """Calls without deadline, prefix, or any hint."""
    bare = [_demand(i, prefix=(), prefix_chunk_tokens=0) for i in range(_CALLS)]
    _play(name, _engines(4), bare)


def odd_calls(name: str) -> None:
    """Deadlines long past and far away, prompts of one token and of a million."""
    odd = []
    for i, deadline_s in enumerate((-1e9, 0.0, 1e-9, 1e18, NO_DEADLINE)):
        demand = _demand(i, deadline_s=deadline_s)
        odd.append(demand)
        call = Call(f"o{i}", f"o{i}", 0.0, 1 if i % 2 else 1_000_000, deadline_s=deadline_s)
        odd.append(Demand(call, 1 + i % 2 * 100_000, deadline_s, 0.0, deadline_s, 0.0))
    _play(name, _engines(3), odd)


def many_engines(name: str) -> None:
    """A thousand engines."""
    _play(name, _engines(1000), [_demand(i) for i in range(8)])


def changing_engines(name: str) -> None:
    """Engines come, leave and are missing from one choice to the next."""
    engines = _engines(6)
    policy = placement(DispatchOptions(policy=name))
    for number in range(_CALLS):
        offered = [e for i, e in enumerate(engines) if (i + number) % 3] or engines
        choice = policy.choose(_demand(number), offered, {}, float(number))
        if not any(choice.engine is e for e in offered):
            raise PolicyError("it chose an engine that was not offered.")
        policy.placed(_demand(number), choice, float(number))


def same_again(name: str) -> None:
    """The same events give the same choices."""
    played = [_play(name, _engines(4), [_demand(i) for i in range(_CALLS)]) for _ in range(2)]
    if played[0] != played[1]:
        raise PolicyError("two plays of the same calls differ; seed its generator, read no clock.")


def asked_twice(name: str) -> None:
    """Being asked again about a call that found no room."""
    policy, engines = placement(DispatchOptions(policy=name)), _engines(3)
    for _ in range(8):
        policy.choose(_demand(1), engines, {"engine-0000": 2}, 1.0)
    policy.placed(_demand(1), policy.choose(_demand(1), engines, {}, 1.0), 1.0)


def changes_nothing(name: str) -> None:
    """Engines and call are as they were after a choice."""
    engines, demand = _engines(4), _demand(3)
    before = deepcopy([_state(e) for e in engines]), (demand.call.prefix, demand.due_s)
    placement(DispatchOptions(policy=name)).choose(demand, engines, {}, 0.0)
    after = [_state(e) for e in engines], (demand.call.prefix, demand.due_s)
    if before != after:
        raise PolicyError("it changed an engine or the call while choosing.")


def _state(engine: EngineLoad) -> tuple[Any, ...]:
    load = engine.own()
    return engine.engine_id, engine.slots, engine.state, engine.report, tuple(load)


def in_the_coordinator(name: str) -> None:
    """Engines that fail, drain and come back under the router's state machine."""
    coordinator = Coordinator(DispatchOptions(policy=name))
    for i in range(3):
        coordinator.engine_joined(EngineSpec(f"e{i}", max_num_seqs=2), 0.0)
    answered = 0
    for number in range(_CALLS):
        now = float(number)
        call = _demand(number).call
        decisions = coordinator.call_arrived(call, now)
        state = EngineState.DOWN if number % 7 == 3 else EngineState.READY
        decisions += coordinator.engine_changed(f"e{number % 3}", state, now)
        for placed in [d for d in decisions if isinstance(d, Placement)]:
            answered += 1
            result = CallResult(ok=True, output_tokens=10)
            coordinator.call_finished(placed.call_id, result, now + 0.5)
    if not answered:
        raise PolicyError("no call was placed.")


def in_the_simulator(name: str) -> None:
    """A simulated fleet of four answers every call of forty workflows."""
    stock = f"{name}+fcfs"
    policy = named(stock if is_policy_file(name) or stock in NAMES else name)
    simulation = Simulation(fleet("reference-4"), policy, lambda spec: 120.0, SimOptions())
    simulation.run(timed(text2sql(40, seed=0), [4.0 * i for i in range(40)]))
    failed = [w for w in simulation.workflows if w.error is not None]
    if failed or len(simulation.workflows) != 40:
        raise PolicyError(f"{len(failed)} of 40 workflows failed.")


CHECKS: Final[tuple[Callable[[str], None], ...]] = (
    one_engine,
    unmeasured_engines,
    some_measured,
    bare_calls,
    odd_calls,
    many_engines,
    changing_engines,
    same_again,
    asked_twice,
    changes_nothing,
    in_the_coordinator,
    in_the_simulator,
)


def _decision_us(name: str) -> float:
    """Return the least time of a decision among eight engines, in microseconds."""
    policy, engines, clock = placement(DispatchOptions(policy=name)), _engines(8), SystemClock()
    least = math.inf
    for number in range(200):
        demand = _demand(number)
        began = clock.now()
        policy.choose(demand, engines, {}, float(number))
        least = min(least, clock.now() - began)
    return least * 1e6
