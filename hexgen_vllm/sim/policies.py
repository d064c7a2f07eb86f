"""The policies that every run can compare, by name: placement together with order in the engine.

| name | placement | engine order |
|---|---|---|
| ``round_robin+fcfs`` | in turn | stock vLLM, first come first served |
| ``least_outstanding+fcfs`` | fewest calls | stock vLLM, first come first served |
| ``least_outstanding+edf`` | fewest calls | stock vLLM, priority = deadline |
| ``hexgen`` | the paper's score | the paper's urgency |
| ``slack`` | earliest finish | slack |
| ``oracle`` | earliest finish | slack; all estimates are the truth |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.placements import PLACEMENTS
from hexgen_vllm.types import EngineKind


@dataclass(frozen=True)
class Policy:
    """Placement and engine order under one name.

    Attributes:
        name: as in tables and results.
        dispatch: placement and its knobs.
        engine: order and displacement in the engines.
        kind: what the engines are.
        oracle: estimates are the truth.
    """

    name: str
    dispatch: DispatchOptions
    engine: EngineOptions
    kind: EngineKind = EngineKind.HEXGEN
    oracle: bool = False


# order in the engine: (order, kind of engine, what the router tells an engine with priorities)
_ORDERS: Final[dict[str, tuple[str, EngineKind, str]]] = {
    "fcfs": ("fcfs", EngineKind.FCFS, "deadline"),
    "edf": ("edf", EngineKind.PRIORITY, "deadline"),
    "plas": ("priority", EngineKind.PRIORITY, "attained"),
    "srpt": ("priority", EngineKind.PRIORITY, "remaining"),
    "slack": ("slack", EngineKind.HEXGEN, "deadline"),
    "hexgen": ("hexgen", EngineKind.HEXGEN, "deadline"),
}
_OURS: Final = {"hexgen": "hexgen", "slack": "slack", "earliest_finish": "slack", "oracle": "slack"}
_STOCK: Final = tuple(name for name in PLACEMENTS if name not in _OURS)
NAMES: Final = (
    *_OURS,
    *(f"{name}+{order}" for name in _STOCK for order in ("fcfs", "edf", "plas", "srpt")),
)


def named(
    name: str, dispatch: DispatchOptions | None = None, engine: EngineOptions | None = None
) -> Policy:
    """Return the policy ``name``; knobs it does not define itself are taken from the options.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in NAMES:
        raise ConfigError(f"policy must be one of {', '.join(NAMES)}, not {name!r}.")
    placement, _, order = name.partition("+")
    in_engine, kind, told = _ORDERS[order or _OURS[name]]
    if name == "oracle":
        placement = "slack"
    return Policy(
        name,
        replace(dispatch or DispatchOptions(), policy=placement, priority_by=told),
        replace(engine or EngineOptions(), order=in_engine),
        kind,
        oracle=name == "oracle",
    )
