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

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from hexgen_vllm.config import (
    DispatchOptions,
    EngineOptions,
    from_mapping,
    known_names,
    with_current_names,
)
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.engine.sequence import EngineModel
from hexgen_vllm.sim.policies import (
    DEVICES,
    FLEETS,
    Policy,
    engine_on,
    fleet,
    named,
)
from hexgen_vllm.sim.scenario import (
    ArrivalOptions,
    DeadlineOptions,
    Scenario,
    WorkloadOptions,
)
from hexgen_vllm.sim.simulator import SimOptions
from hexgen_vllm.types import EngineKind, StepCost
from hexgen_vllm.yaml_files import (
    Key,
    Located,
    read,
)

T = TypeVar("T")

_SECTIONS: Final[dict[str, type[Any]]] = {
    "workload": WorkloadOptions,
    "arrivals": ArrivalOptions,
    "deadline": DeadlineOptions,
    "simulation": SimOptions,
}
_KEYS: Final = ("fleet", *_SECTIONS, "policies", "seeds")
_LISTS: Final = frozenset(("loads", "rates", "times_s", "tenants"))
_ENGINE_KEYS: Final = frozenset(f.name for f in fields(EngineModel)) - {"engine_id", "cost"}


def load(path: Path) -> Scenario:
    """Read the scenario file ``path``; a trace in it is found relative to the file.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    top = _mapping(source, ())
    _refuse_unknown(source, (), top, _KEYS)
    for key in ("fleet", "arrivals"):
        if key not in top:
            raise source.error((), f"{key!r} is missing.")
    values: dict[str, Any] = {
        key: _section(source, (key,), cls) for key, cls in _SECTIONS.items() if key in top
    }
    values["fleet"] = read_fleet(source, ("fleet",))
    if "policies" in top:
        values["policies"] = _policies(source)
    if "seeds" in top:
        values["seeds"] = _seeds(source)
    scenario = _checked(source, ("arrivals",), "times_s", lambda: Scenario(**values))
    trace = scenario.workload.trace
    if trace is not None:
        found = str(path.parent / trace)
        scenario = replace(scenario, workload=replace(scenario.workload, trace=found))
    return scenario


def load_fleet(path: Path) -> tuple[EngineModel, ...]:
    """Read a file with the key ``fleet``; others are ignored, so that a scenario file will do.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    if "fleet" not in _mapping(source, ()):
        raise source.error((), "'fleet' is missing.")
    return read_fleet(source, ("fleet",))


