"""Reads scenarios from YAML; every error is one sentence with file, line and place.

.. code-block:: yaml

    fleet: reference-4              # or a list of engines:
    # - {device: A100, count: 2}
    # - {name: mine, max_num_seqs: 32, kv_tokens: 90000,
    #    cost: {c0: 0.02, c1: 1.0e-4, c2: 5.0e-8, p0: 0, p1: 2.5e-4, p2: 0}}
    workload: {workflows: 300, retries: skewed}      # or trace: FILE
    arrivals: {loads: [0.5, 0.8]}                    # shares of λ*; or rates: [...]
    deadline: {scale: 2.0}                           # multiples of the base SLO
    policies:
      - round_robin+fcfs
      - {policy: paper, name: paper a=0.4, dispatch: {alpha: 0.4}}
      - slack
    seeds: [1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.fleets import DEVICES, FLEETS, engine_on, fleet
from hexgen_vllm.sim.policies import Policy, named
from hexgen_vllm.sim.scenario import (
    ArrivalOptions,
    DeadlineOptions,
    Scenario,
    WorkloadOptions,
)
from hexgen_vllm.sim.simulator import SimOptions
from hexgen_vllm.types import EngineKind, StepCost
from hexgen_vllm.yaml_files import Key, Located, read

_SECTIONS: Final[dict[str, type[Any]]] = {
    "workload": WorkloadOptions,
    "arrivals": ArrivalOptions,
    "deadline": DeadlineOptions,
    "simulation": SimOptions,
}
KEYS: Final = ("fleet", *_SECTIONS, "policies", "seeds")
_POLICY_KEYS: Final = ("policy", "name", "dispatch", "engine", "roles")
_ENTRY_KEYS: Final = ("name", "count", "cost")
_ENGINE_KEYS: Final = tuple(f.name for f in fields(EngineModel) if f.metadata)
_COSTS: Final = tuple(f.name for f in fields(StepCost))


def load(path: Path) -> Scenario:
    """Read the scenario file ``path``; a trace in it is found relative to the file.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    return scenario_in(read(path))


def scenario_in(source: Located) -> Scenario:
    """Return the scenario of a file that has been read.

    Raises:
        ConfigError: as :func:`load`.
    """
    top = source.mapping((), KEYS)
    for key in ("fleet", "arrivals"):
        if key not in top:
            raise source.error((), f"{key!r} is missing.")
    values: dict[str, Any] = {
        key: source.options(cls, (key,)) for key, cls in _SECTIONS.items() if key in top
    }
    values["fleet"] = read_fleet(source, ("fleet",))
    if "policies" in top:
        values["policies"] = _policies(source)
    if "seeds" in top:
        values["seeds"] = _seeds(source)
    scenario = source.built(("arrivals",), lambda: Scenario(**values))
    trace = scenario.workload.trace
    if trace is not None:
        found = str(Path(source.file).parent / trace)
        scenario = replace(scenario, workload=replace(scenario.workload, trace=found))
    return scenario


def load_fleet(path: Path) -> tuple[EngineModel, ...]:
    """Read a file with the key ``fleet``; others are ignored, so that a scenario file will do.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    if "fleet" not in source.mapping(()):
        raise source.error((), "'fleet' is missing.")
    return read_fleet(source, ("fleet",))


def load_simulation(path: Path) -> SimOptions:
    """Read the key ``simulation`` of a file; without it everything is at its default.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    if "simulation" not in source.mapping(()):
        return SimOptions()
    return source.options(SimOptions, ("simulation",))


def read_fleet(source: Located, path: Key) -> tuple[EngineModel, ...]:
    """Read a fleet: the name of a reference fleet, or a list of engines."""
    value = source.at(path)
    if isinstance(value, str):
        if value not in FLEETS:
            raise source.error(path, f"must be a list or one of {', '.join(FLEETS)}.")
        return fleet(value)
    if not isinstance(value, list) or not value:
        raise source.error(path, "must be a list of at least one engine, or a fleet's name.")
    found: list[EngineModel] = []
    for index in range(len(value)):
        for model in _engines(source, (*path, index)):
            if any(model.engine_id == other.engine_id for other in found):
                raise source.error((*path, index), f"the name {model.engine_id} is there twice.")
            found.append(model)
    return tuple(found)


