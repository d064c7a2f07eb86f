"""The knobs that may be tuned, each declared once, with the range that is searched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.sim.policies import Policy

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Knob:
    """One option that is searched.

    Attributes:
        name: of the option.
        section: ``dispatch`` for :class:`~hexgen_vllm.config.DispatchOptions`, ``engine`` for
            :class:`~hexgen_vllm.config.EngineOptions`.
        low, high: ends of the range, in the option's unit.
        policies: placements it has an effect on.
        log: searched by ratio instead of by difference.
        whole: takes whole numbers only.
        live: a running router can change it; others take a restart of the engines.
    """

    name: str
    section: str
    low: float
    high: float
    policies: tuple[str, ...]
    log: bool = False
    whole: bool = False
    live: bool = True

    def at(self, share: float) -> float:
        """Return the value at ``share`` of the range, 0 to 1."""
        share = min(max(share, 0.0), 1.0)
        if self.log:
            value = self.low * math.exp(share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.whole else float(f"{value:.4g}")

    def share(self, value: float) -> float:
        """Return where in the range ``value`` lies, 0 to 1; values outside count as its ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


KNOBS: Final = (
    Knob("alpha", "dispatch", 0.0, 1.0, ("paper",)),
    Knob("externality", "dispatch", 0.0, 2.0, ("slack",)),
    Knob("stretch", "dispatch", 0.0, 6.0, ("slack",)),
    Knob("affinity_tokens", "dispatch", 50.0, 2000.0, ("wlcaff",), log=True),
    Knob("hold_depth", "dispatch", 0, 16, ("slack",), whole=True),
    Knob("length_quantile", "dispatch", 0.3, 0.95, ("slack",)),
    Knob("slack_quantile", "dispatch", 0.3, 0.95, ("slack", "paper")),
    Knob("displace_slack_s", "engine", 0.2, 20.0, ("slack",), log=True, live=False),
    Knob("displace_gap_s", "engine", 0.1, 20.0, ("slack",), log=True, live=False),
)


def knobs_for(policy: Policy, names: tuple[str, ...] = (), *, live: bool = False) -> list[Knob]:
    """Return the knobs to search for ``policy``.

    Args:
        policy: what is tuned.
        names: only these; empty is all that have an effect.
        live: only those that a running router can change.

    Raises:
        ConfigError: a name is not a knob of the policy, or there is none at all.
    """
    placement = policy.dispatch.policy
    known = {k.name: k for k in KNOBS if placement in k.policies and (k.live or not live)}
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(f"{name!r} is not a knob of {policy.name}; its knobs are {listed}.")
    if not known:
        raise ConfigError(f"policy {policy.name} has nothing to tune.")
    return [known[name] for name in names or known]


def defaults(policy: Policy, knobs: list[Knob]) -> dict[str, float]:
    """Return the present values of ``knobs``."""
    sections = {"dispatch": policy.dispatch, "engine": policy.engine}
    return {knob.name: getattr(sections[knob.section], knob.name) for knob in knobs}


def applied(policy: Policy, values: Values) -> Policy:
    """Return ``policy`` with ``values`` of its knobs."""
    by_section: dict[str, dict[str, float]] = {"dispatch": {}, "engine": {}}
    for knob in KNOBS:
        if knob.name in values:
            value = values[knob.name]
            by_section[knob.section][knob.name] = int(value) if knob.whole else value
    return replace(
        policy,
        dispatch=replace(policy.dispatch, **by_section["dispatch"]),  # type: ignore[arg-type]
        engine=replace(policy.engine, **by_section["engine"]),  # type: ignore[arg-type]
    )
