"""The policies that every run can compare, by name: placement together with order in the engine.

``slack``, ``paper`` (that of HEXGEN-TEXT2SQL) and ``earliest_finish`` come with our engine and
their own order in it; ``oracle`` is ``slack`` with true lengths and paths as its estimates. All
others are ``PLACEMENT+ORDER`` on stock vLLM, with a placement of
:mod:`hexgen_vllm.policy.placements` and an order: ``fcfs``, or with vLLM's priorities ``edf`` (the
deadline), ``plas`` (least attained service of the workflow first, Autellix, arXiv 2502.13965) or
``srpt`` (least remaining work first, by what was learned). A placement may also be
``FILE.py:Class``, with the order ``due`` unless it says another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from hexgen_vllm.config import DispatchOptions, EngineOptions, check_policy_name, is_policy_file
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import todays_name
from hexgen_vllm.policy.placements import PLACEMENTS
from hexgen_vllm.policy_file import load
from hexgen_vllm.types import EngineKind

_OURS: Final = {"paper": "paper", "slack": "due", "earliest_finish": "due", "oracle": "due"}


@dataclass(frozen=True)
class Policy:
    """Placement and engine order under one name.

    Attributes:
        name: as in tables and results.
        dispatch: placement and its knobs.
        engine: order and displacement in the engines.
        kind: what the engines are.
        oracle: estimates are the truth.
        roles: engines have the roles that the fleet gives them; otherwise all do both.
    """

    name: str
    dispatch: DispatchOptions
    engine: EngineOptions
    kind: EngineKind = EngineKind.HEXGEN
    oracle: bool = False
    roles: bool = True

    @property
    def learns_rates(self) -> bool:
        """Whether it plays with rates that engines fit; the paper's policy has a table of them."""
        ours = self.kind is EngineKind.HEXGEN and self.dispatch.policy != "paper"
        return ours and not self.oracle


# order in the engine: (order, kind of engine, what the router tells an engine with priorities)
ORDERS: Final[dict[str, tuple[str, EngineKind, str]]] = {
    "fcfs": ("fcfs", EngineKind.FCFS, "deadline"),
    "edf": ("edf", EngineKind.PRIORITY, "deadline"),
    "plas": ("priority", EngineKind.PRIORITY, "attained"),
    "srpt": ("priority", EngineKind.PRIORITY, "remaining"),
    "due": ("due", EngineKind.HEXGEN, "deadline"),
    "slack": ("slack", EngineKind.HEXGEN, "deadline"),
    "paper": ("paper", EngineKind.HEXGEN, "deadline"),
}
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
    placement, plus, order = todays_name(name).partition("+")
    order = todays_name(order)
    name = f"{placement}{plus}{order}"
    if is_policy_file(placement):
        load(placement)
    else:
        check_policy_name(name, NAMES)
    order = order or _OURS.get(placement, "due")
    if order not in ORDERS:
        raise ConfigError(f"the order in the engine must be one of {', '.join(ORDERS)}.")
    in_engine, kind, told = ORDERS[order]
    return Policy(
        name,
        replace(
            dispatch or DispatchOptions(),
            policy="slack" if name == "oracle" else placement,
            priority_by=told,
        ),
        replace(engine or EngineOptions(), order=in_engine),
        kind,
        oracle=name == "oracle",
    )