def load_simulation(path: Path) -> SimOptions:
    """Read the key ``simulation`` of a file; without it everything is at its default.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    if "simulation" not in _mapping(source, ()):
        return SimOptions()
    return _section(source, ("simulation",), SimOptions)


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
    given = dict(_mapping(source, path))
    _refuse_unknown(source, path, given, ("name", "count", "cost", *sorted(_ENGINE_KEYS)))
    device, name, count = given.get("device"), given.pop("name", None), given.pop("count", 1)
    if device is not None and device not in DEVICES and "cost" not in given:
        known = ", ".join(DEVICES)
        raise source.error(
            path, f"device must be one of {known} or come with a cost.", key="device"
        )
    if device is None and "cost" not in given:
        raise source.error(path, "an engine needs a device or a cost.")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000:
        raise source.error(path, "count must be a whole number from 1 to 10000.", key="count")
    if name is not None and not isinstance(name, str):
        raise source.error(path, "name must be text.", key="name")
    cost = _cost(source, (*path, "cost")) if "cost" in given else None
    given.pop("cost", None)
    stem = name or (str(device).lower() if device else f"engine-{path[-1]}")
    model = _engine(source, path, stem, cost, given)
    if count == 1 and name is not None:
        return [model]
    return [replace(model, engine_id=f"{stem}-{i}") for i in range(count)]


def _engine(
    source: Located, path: Key, name: str, cost: StepCost | None, given: Mapping[str, Any]
) -> EngineModel:
    base = EngineModel(name, cost) if cost is not None else engine_on(given["device"], name)
    known = {f.name: getattr(base, f.name) for f in fields(EngineModel)}
    for key, value in given.items():
        _checked(source, path, key, partial(_model, {**known, key: value}))
    return _model({**known, **given})


def _model(values: Mapping[str, Any]) -> EngineModel:
    return from_mapping(EngineModel, values, where="engine key")


def _cost(source: Located, path: Key) -> StepCost:
    given = _mapping(source, path)
    names = tuple(f.name for f in fields(StepCost))
    _refuse_unknown(source, path, given, names)
    for name in names:
        value = given.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1e6:  # type: ignore[operator]
            raise source.error(path, f"{name} must be a number of seconds, 0 or more.", key=name)
    if not given["c0"] + given["c1"] > 0:
        raise source.error(path, "a decode step must take time.", key="c0")
    return StepCost(**{name: float(given[name]) for name in names})


def _section(source: Located, path: Key, cls: type[T]) -> T:
    """Read a section into the dataclass ``cls``, each key checked on its own line."""
    given = _mapping(source, path)
    try:
        given = with_current_names(cls, given)
    except ConfigError as error:
        raise source.error(path, error) from None
    _refuse_unknown(source, path, given, tuple(f.name for f in fields(cls)))  # type: ignore[arg-type]
    values = {key: _shaped(source, path, key, value) for key, value in given.items()}
    for key, value in values.items():
        if key not in _LISTS or isinstance(value, str):
            _checked(source, path, key, partial(_alone, cls, key, value))
    try:
        return from_mapping(cls, values, where="key")
    except ConfigError as error:
        raise source.error(path, error) from None


def _alone(cls: type[Any], key: str, value: Any) -> None:
    """Check one value; what else the section needs is filled in."""
    needed = {"loads": (1.0,)} if cls is ArrivalOptions else {}
    from_mapping(cls, {**needed, key: value}, where="key")


def _shaped(source: Located, path: Key, key: str, value: Any) -> Any:
    """Check the shape of lists and mappings, which the options themselves do not."""
    if path == ("simulation",) and key == "rates":
        return "true" if value is True else value  # what YAML makes of the word
    if key not in _LISTS:
        return value
    if key == "tenants":
        numbers = path == ("deadline",)
        good = isinstance(value, Mapping) and all(map(_is_number, value.values()))
        if numbers and not good:
            raise source.error(path, "tenants must map names to scales.", key=key)
        if not numbers and not _is_list_of(value, lambda v: isinstance(v, str)):
            raise source.error(path, "tenants must be a list of names.", key=key)
        return value
    if not _is_list_of(value, _is_number):
        raise source.error(path, f"{key} must be a list of numbers.", key=key)
    return [float(v) for v in value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of(value: object, good: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(good, value))


def _policies(source: Located) -> tuple[Policy, ...]:
    listed = source.at(("policies",))
    if not isinstance(listed, list) or not listed:
        raise source.error(("policies",), "must be a list of at least one policy.")
    found = [_policy(source, ("policies", index), entry) for index, entry in enumerate(listed)]
    for index, policy in enumerate(found):
        if any(policy.name == other.name for other in found[:index]):
            raise source.error(("policies", index), f"the name {policy.name} is there twice.")
    return tuple(found)


def _policy(source: Located, path: Key, entry: object) -> Policy:
    if isinstance(entry, str):
        return _checked(source, path, None, lambda: named(entry))
    given = _mapping(source, path)
    _refuse_unknown(source, path, given, ("policy", "name", "dispatch", "engine"))
    policy, name = given.get("policy"), given.get("name")
    if not isinstance(policy, str) or not isinstance(name, str | None):
        raise source.error(path, "a policy and its name must be text.")
    dispatch = engine = None
    if "dispatch" in given:
        dispatch = _section(source, (*path, "dispatch"), DispatchOptions)
    if "engine" in given:
        engine = _section(source, (*path, "engine"), EngineOptions)
    made = _checked(source, path, "policy", lambda: named(policy, dispatch, engine))
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


def _checked(source: Located, path: Key, key: str | None, build: Callable[[], T]) -> T:
    try:
        return build()
    except ConfigError as error:
        raise source.error(path, error, key=key) from None


def _mapping(source: Located, path: Key) -> Mapping[str, Any]:
    value = source.at(path)
    if not isinstance(value, Mapping):
        raise source.error(path, "must be a mapping.")
    return value


def _refuse_unknown(
    source: Located, path: Key, given: Mapping[str, Any], known: tuple[str, ...]
) -> None:
    for key in given:
        if key not in known:
            names = known_names(key, known)
            raise source.error(path, f"unknown key {key!r}; known are {names}.", key=key)
