"""The knobs that may be tuned: options that declare a range to search (:class:`Tuned`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from hexgen_vllm.config import DispatchOptions, EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import Tuned
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


def _declared() -> tuple[Knob, ...]:
    """Return the knobs that the options of placement and engine declare."""
    found = []
    for section, options in (("dispatch", DispatchOptions), ("engine", EngineOptions)):
        for one in fields(options):
            tuned: Tuned | None = one.metadata.get("tuned")
            if tuned is not None:
                whole = type(one.default) is int
                found.append(
                    Knob(
                        one.name, section, tuned.low, tuned.high, tuned.policies, tuned.log,
                        whole, live=section == "dispatch",
                    )
                )  # fmt: skip
    return tuple(found)


KNOBS: Final = _declared()


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


def changed(policy: Policy) -> dict[str, float]:
    """Return the numbers of ``policy`` that are not the defaults, by the names of options."""
    found = {}
    for options in (policy.dispatch, policy.engine):
        for one in fields(options):
            value = getattr(options, one.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and value != one.default:
                found[one.name] = value
    return found


def values_of(policy: Policy, values: Values) -> dict[str, float]:
    """Return what ``policy`` has for those of ``values`` that have an effect on it."""
    placement = policy.dispatch.policy
    known = [knob for knob in KNOBS if knob.name in values and placement in knob.policies]
    return defaults(policy, known)
