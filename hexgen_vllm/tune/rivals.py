"""The policies that a proposal has to beat, and a baseline in the paper's two measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Final

from hexgen_vllm.policy.placements import PLACEMENTS
from hexgen_vllm.report.summary import min_deadline
from hexgen_vllm.sim.policies import NAMES, Policy, named
from hexgen_vllm.tune.evaluate import Setting, capacity_of

ON_TIME: Final = 0.95
_STEPS: Final = 7
_OURS: Final = "slack"
_ORDER: Final = "edf"


def others(policy: Policy) -> Iterator[str]:
    """Yield the names of what others place calls with, and ours where another is tuned."""
    if policy.dispatch.policy != _OURS:
        yield _OURS
    for name in PLACEMENTS:
        if f"{name}+{_ORDER}" in NAMES:
            yield f"{name}+{_ORDER}"


def rival(policy: Policy, name: str, *, live: bool) -> Policy:
    """Return the rival ``name``.

    Args:
        policy: what is tuned.
        name: one of :data:`NAMES`, or ``FILE.py:Class[+order]``.
        live: only what a running router can turn: the placement, with the engines as they are.

    Raises:
        ConfigError: there is no such policy.
    """
    found = named(name, policy.dispatch)
    if not live:
        return found
    placement = found.dispatch.policy
    dispatch = replace(policy.dispatch, policy=placement)
    return replace(policy, name=placement, dispatch=dispatch)


def against_baseline(
    setting: Setting, baseline: Policy, policy: Policy, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return min deadline @95 % and @99 % of both, in base SLOs, and their ratios."""
    found: dict[str, Any] = {"baseline": baseline.name}
    runs = {p.name: [setting.records(p, seed) for seed in seeds] for p in (baseline, policy)}
    for share in (0.95, 0.99):
        scales = [
            fmean(
                min_deadline([r.latency_s for r in records], share, setting.base_s).scale
                for records in runs[p.name]
            )
            for p in (baseline, policy)
        ]
        found[f"min_deadline_{share:.0%}_x"] = [round(scale, 3) for scale in scales]
        found[f"deadline_ratio_{share:.0%}"] = round(scales[0] / scales[1], 3)
    return found


def compare_rates(
    setting: Setting, baseline: Policy, policy: Policy, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the sustained rates of both and their ratio.

    Rates end at the capacity λ*: a finite run bears more for a while, but nothing sustains it.
    """
    best = capacity_of(setting.fleet, setting.bounds)
    rates = [sustained(setting, p, seeds, best / 64, best) for p in (baseline, policy)]
    found: dict[str, Any] = {"sustained_per_s": rates, "capacity_per_s": best}
    if rates[0] and rates[1]:
        found["rate_ratio"] = round(rates[1] / rates[0], 3)
    return found


def sustained(
    setting: Setting, policy: Policy, seeds: Sequence[int], least: float, most: float
) -> float | None:
    """Return the highest rate in a range at which 95 % are on time, by bisection.

    Attainment falls with the rate, up to noise; the answer is exact to 1/128 of the range.

    Args:
        setting: fleet, workload and deadline; its rate is not used.
        policy: what is measured.
        seeds: one run each; their mean counts.
        least, most: range of rates, workflows per second.

    Returns:
        The rate, or ``None`` when not even ``least`` is borne.
    """

    def borne(rate: float) -> bool:
        at = replace(setting, rate_per_s=rate)
        return fmean(at.on_time(policy, seed) for seed in seeds) >= ON_TIME

    if not borne(least):
        return None
    if borne(most):
        return most
    for _ in range(_STEPS):
        middle = (least + most) / 2
        least, most = (middle, most) if borne(middle) else (least, middle)
    return least
