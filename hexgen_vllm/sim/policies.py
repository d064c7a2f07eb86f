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


# name: (dispatch policy, engine order, engine kind)
_PARTS: Final[dict[str, tuple[str, str, EngineKind]]] = {
    "round_robin+fcfs": ("round_robin", "fcfs", EngineKind.FCFS),
    "least_outstanding+fcfs": ("least_outstanding", "fcfs", EngineKind.FCFS),
    "least_outstanding+edf": ("least_outstanding", "edf", EngineKind.PRIORITY),
    "hexgen": ("hexgen", "hexgen", EngineKind.HEXGEN),
    "slack": ("slack", "slack", EngineKind.HEXGEN),
    "oracle": ("slack", "slack", EngineKind.HEXGEN),
}
NAMES: Final = tuple(_PARTS)


def named(
    name: str, dispatch: DispatchOptions | None = None, engine: EngineOptions | None = None
) -> Policy:
    """Return the policy ``name``; knobs it does not define itself are taken from the options.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in _PARTS:
        raise ConfigError(f"policy must be one of {', '.join(NAMES)}, not {name!r}.")
    placement, order, kind = _PARTS[name]
    return Policy(
        name,
        replace(dispatch or DispatchOptions(), policy=placement),
        replace(engine or EngineOptions(), order=order),
        kind,
        oracle=name == "oracle",
    )
