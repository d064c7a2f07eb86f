"""Every placement policy by its name, and those that others bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from hexgen_vllm.config import DispatchOptions
from hexgen_vllm.errors import HexgenError
from hexgen_vllm.policy import rivals
from hexgen_vllm.policy.calls import Demand
from hexgen_vllm.policy.dispatch import (
    Choice,
    Claims,
    Dispatch,
    EarliestFinish,
    LeastOutstanding,
    Loads,
    PaperScore,
    RoundRobin,
)
from hexgen_vllm.policy.marginal_cost import MarginalCost

Placer = Callable[[DispatchOptions], Any]

PLACEMENTS: Final[dict[str, Callable[[DispatchOptions], Dispatch]]] = {
    "slack": MarginalCost,
    "paper": PaperScore,
    "round_robin": RoundRobin,
    "least_outstanding": LeastOutstanding,
    "earliest_finish": EarliestFinish,
    "weighted_round_robin": rivals.WeightedRoundRobin,
    "weighted_least": rivals.WeightedLeast,
    "power_of_two": rivals.PowerOfTwo,
    "sticky": rivals.Sticky,
    "wlcaff": rivals.WlcAff,
    "llm_d": rivals.LlmD,
    "cache_aware": rivals.CacheAware,
    "dynamo": rivals.Dynamo,
}
_outside: dict[str, Placer] = {}


def register(name: str, made: Placer) -> None:
    """Make a policy from outside known by ``name``.

    Args:
        name: as options give it; must not be one of :data:`PLACEMENTS`.
        made: its class.
    """
    _outside[name] = made


def placement(options: DispatchOptions) -> Dispatch:
    """Return the policy that ``options`` name, as new.

    Raises:
        HexgenError: it is from outside and was not registered in this process.
    """
    known = PLACEMENTS.get(options.policy)
    if known is not None:
        return known(options)
    made = _outside.get(options.policy)
    if made is None:
        raise HexgenError(f"policy {options.policy} was not loaded.")
    return OutsidePolicy(made(options), options)


class OutsidePolicy(Dispatch):
    """A policy that is not of this package: any object with ``choose``.

    Args:
        policy: may return an engine or a :class:`Choice`.
        options: its knobs, for now.
    """

    def __init__(self, policy: Any, options: DispatchOptions) -> None:
        super().__init__(options)
        self._choose = policy.choose
        self._placed = getattr(policy, "placed", None)
        self.holds = bool(getattr(policy, "holds", False))

    def choose(self, demand: Demand, engines: Loads, claims: Claims, now: float) -> Choice:
        """Return what the policy returns.

        Raises:
            HexgenError: it is not one of ``engines``.
        """
        found = self._choose(demand, list(engines), claims, now)  # theirs to sort
        choice = found if isinstance(found, Choice) else None
        engine = found if choice is None else choice.engine
        if not any(engine is one for one in engines):
            raise HexgenError(f"a policy chose {engine!r}, which is none of the engines.")
        return choice or Choice(engine, 0.0, "outside")

    def placed(self, demand: Demand, choice: Choice, now: float) -> None:
        """Pass it on, if the policy wants to know."""
        if self._placed is not None:
            self._placed(demand, choice, now)