def _engines(source: Located, path: Key) -> list[EngineModel]:
    """Read one entry of a fleet, which may stand for several equal engines."""
    entry = source.mapping(path, (*_ENTRY_KEYS, *_ENGINE_KEYS))
    keys = source.keys(EngineModel, path, without=_ENTRY_KEYS)
    given = source.given(EngineModel, path, keys)
    device = given.get("device")
    if device is not None and device not in DEVICES and "cost" not in entry:
        known = ", ".join(DEVICES)
        raise source.error(
            path, f"device must be one of {known} or come with a cost.", key="device"
        )
    if device is None and "cost" not in entry:
        raise source.error(path, "an engine needs a device or a cost.")
    name = source.typed(str | None, (*path, "name"))
    count = source.typed(int, (*path, "count")) if "count" in entry else 1
    if not 1 <= count <= 10_000:
        raise source.error(path, "count must be a whole number from 1 to 10000.", key="count")
    stem = name or (device.lower() if device else f"engine-{path[-1]}")
    if "cost" in entry:
        base = EngineModel(stem, _cost(source, (*path, "cost")))
    else:
        base = engine_on(str(device), stem)
    model = source.built(path, lambda: replace(base, **given), keys)
    if count == 1 and name is not None:
        return [model]
    return [replace(model, engine_id=f"{stem}-{i}") for i in range(count)]


def _cost(source: Located, path: Key) -> StepCost:
    source.mapping(path, _COSTS)
    given = {name: source.typed(float | None, (*path, name)) for name in _COSTS}
    for name, value in given.items():
        if value is None or not 0 <= value < 1e6:
            raise source.error(path, f"{name} must be a number of seconds, 0 or more.", key=name)
    if not given["c0"] + given["c1"] > 0:
        raise source.error(path, "a decode step must take time.", key="c0")
    return StepCost(**given)


def _policies(source: Located) -> tuple[Policy, ...]:
    listed = source.at(("policies",))
    if not isinstance(listed, list) or not listed:
        raise source.error(("policies",), "must be a list of at least one policy.")
    found = [_policy(source, ("policies", index)) for index in range(len(listed))]
    for index, policy in enumerate(found):
        if any(policy.name == other.name for other in found[:index]):
            raise source.error(("policies", index), f"the name {policy.name} is there twice.")
    return tuple(found)


def _policy(source: Located, path: Key) -> Policy:
    entry = source.at(path)
    if isinstance(entry, str):
        return source.built(path, lambda: named(entry))
    given: Mapping[str, Any] = source.mapping(path, _POLICY_KEYS)
    policy, name = given.get("policy"), given.get("name")
    if not isinstance(policy, str) or not isinstance(name, str | None):
        raise source.error(path, "a policy and its name must be text.")
    dispatch = engine = None
    if "dispatch" in given:
        dispatch = source.options(DispatchOptions, (*path, "dispatch"))
    if "engine" in given:
        engine = source.options(EngineOptions, (*path, "engine"))
    roles = source.typed(bool, (*path, "roles")) if "roles" in given else True
    made = source.built(path, lambda: replace(named(policy, dispatch, engine), roles=roles))
    if engine is not None and "order" in given["engine"]:
        if made.kind is not EngineKind.HEXGEN:
            raise source.error((*path, "engine", "order"), f"{policy} has an order of its own.")
        made = replace(made, engine=engine)
    return made if name is None else replace(made, name=name)


def _seeds(source: Located) -> tuple[int, ...]:
    listed = source.at(("seeds",))
    whole = isinstance(listed, list) and all(type(v) is int and v >= 0 for v in listed)
    if not whole or not listed or len(set(listed)) < len(listed):
        raise source.error(("seeds",), "must be a list of different whole numbers, 0 or more.")
    return tuple(listed)
